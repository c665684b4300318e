//! Where the others find what a rank contributes to an operation, or want to put what they compute for it.

/// A place in shared memory, as a rank's header names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// This rank has no such operand.
    None,
    /// In the payload of the header itself.
    Header,
    /// In the rank's arena, whole, from this byte on.
    Arena(u64),
    /// In private memory, which nobody else sees: it passes piece by piece through the rank's stage, which starts at this byte.
    Stage(u64),
}

impl Place {
    pub(crate) fn to_word(self) -> u64 {
        match self {
            Place::None => 0,
            Place::Header => 1,
            Place::Arena(offset) => offset << 2 | 2,
            Place::Stage(offset) => offset << 2 | 3,
        }
    }

    pub(crate) fn from_word(word: u64) -> Place {
        match word & 3 {
            0 => Place::None,
            1 => Place::Header,
            2 => Place::Arena(word >> 2),
            _ => Place::Stage(word >> 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_being_a_word() {
        for place in [Place::None, Place::Header, Place::Arena(0), Place::Arena(1 << 60), Place::Stage(4096)] {
            assert_eq!(Place::from_word(place.to_word()), place);
        }
    }
}
