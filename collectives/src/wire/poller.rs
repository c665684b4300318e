//! A thread that waits until sockets can move bytes, and then rings the progress thread.
//!
//! The progress thread sleeps at a futex, because ranks of its host ring it there. The kernel
//! cannot wait for a futex and for sockets at once, so another thread waits for the sockets.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::task::Waker;
use std::thread::JoinHandle;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::Error;
use crate::limits::explain_thread;
use crate::memory::fork::Guarded;

/// What comes with events: of a socket, and of the descriptor that ends the thread.
const SOCKET: u64 = 0;
const END: u64 = 1;
/// Most events that one wait returns.
const EVENTS: usize = 16;

/// The thread, which ends when this is dropped.
pub(crate) struct Poller {
    epoll: Arc<Guarded<OwnedFd>>,
    end: Guarded<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Poller {
    /// Starts the thread, which will wake `waker`.
    ///
    /// # Errors
    /// [`Error::System`] where the system has no descriptor, no memory or no thread left.
    pub(crate) fn start(waker: Waker) -> Result<Poller, Error> {
        let failed = Error::system("waiting for sockets");
        let epoll = Arc::new(Guarded::new(epoll::create(CreateFlags::CLOEXEC).map_err(&failed)?));
        let end = Guarded::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(&failed)?);
        epoll::add(&**epoll, &*end, EventData::new_u64(END), EventFlags::IN).map_err(&failed)?;
        let waits = epoll.clone();
        let thread = std::thread::Builder::new().name("pillion-poller".into());
        let thread = thread.spawn(move || ring(&waits, &waker));
        let thread =
            thread.map_err(|error| Error::System { what: "starting a thread", reason: explain_thread(&error) })?;
        Ok(Poller { epoll, end, thread: Some(thread) })
    }

    /// Rings once when the socket can be read from or written to, whichever is asked for, or when
    /// its connection ends. Replaces what was asked for the socket before.
    ///
    /// # Errors
    /// The system's, and [`Errno::SRCH`] where the thread has ended.
    pub(crate) fn watch(&self, socket: &impl AsFd, reads: bool, writes: bool) -> rustix::io::Result<()> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            return Err(Errno::SRCH);
        }
        let mut flags = EventFlags::ONESHOT;
        flags.set(EventFlags::IN, reads);
        flags.set(EventFlags::OUT, writes);
        match epoll::modify(&**self.epoll, socket, EventData::new_u64(SOCKET), flags) {
            Err(Errno::NOENT) => epoll::add(&**self.epoll, socket, EventData::new_u64(SOCKET), flags),
            modified => modified,
        }
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        // Fails only where the counter is full, and then the thread ends too.
        let _ = rustix::io::write(&*self.end, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

fn ring(epoll: &OwnedFd, waker: &Waker) {
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            // `watch` says so.
            Err(_) => return,
        }
        if events.iter().any(|event| event.data.u64() == END) {
            return;
        }
        if !events.is_empty() {
            waker.wake_by_ref();
        }
    }
}
