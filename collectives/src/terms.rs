//! Settings that every rank of a job must share. Ranks compare them where they meet, because ranks
//! with different ones would move different bytes, or never meet in an operation. Limits of time are
//! each rank's own.

use crate::{Backend, Launch, Options, WireKind};

/// What the words of [`Terms`] are: the field of [`Options`], and the flag of our programs.
const NAMES: [&str; Terms::WORDS] =
    ["the number of ranks", "`backend` (--backend)", "`wire` (--wire)", "`reduce_groups` (--reduce-groups)"];

/// Those settings of one rank, as the words that it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Terms(pub(crate) [u64; Terms::WORDS]);

impl Terms {
    pub(crate) const WORDS: usize = 4;
    pub(crate) const BYTES: usize = 8 * Terms::WORDS;

    /// Those of a rank of `launch`'s job.
    pub(crate) fn of(launch: &Launch, options: &Options) -> Terms {
        let wire = options.wire.of(launch, options.backend);
        Terms([
            launch.world as u64,
            BACKENDS.iter().position(|&backend| backend == options.backend).map_or(u64::MAX, |at| at as u64),
            u64::from(wire == WireKind::Mpi),
            options.reduce_groups as u64,
        ])
    }

    pub(crate) fn bytes(&self) -> [u8; Terms::BYTES] {
        let mut bytes = [0; Terms::BYTES];
        bytes.chunks_exact_mut(8).zip(self.0).for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    pub(crate) fn read(bytes: &[u8; Terms::BYTES]) -> Terms {
        let (words, _) = bytes.as_chunks();
        Terms(std::array::from_fn(|index| u64::from_le_bytes(words[index])))
    }

    /// Every setting in which the rank that `who` names differs from rank 0, with both values; none
    /// where there is no such setting.
    pub(crate) fn differences(&self, who: &str, zero: &Terms) -> Option<String> {
        let pairs = NAMES.iter().zip(self.0.iter().zip(zero.0)).enumerate();
        let differences = pairs.filter(|(_, (_, (own, zero)))| *own != zero).map(|(index, (name, (own, zero)))| {
            format!("{name} is {} on {who} and {} on rank 0", text(index, *own), text(index, zero))
        });
        let all: Vec<String> = differences.collect();
        (!all.is_empty()).then(|| format!("{}: give every rank the same settings", all.join("; ")))
    }
}

/// In the order of their numbers.
const BACKENDS: [Backend; 5] = [Backend::Auto, Backend::Shm, Backend::Tcp, Backend::Mpi, Backend::Hierarchical];

/// A word as the setting's value.
fn text(index: usize, word: u64) -> String {
    match (index, usize::try_from(word).ok().and_then(|number| BACKENDS.get(number))) {
        (1, Some(backend)) => backend.to_string(),
        (2, _) => if word == 0 { WireKind::Tcp } else { WireKind::Mpi }.to_string(),
        _ => word.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_is_named_with_both_values() {
        let base = Options::default;
        let launch = Launch::threads(4).remove(1);
        let zero = Terms::of(&launch, &base());
        assert_eq!(Terms::read(&zero.bytes()), zero);
        assert_eq!(zero.differences("rank 1", &zero), None);
        for (options, named) in [
            (
                Options { backend: Backend::Shm, ..base() },
                "`backend` (--backend) is shm on this rank and auto on rank 0",
            ),
            (Options { wire: WireKind::Mpi, ..base() }, "`wire` (--wire) is MPI on this rank and TCP on rank 0"),
            (
                Options { reduce_groups: 2, ..base() },
                "`reduce_groups` (--reduce-groups) is 2 on this rank and 1 on rank 0",
            ),
        ] {
            let differences = Terms::of(&launch, &options).differences("this rank", &zero).unwrap();
            assert!(differences.starts_with(named) || differences.contains(named), "{differences}");
            assert!(differences.ends_with(": give every rank the same settings"), "{differences}");
        }
        // Whatever words a rank sends.
        let wild = Terms([u64::MAX; Terms::WORDS]).differences("this rank", &zero).unwrap();
        assert!(wild.contains("the number of ranks is 18446744073709551615 on this rank and 4 on rank 0"), "{wild}");
    }
}
