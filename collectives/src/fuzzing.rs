//! The parsers of what others wrote, for the fuzz targets in `tests/fuzz`.
//!
//! Each module is a target: `seeds` are inputs to begin with, and `check` panics where the parser
//! breaks its promise.

pub use crate::launch::fuzzing::*;
pub use crate::rendezvous::fuzzing::*;
pub use crate::store::tcp::fuzzing::*;
pub use crate::wire::tcp::fuzzing::*;
pub use crate::wire::tcp::through_store::fuzzing::*;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_seed_keeps_the_promises() {
        type Target = (fn() -> Vec<Vec<u8>>, fn(&[u8]));
        let targets: [Target; 10] = [
            (launch_lists::seeds, launch_lists::check),
            (launch_variables::seeds, launch_variables::check),
            (rendezvous_answer::seeds, rendezvous_answer::check),
            (rendezvous_greeting::seeds, rendezvous_greeting::check),
            (store_record::seeds, store_record::check),
            (store_requests::seeds, store_requests::check),
            (store_table::seeds, store_table::check),
            (tcp_control::seeds, tcp_control::check),
            (tcp_greeting::seeds, tcp_greeting::check),
            (tcp_table::seeds, tcp_table::check),
        ];
        for (seeds, check) in targets {
            seeds().iter().for_each(|seed| check(seed));
        }
    }
}
