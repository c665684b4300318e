//! Elements: devices, buffers, dtypes and the arithmetic on them.
