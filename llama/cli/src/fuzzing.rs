//! The parsers of what others wrote, for the fuzz targets in `tests/fuzz`.
//!
//! Each module is a target: `seeds` are inputs to begin with, and `check` panics where the parser
//! breaks its promise.

pub use crate::experiment::fuzzing::*;
pub use crate::train::fuzzing::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_keeps_the_promises() {
        type Target = (fn() -> Vec<Vec<u8>>, fn(&[u8]));
        let targets: [Target; 4] = [
            (config_file::seeds, config_file::check),
            (metrics::seeds, metrics::check),
            (options::seeds, options::check),
            (progress::seeds, progress::check),
        ];
        for (seeds, check) in targets {
            seeds().iter().for_each(|seed| check(seed));
        }
    }
}
