//! The parsers of what others wrote, for the fuzz targets in `tests/fuzz`.
//!
//! Each module is a target: `seeds` are inputs to begin with, and `check` panics where the parser
//! breaks its promise.

pub use crate::checkpoint::fuzzing::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_keeps_the_promises() {
        manifest::seeds().iter().for_each(|seed| manifest::check(seed));
        shard_file::seeds().iter().for_each(|seed| shard_file::check(seed));
    }
}
