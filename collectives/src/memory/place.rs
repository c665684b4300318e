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
    /// In private memory that passes piece by piece through the rank's stage, which starts at this
    /// byte.
    Stage(u64),
    /// In private memory, whole, from this address of the rank's process on. Others can only read
    /// it, through the system (see [`super::private`]).
    Private(u64),
}

impl Place {
    pub(crate) fn to_word(self) -> u64 {
        match self {
            Place::None => 0,
            Place::Header => 1,
            Place::Arena(offset) => offset << 3 | 2,
            Place::Stage(offset) => offset << 3 | 3,
            Place::Private(address) => address << 3 | 4,
        }
    }

    pub(crate) fn from_word(word: u64) -> Place {
        match word & 7 {
            1 => Place::Header,
            2 => Place::Arena(word >> 3),
            3 => Place::Stage(word >> 3),
            4 => Place::Private(word >> 3),
            _ => Place::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_being_a_word() {
        let ends = [Place::Arena(0), Place::Arena(1 << 60), Place::Stage(4096), Place::Private((1 << 57) - 1)];
        for place in [Place::None, Place::Header].into_iter().chain(ends) {
            assert_eq!(Place::from_word(place.to_word()), place);
        }
    }
}
