//! The command `pillion`.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(pillion_llama::main(std::env::args_os()));
}
