#![no_main]
pillion_fuzz::target!(pillion_collectives::fuzzing::launch_variables);
