//! The command `pillion`.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(pillion_cli::main(std::env::args_os()));
}
