//! The communicator of a run, made anew when what it has allocated becomes much: an arena's memory returns only with its communicator.

use pillion_collectives::{Backend, Communicator, Launch, Options};

use crate::Error;

/// Bytes of a rank's arena and windows from which on a communicator is replaced, rather than kept for the next line.
const KEPT: u64 = 128 << 20;

/// One communicator after another, the same on every rank.
pub(crate) struct Link {
    launch: Launch,
    options: Options,
    current: Option<Communicator>,
    allocated: u64,
    number: u64,
}

impl Link {
    /// Joins the ranks of `launch`.
    pub(crate) fn connect(launch: &Launch, options: &Options) -> Result<Link, Error> {
        let current = Some(Communicator::connect(launch, options.clone())?);
        let link = Link { launch: launch.clone(), options: options.clone(), current, allocated: 0, number: 0 };
        let communicator = link.communicator();
        // A hierarchy of one rank on each host is messages alone.
        let messages = matches!(communicator.backend(), Backend::Mpi | Backend::Tcp);
        let flat = messages && communicator.hosts() == communicator.world();
        let same = communicator.backend() == options.backend || flat && options.backend == Backend::Hierarchical;
        if options.backend != Backend::Auto && !same {
            return Err(Error::Backend { asked: options.backend, got: communicator.backend() });
        }
        // Over messages alone every rank counts as a host.
        let spread = options.simulated_hosts > 1 && !messages;
        if spread && communicator.hosts() != options.simulated_hosts {
            return Err(Error::Hosts { asked: options.simulated_hosts, got: communicator.hosts() });
        }
        Ok(link)
    }

    /// The communicator that there is.
    pub(crate) fn communicator(&self) -> &Communicator {
        self.current.as_ref().expect("replaced in `with_room` alone, which fails or sets it")
    }

    /// Who this is.
    pub(crate) fn launch(&self) -> &Launch {
        &self.launch
    }

    /// A communicator from which so many bytes will be allocated, the same number on every rank.
    pub(crate) fn with_room(&mut self, bytes: u64) -> Result<&Communicator, Error> {
        if self.allocated > 0 && self.allocated.saturating_add(bytes) > KEPT {
            self.number += 1;
            self.allocated = 0;
            self.communicator().barrier()?;
            let mut launch = Launch { job: format!("{}.{}", self.launch.job, self.number), ..self.launch.clone() };
            if let Some(meeting) = &mut launch.meeting {
                meeting.secret = format!("{}.{}", meeting.secret, self.number);
            }
            // Its memory first, then that of the next.
            self.current = None;
            self.current = Some(Communicator::connect(&launch, self.options.clone())?);
        }
        self.allocated += bytes;
        Ok(self.communicator())
    }

    /// Has no other rank wait for this one.
    pub(crate) fn abort(&self, reason: &Error) {
        if let Some(communicator) = &self.current {
            communicator.abort(&reason.to_string());
        }
    }
}
