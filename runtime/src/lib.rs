//! Parameters: layout, plan, engine, optimizer, checkpoint.
#![forbid(unsafe_code)]
