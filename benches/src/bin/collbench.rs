//! Microbenchmarks of collectives: `collbench --help`.
#![forbid(unsafe_code)]

fn main() {
    std::process::exit(pillion_benches::ranks::main(std::env::args_os()));
}
