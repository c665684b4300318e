#![no_main]
pillion_fuzz::target!(pillion_llama::fuzzing::config_file);
