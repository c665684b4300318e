#![no_main]
pillion_fuzz::target!(pillion_data::fuzzing::documents);
