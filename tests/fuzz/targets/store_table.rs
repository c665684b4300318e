#![no_main]
pillion_fuzz::target!(pillion_collectives::fuzzing::store_table);
