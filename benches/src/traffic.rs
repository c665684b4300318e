//! The memory roofline of a kernel: plain loops over as many bytes as the kernel must read, update in place and write, on one thread.
//! What is written is copied from what is read, as far as that reaches; of the rest of what is read, sums are made.

use std::time::Instant;

use pillion_kernels::{Buffer, Cpu, DType, Device};

use crate::Error;
use crate::local;

/// Elements whose bytes are read, updated and written before the next.
const BLOCK: usize = 2048;
const RUNS: usize = 5;

/// What passes between memory and processor. Of what is read, updated and written, each is one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read of each element; even.
    pub read: usize,
    /// Bytes read and then written of each element; even.
    pub updated: usize,
    /// Bytes only written of each element; even.
    pub written: usize,
    /// Number of elements.
    pub elements: usize,
}

impl Traffic {
    /// No bytes.
    pub const NOTHING: Traffic = Traffic { read: 0, updated: 0, written: 0, elements: 0 };

    /// Bytes that pass: those updated pass twice.
    pub fn bytes(self) -> usize {
        (self.read + 2 * self.updated + self.written) * self.elements
    }

    /// Bytes a second of the plain loop, the most of several runs: with stores through the caches or past them.
    ///
    /// # Errors
    /// Those of the allocation.
    pub fn bandwidth(self) -> Result<f64, Error> {
        let touched = |bytes: usize| -> Result<Buffer, Error> {
            let mut buffer = Cpu.allocate(DType::F32, bytes * self.elements / DType::F32.bytes())?;
            // Pages that were never written are all one page.
            local::numbers(&mut buffer).fill(1.0);
            Ok(buffer)
        };
        let (mut read, mut updated, mut written) =
            (touched(self.read)?, touched(self.updated)?, touched(self.written)?);
        let [read, updated, written] = [&mut read, &mut updated, &mut written].map(local::numbers);
        let mut seconds = f64::INFINITY;
        for _ in 0..RUNS {
            for stream in [false, true] {
                let started = Instant::now();
                self.run(read, updated, written, stream);
                seconds = seconds.min(started.elapsed().as_secs_f64());
            }
        }
        Ok(self.bytes() as f64 / seconds)
    }

    fn run(self, read: &[f32], updated: &mut [f32], written: &mut [f32], stream: bool) {
        if self.read + self.updated == 0 {
            // What is only written is fastest written whole.
            return local::clear(written);
        }
        let of_block = |bytes: usize| (bytes * BLOCK / DType::F32.bytes()).max(1);
        let constant = vec![1.0; of_block(self.written)];
        let mut read = read.chunks(of_block(self.read));
        let mut updated = updated.chunks_mut(of_block(self.updated));
        let mut written = written.chunks_mut(of_block(self.written));
        for _ in 0..self.elements.div_ceil(BLOCK) {
            let (read, written) = (read.next().unwrap_or_default(), written.next().unwrap_or_default());
            let both = read.len().min(written.len());
            local::store(&read[..both], &mut written[..both], stream);
            local::store(&constant[..written.len() - both], &mut written[both..], stream);
            sum(&read[both..]);
            updated.next().unwrap_or_default().iter_mut().for_each(|x| *x = *x * 0.5 + 0.5);
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
                let work = Traffic { read: 2, updated: 6, written: 4, elements };
                let (mut updated, mut written) = (vec![3.0; elements * 6 / 4], vec![3.0; elements]);
                work.run(&vec![5.0; elements / 2], &mut updated, &mut written, stream);
                assert!(updated.iter().all(|&x| x == 2.0), "3 / 2 + 1 / 2");
                let copies = written.iter().filter(|&&x| x == 5.0).count();
                assert_eq!(copies, elements / 2, "all that was read");
                assert!(written.iter().all(|&x| x == 5.0 || x == 1.0));
            }
        }
    }

    #[test]
    fn updated_bytes_pass_twice() {
        assert_eq!(Traffic { read: 4, updated: 12, written: 2, elements: 10 }.bytes(), 300);
    }
}
