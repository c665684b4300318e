#![no_main]
pillion_fuzz::target!(pillion_cli::fuzzing::config_file);
