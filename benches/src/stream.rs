//! The memory roofline of a kernel: plain loops over as many bytes as the kernel must read, update in place and write, on one thread.
//! Arithmetic is one addition or one multiply-add an element, and what is written is copied from the first-level cache.

use pillion_kernels::{Buffer, Cpu, DType, Device};

use crate::Error;
use crate::local;
use crate::timing::Summary;

/// Elements whose bytes are read, updated and written before the next: they stay in the first-level cache.
const BLOCK: usize = 1024;
const RUNS: usize = 5;

/// What passes between memory and processor. Of what is read, updated and written, each is one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Bytes read of each element; even.
    pub read: usize,
    /// Bytes read and then written of each element; even.
    pub updated: usize,
    /// Bytes only written of each element; even.
    pub written: usize,
    /// Number of elements.
    pub elements: usize,
}

impl Stream {
    /// No bytes.
    pub const NOTHING: Stream = Stream { read: 0, updated: 0, written: 0, elements: 0 };

    /// Bytes that pass: those updated pass twice.
    pub fn bytes(self) -> usize {
        (self.read + 2 * self.updated + self.written) * self.elements
    }

    /// Bytes a second of the plain loop, median of several runs: with stores through the caches or past them, whichever is faster.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn bandwidth(self) -> Result<f64, Error> {
        let mut streams = [self.read, self.updated, self.written].map(|bytes| {
            let mut buffer = Cpu.allocate(DType::F32, bytes * self.elements / DType::F32.bytes())?;
            // Pages that were never written are all one page.
            local::numbers(&mut buffer).fill(1.0);
            Ok::<Buffer, Error>(buffer)
        });
        let [Ok(read), Ok(updated), Ok(written)] = &mut streams else {
            return Err(streams.into_iter().find_map(Result::err).expect("one of them failed"));
        };
        let [read, updated, written] = [read, updated, written].map(local::numbers);
        let mut time = |stream| {
            let samples: Vec<u64> = (0..RUNS)
                .map(|_| {
                    let started = std::time::Instant::now();
                    self.run(read, updated, written, stream);
                    started.elapsed().as_nanos() as u64
                })
                .collect();
            if std::env::var("V").is_ok() {println!("{stream} {samples:?}");} Summary::of(&samples).p50_us
        };
        Ok(self.bytes() as f64 / (time(false).min(time(true)) * 1e-6))
    }

    fn run(self, read: &[f32], updated: &mut [f32], written: &mut [f32], stream: bool) {
        let of_block = |bytes: usize| (bytes * BLOCK / DType::F32.bytes()).max(1);
        let source = vec![1.0; of_block(self.written)];
        let mut read = read.chunks(of_block(self.read));
        let mut updated = updated.chunks_mut(of_block(self.updated));
        let mut written = written.chunks_mut(of_block(self.written));
        for _ in 0..self.elements.div_ceil(BLOCK) {
            if let Some(block) = read.next() {
                sum(block);
            }
            if let Some(block) = updated.next() {
                block.iter_mut().for_each(|x| *x = *x * 0.5 + 0.5);
            }
            if let Some(block) = written.next() {
                local::store(&source[..block.len()], block, stream);
            }
        }
    }
}

/// Reads a block, in as many sums as additions are under way at a time.
fn sum(block: &[f32]) {
    let mut sums = [0.0; 32];
    for lanes in block.chunks_exact(sums.len()) {
        sums.iter_mut().zip(lanes).for_each(|(sum, x)| *sum += x);
    }
    std::hint::black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_updated_and_written_once() {
        for elements in [0, 2, BLOCK, 3 * BLOCK + 10] {
            for stream in [false, true] {
                let work = Stream { read: 4, updated: 6, written: 2, elements };
                let (mut updated, mut written) = (vec![3.0; elements * 6 / 4], vec![3.0; elements / 2]);
                work.run(&vec![3.0; elements], &mut updated, &mut written, stream);
                assert!(updated.iter().all(|&x| x == 2.0), "3 / 2 + 1 / 2");
                assert!(written.iter().all(|&x| x == 1.0));
            }
        }
    }

    #[test]
    fn updated_bytes_pass_twice() {
        assert_eq!(Stream { read: 4, updated: 12, written: 2, elements: 10 }.bytes(), 300);
    }
}
