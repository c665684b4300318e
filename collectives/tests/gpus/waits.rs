//! Each wait of a stream is needed: with one left out, other numbers arrive.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use pillion_collectives::{Options, Reduction};
use pillion_kernels::{Buffer, DType, Device, Event, random};

use crate::gate::Gate;
use crate::{Rank, numbers, run, standin};

/// How often [`take_turns`] calls each operation.
pub(crate) const TURNS: usize = 4;
const LEN: usize = 900;

/// Holds streams up here and there, by chance, so that what does not wait for them runs ahead.
pub(crate) struct Delays {
    seed: u64,
    held: Sender<Arc<Gate>>,
}

impl Delays {
    /// None, for ranks that are processes, which notice in other ways as well.
    pub(crate) fn none() -> Option<Delays> {
        None
    }

    /// Others for each seed. The other end is for [`open`].
    fn by_chance(seed: u64) -> (Option<Delays>, Receiver<Arc<Gate>>) {
        let (held, gates) = channel();
        (Some(Delays { seed, held }), gates)
    }

    /// An event that ends a little later, or has ended.
    fn event(&self, place: usize) -> Event {
        if random::bits(self.seed, 1, place as u64) & 1 == 0 {
            return Event::PAST;
        }
        let gate = Gate::new();
        self.held.send(gate.clone()).expect("the other end lives as long as the rank");
        Event::new(gate)
    }
}

/// Ends the events one after the other.
fn open(gates: Receiver<Arc<Gate>>) {
    for gate in gates {
        std::thread::sleep(Duration::from_millis(1));
        gate.end(Ok(()));
    }
}

/// Broadcasts and sums, one behind the other, and overwrites what they leave at once. Where a number
/// is another, the turn is the error.
pub(crate) fn take_turns(rank: &Rank, world: usize, delays: Option<Delays>) -> Result<(), usize> {
    let stream = rank.gpu.stream();
    let seed = |rank: usize, turn: usize| (10 * rank + turn) as u64;
    let delay = |place: usize| delays.as_ref().map_or(Event::PAST, |delays| delays.event(place));
    let mut found = Vec::new();
    let mut keep = |mut buffer: Buffer| {
        let mut kept = rank.gpu.allocate(DType::F32, LEN).unwrap();
        stream.copy(kept.view_mut(), buffer.view());
        // Whoever still reads it reads something else.
        stream.zero(buffer.view_mut());
        found.push(kept);
    };
    for turn in 0..TURNS {
        let own = || numbers(&*stream, &rank.gpu, DType::F32, LEN, seed(rank.number, turn));
        let after = |place: usize| Event::all([stream.record(), delay(4 * turn + place)]);
        stream.wait_for(&delay(4 * turn));
        keep(rank.gpus.broadcast(own(), turn % world, after(1)).then(&*stream).unwrap());
        stream.wait_for(&delay(4 * turn + 2));
        keep(rank.gpus.all_reduce(own(), Reduction::Sum, after(3)).then(&*stream).unwrap());
    }
    for (turn, found) in found.chunks(2).enumerate() {
        let of = |rank: usize, index: u64| random::normal(7, seed(rank, turn), index) as f32;
        let sent = |index: u64| of(turn % world, index);
        let summed = |index: u64| (0..world).map(|rank| of(rank, index)).sum::<f32>();
        let expected: [Vec<f32>; 2] = [(0..LEN as u64).map(sent).collect(), (0..LEN as u64).map(summed).collect()];
        let found: Vec<Vec<f32>> = found.iter().map(|buffer| stream.download(buffer.view()).unwrap()).collect();
        if found != expected {
            return Err(turn);
        }
    }
    Ok(())
}

/// Two ranks that are threads, of which `victim` leaves its wait number `number` out: how many waits
/// it had, and whether a rank had other numbers.
fn leave_out(victim: usize, number: i64, seed: u64) -> (u64, bool) {
    const WAIT: &str = "event wait";
    standin::reset(seed);
    let ended = run(2, Options::default(), |rank: &Rank| {
        if rank.number == victim {
            standin::skip_here(WAIT, number);
        }
        let (delays, gates) = Delays::by_chance(2 * seed + rank.number as u64);
        let opener = std::thread::spawn(|| open(gates));
        let result = take_turns(rank, 2, delays);
        opener.join().unwrap();
        let waits = if rank.number == victim { standin::skip_here(WAIT, -1) } else { 0 };
        (waits, result.is_err())
    });
    (ended[victim].0, ended.iter().any(|&(_, differs)| differs))
}

#[test]
fn every_wait_of_ranks_that_are_threads_is_needed() {
    if !standin::is_there() {
        return;
    }
    let (waits, differs) = leave_out(0, -1, 1);
    assert!(!differs && waits >= TURNS as u64 * 2, "{waits} waits");
    // What a wait protects, it may protect on one of the two ranks alone.
    let is_noticed = |number: i64, seed: u64| leave_out(seed as usize % 2, number, seed).1;
    let unneeded = (0..waits as i64).filter(|&number| !(0..400).any(|seed| is_noticed(number, seed)));
    assert_eq!(unneeded.collect::<Vec<_>>(), [0i64; 0], "of {waits} waits, nobody notices that these are left out");
}
