//! The command `pillion`, built with these tests, so that what they run is never stale.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(pillion_cli::main(std::env::args_os()));
}
