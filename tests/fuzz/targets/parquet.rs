#![no_main]
// A page says how long it is uncompressed, and the crate takes that memory: 2 GiB at most. A check
// reads several columns, twice.
pillion_fuzz::target!(pillion_data::fuzzing::parquet, 32 << 30);
