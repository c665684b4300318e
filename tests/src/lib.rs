//! Everything, from outside: parity, many processes, faults.
#![forbid(unsafe_code)]
