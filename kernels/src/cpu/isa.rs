//! Which instructions the kernels use: the widest that this processor has, or fewer where `PILLION_ISA` says so.

use std::sync::OnceLock;

use crate::Error;

/// Sets of vector instructions, each containing those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every processor of this architecture has.
    Portable,
    /// AVX2 and FMA: eight f32 at a time.
    Avx2,
    /// AVX-512 F, BW, CD, DQ and VL: sixteen f32 at a time.
    Avx512,
    /// AMX for bf16: products of tiles of 16 × 32 and 32 × 16.
    Amx,
}

impl Isa {
    const NAMES: [(&str, Isa); 4] =
        [("portable", Isa::Portable), ("avx2", Isa::Avx2), ("avx512", Isa::Avx512), ("amx", Isa::Amx)];

    /// The set that all kernels of this process use.
    ///
    /// # Errors
    /// When `PILLION_ISA` names no set, or one that this processor has not.
    pub fn of_process() -> Result<Isa, Error> {
        static CHOSEN: OnceLock<Result<Isa, Error>> = OnceLock::new();
        CHOSEN.get_or_init(|| Isa::choose(std::env::var_os("PILLION_ISA"), Isa::widest())).clone()
    }

    /// The same inside a kernel, which cannot report an error: programs ask [`Isa::of_process`] first.
    pub(super) fn current() -> Isa {
        // Apart, since a copy of a result that may be an error takes longer than some kernels.
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| Isa::of_process().unwrap_or_else(|error| panic!("{error}")))
    }

    fn choose(wanted: Option<std::ffi::OsString>, widest: Isa) -> Result<Isa, Error> {
        let Some(wanted) = wanted else { return Ok(widest) };
        let wanted = wanted.to_string_lossy();
        let known = Isa::NAMES.into_iter().find(|&(name, _)| name == wanted).map(|(_, isa)| isa);
        known
            .filter(|&isa| isa <= widest)
            .ok_or_else(|| Error::Isa { wanted: wanted.into_owned(), widest: widest.name() })
    }

    /// The widest set of this processor.
    #[cfg(target_arch = "x86_64")]
    fn widest() -> Isa {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = pulp::x86::V4::try_new().is_some();
        if avx2 && avx512 {
            if tiles_are_allowed() { Isa::Amx } else { Isa::Avx512 }
        } else if avx2 && pulp::x86::V3::try_new().is_some() {
            Isa::Avx2
        } else {
            Isa::Portable
        }
    }

    /// The widest set of this processor.
    #[cfg(not(target_arch = "x86_64"))]
    fn widest() -> Isa {
        Isa::Portable
    }

    /// Every set that this processor has.
    #[cfg(test)]
    pub(super) fn available() -> impl Iterator<Item = Isa> {
        let widest = Isa::widest();
        Isa::NAMES.into_iter().map(|(_, isa)| isa).filter(move |&isa| isa <= widest)
    }

    /// As `PILLION_ISA` names it.
    pub fn name(self) -> &'static str {
        Isa::NAMES[self as usize].0
    }
}

/// Whether the processor has AMX-BF16, and the system lets this process use tile registers: their state is large, so a process
/// asks once (Linux, x86/xstate.rst).
#[cfg(target_arch = "x86_64")]
fn tiles_are_allowed() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    let features = std::arch::x86_64::__cpuid_count(7, 0).edx;
    let (bf16, tile) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
    // SAFETY: takes numbers, and changes nothing but this permission. Other systems and older kernels refuse.
    bf16 && tile && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
}

/// Runs `kernel` with the widest vectors in use. Arithmetic is the same on each: no fused multiply-add is introduced, and sums name
/// their lanes.
///
/// The closure needs `#[inline(always)]`, and so does what it calls: it is called from three places, and would otherwise be compiled once,
/// for what every processor has.
#[inline(always)]
pub(super) fn vectorized<R>(kernel: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    match Isa::current() {
        Isa::Avx512 | Isa::Amx => {
            if let Some(simd) = pulp::x86::V4::try_new() {
                return simd.vectorize(Kernel(kernel));
            }
        }
        Isa::Avx2 => {
            if let Some(simd) = pulp::x86::V3::try_new() {
                return simd.vectorize(Kernel(kernel));
            }
        }
        Isa::Portable => {}
    }
    kernel()
}

#[cfg(target_arch = "x86_64")]
struct Kernel<F>(F);

#[cfg(target_arch = "x86_64")]
impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Kernel<F> {
    type Output = R;

    #[inline(always)]
    fn call(self) -> R {
        (self.0)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_set_is_the_widest_or_a_narrower_one_by_name() {
        let choose = |wanted: &str, widest| Isa::choose(Some(wanted.into()), widest);
        assert_eq!(Isa::choose(None, Isa::Avx2).unwrap(), Isa::Avx2);
        for (name, isa) in Isa::NAMES {
            assert_eq!(choose(name, Isa::Amx).unwrap(), isa);
            assert_eq!(isa.name(), name);
        }
        let error = choose("avx512", Isa::Avx2).unwrap_err().to_string();
        assert!(error.contains("avx512") && error.contains("avx2"), "{error}");
        assert!(choose("sse", Isa::Amx).is_err());
        assert!(choose("", Isa::Amx).is_err());
    }
}
