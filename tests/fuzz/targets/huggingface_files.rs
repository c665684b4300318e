#![no_main]
pillion_fuzz::target!(pillion_llama::huggingface::fuzzing::files);
