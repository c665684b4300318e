//! What the processor could multiply and add at most: products of registers with registers, no memory touched.

use std::hint::black_box;
use std::time::Instant;

use super::{Isa, Team, vectorized};
use crate::DType;

/// Floating-point operations of one call of a loop below for each of its steps.
type Loop = (fn(usize), usize);

/// Floating-point operations a second of all threads of `team` together, in products of `dtype` with f32 sums: the fastest of several
/// short runs.
pub(in crate::cpu) fn measure(team: &Team, dtype: DType) -> f64 {
    let (run, flops) = fastest(Isa::current(), dtype);
    const STEPS: usize = 200_000;
    let once = || {
        let started = Instant::now();
        team.run(team.threads(), |_| run(STEPS));
        (STEPS * flops * team.threads()) as f64 / started.elapsed().as_secs_f64()
    };
    (0..10).map(|_| once()).fold(0.0, f64::max)
}

fn fastest(isa: Isa, dtype: DType) -> Loop {
    match isa {
        // Two operations for each of 64 lanes.
        Isa::Portable => (portable, 128),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if dtype == DType::Bf16 => (x86::tiles, 4 * 2 * 16 * 16 * 32),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (x86::avx2, 12 * 8 * 2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => (x86::avx512, 24 * 16 * 2),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512 | Isa::Amx => (portable, 128),
    }
}

fn portable(steps: usize) {
    let (mut sums, factor) = (black_box([0.5f32; 64]), black_box(0.999f32));
    vectorized(
        #[inline(always)]
        || {
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = *sum * factor + factor;
                }
            }
        },
    );
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use crate::cpu::matmul::amx::Amx;
    use crate::cpu::matmul::tile::Tile;

    macro_rules! multiply_adds {
        ($name:ident, $inner:ident, $features:literal, $registers:literal, $set:ident, $fma:ident) => {
            pub(super) fn $name(steps: usize) {
                // SAFETY: `fastest` names this loop where the processor has the instructions.
                unsafe { $inner(steps) }
            }

            #[target_feature(enable = $features)]
            fn $inner(steps: usize) {
                let (mut sums, factor) = ([$set(black_box(0.5)); $registers], $set(black_box(0.999)));
                for _ in 0..steps {
                    for sum in &mut sums {
                        *sum = $fma(*sum, factor, factor);
                    }
                }
                black_box(sums);
            }
        };
    }

    multiply_adds!(avx2, avx2_loop, "avx2,fma", 12, _mm256_set1_ps, _mm256_fmadd_ps);
    multiply_adds!(avx512, avx512_loop, "avx512f", 24, _mm512_set1_ps, _mm512_fmadd_ps);

    /// Four products of tiles a step. Zeros would be faster than real numbers, so the tiles hold others.
    pub(super) fn tiles(steps: usize) {
        // SAFETY: `fastest` names this loop where the processor has tiles and this process may use them.
        let _running = unsafe { Amx::new() }.start();
        let numbers: [u16; 512] = std::array::from_fn(|index| 0x3f00 + (index as u16 * 37) % 128);
        // SAFETY: loads 16 rows of 64 bytes, which the array has; the configuration is in force.
        unsafe {
            asm!(
                "tileloadd tmm4, [{numbers} + 1*{line}]",
                "tileloadd tmm5, [{numbers} + 1*{line}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm5",
                "tdpbf16ps tmm2, tmm4, tmm5",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "dec {steps}",
                "jnz 2b",
                numbers = in(reg) numbers.as_ptr(),
                line = in(reg) 64usize,
                steps = inout(reg) steps.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                options(nostack, readonly),
            );
        }
    }
}
