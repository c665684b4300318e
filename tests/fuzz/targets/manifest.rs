#![no_main]
pillion_fuzz::target!(pillion_runtime::fuzzing::manifest);
