//! When a stream came to a place.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// A place in a stream, whose time is known once the stream has come to it.
#[derive(Clone)]
pub struct Stamp(Kind);

#[derive(Clone)]
enum Kind {
    At(Instant),
    Of(Arc<dyn Timed>),
}

/// What a device knows of the time at which a stream came to a place.
pub trait Timed: Send + Sync {
    /// The time, unless the stream has not come to the place, or has failed before.
    fn time(&self) -> Option<Instant>;
}

impl Stamp {
    /// The time at which the host makes this call.
    pub fn now() -> Stamp {
        Stamp::from(Instant::now())
    }

    /// A place of a stream of another device.
    pub fn new(timed: Arc<dyn Timed>) -> Stamp {
        Stamp(Kind::Of(timed))
    }

    /// The time, unless the stream has not come to the place, or has failed before.
    pub fn time(&self) -> Option<Instant> {
        match &self.0 {
            Kind::At(time) => Some(*time),
            Kind::Of(timed) => timed.time(),
        }
    }
}

impl From<Instant> for Stamp {
    fn from(time: Instant) -> Stamp {
        Stamp(Kind::At(time))
    }
}

impl fmt::Debug for Stamp {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_tuple("Stamp").field(&self.time()).finish()
    }
}
