//! Binds the functions of this folder to the trait [`Stream`]: checks shapes, and enqueues.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::team::{Read, Write};
use super::{HostStream, Input, SHARE, Work, adamw, maths, scratch, square_norm, vectorized};
use crate::shapes::{same, with_type};
use crate::{AdamW, DType, Event, Failure, Kernels, Stamp, Stream, Timed, View, ViewMut};

thread_local! {
    static NORMS: Cell<Vec<(f64, u64)>> = const { Cell::new(Vec::new()) };
}

/// When a thread came to a place in its work.
#[derive(Default)]
struct Passed(OnceLock<Instant>);

impl Timed for Passed {
    fn time(&self) -> Option<Instant> {
        self.0.get().copied()
    }
}

// SAFETY: a host stream runs its work in order: at once, after blocking for the event, or in its
// thread, where an event is work like any other and waiting for one holds up what follows.
unsafe impl Stream for HostStream {
    fn record(&self) -> Event {
        match (&self.lazy, self.failure.get()) {
            (Some(lazy), _) => lazy.record(),
            (None, Some(failure)) => Event::failed(failure.clone()),
            (None, None) => Event::PAST,
        }
    }

    fn stamp(&self) -> Stamp {
        if self.lazy.is_none() {
            return Stamp::now();
        }
        let passed = Arc::new(Passed::default());
        let stamp = passed.clone();
        self.run(Work::moves("stamp"), [], [], move |_, [], []| {
            let _ = stamp.0.set(Instant::now());
        });
        Stamp::new(passed)
    }

    fn wait_for(&self, event: &Event) {
        match &self.lazy {
            None => {
                if let Err(failure) = event.wait() {
                    self.failure.get_or_init(|| failure);
                }
            }
            Some(lazy) => lazy.wait_for(event),
        }
    }

    fn synchronize(&self) -> Result<(), Failure> {
        self.waits.set(self.waits.get() + 1);
        self.record().wait()
    }

    fn host_waits(&self) -> u64 {
        self.waits.get()
    }

    fn upload_bytes(&self, out: ViewMut<'_>, bytes: &[u8]) {
        assert_eq!(out.len() * out.dtype().bytes(), bytes.len(), "an upload fills its buffer");
        match self.lazy {
            None => self.run_now(Work::moves("upload"), [out], [], |_, [out], []| out.bytes().copy_from_slice(bytes)),
            Some(_) => {
                let bytes = bytes.to_vec();
                self.run(Work::moves("upload"), [out], [], move |_, [out], []| out.bytes().copy_from_slice(&bytes));
            }
        }
    }

    fn read_bytes(&self, x: View<'_>, out: &mut [u8]) -> Result<(), Failure> {
        assert_eq!(x.len() * x.dtype().bytes(), out.len(), "a download fills its destination");
        let work = Work::moves("download");
        if self.lazy.is_none() {
            self.waits.set(self.waits.get() + 1);
            self.run_now(work, [], [x], |_, [], [x]| out.copy_from_slice(x.bytes()));
            return self.failure.get().map_or(Ok(()), |failure| Err(failure.clone()));
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        self.run(work, [], [x], move |_, [], [x]| {
            // The receiver lives until the value has arrived, below.
            let _ = sender.send(x.bytes().to_vec());
        });
        self.synchronize()?;
        out.copy_from_slice(&receiver.recv().expect("the stream ran everything before its event"));
        Ok(())
    }

    fn zero(&self, out: ViewMut<'_>) {
        self.run(Work::moves("zero"), [out], [], |team, [out], []| {
            team.split(Write(out.bytes(), 1), SHARE, |Write(out, _)| out.fill(0));
        });
    }

    fn cast(&self, out: ViewMut<'_>, x: View<'_>) {
        same("cast", &[out.len(), x.len()]);
        let types = (out.dtype(), x.dtype());
        self.run(Work::moves("cast"), [out], [x], move |team, [out], [x]| match types {
            (DType::F32, DType::Bf16) => {
                let rows = (Write(out.of(), 1), Read(x.of(), 1));
                team.split(rows, SHARE, |(out, x)| maths::widen(out.0, x.0));
            }
            (DType::Bf16, DType::F32) => {
                let rows = (Write(out.of(), 1), Read(x.of(), 1));
                team.split(rows, SHARE, |(out, x)| maths::narrow(out.0, x.0));
            }
            (to, from) if to == from => out.bytes().copy_from_slice(x.bytes()),
            (to, from) => panic!("no cast from {from} to {to}"),
        });
    }

    fn square_norm(&self, out: ViewMut<'_>, x: View<'_>, weight: f64) {
        assert_eq!(out.len(), 2, "square_norm writes a sum and a count");
        let (dtype, parts) = (x.dtype(), x.len().div_ceil(square_norm::PART));
        self.run(Work::moves("square_norm"), [out], [x], move |team, [out], [x]| {
            scratch::with(&NORMS, parts, |norms| {
                with_type!(dtype, T => {
                    team.split((Write(&mut *norms, 1), Read(x.of::<T>(), square_norm::PART)), 1, |(norms, x)| {
                        vectorized(
                            #[inline(always)]
                            || square_norm::square_norms(norms.0, x.0),
                        );
                    });
                });
                let (sum, non_finite) = square_norm::total_square_norm(norms);
                out.of().copy_from_slice(&[weight * sum, non_finite as f64]);
            });
        });
    }

    fn copy(&self, out: ViewMut<'_>, x: View<'_>) {
        assert!(out.dtype() == x.dtype(), "a copy from {} to {}", x.dtype(), out.dtype());
        self.cast(out, x);
    }

    fn accumulate(&self, out: ViewMut<'_>, x: View<'_>) {
        same("accumulate", &[out.len(), x.len()]);
        self.run(Work::moves("accumulate"), [out], [x], |team, [out], [x]| {
            let rows = (Write(out.of::<f32>(), 1), Read(x.of::<f32>(), 1));
            team.split(rows, SHARE, |(out, x)| {
                vectorized(
                    #[inline(always)]
                    || out.0.iter_mut().zip(x.0).for_each(|(sum, &x)| *sum += x),
                );
            });
        });
    }

    fn adamw(
        &self,
        weights: Option<ViewMut<'_>>,
        master: ViewMut<'_>,
        m: ViewMut<'_>,
        v: ViewMut<'_>,
        grad: View<'_>,
        scale: View<'_>,
        settings: AdamW,
        step: u64,
    ) {
        same("adamw", &[master.len(), m.len(), v.len(), grad.len()]);
        assert!(scale.len() == 1, "adamw: a scale of {} numbers", scale.len());
        let (work, gradient) = (Work::moves("adamw"), grad.dtype());
        let update =
            move |scale: Input<'_>| adamw::Update::new(settings, step).of_gradients_times(scale.of::<f32>()[0]);
        let Some(weights) = weights else {
            return self.run(work, [master, m, v], [grad, scale], move |team, [master, m, v], [grad, scale]| {
                let update = update(scale);
                with_type!(gradient, G => {
                    let grad = Read(grad.of::<G>(), 1);
                    let rows = (Write(master.of(), 1), Write(m.of(), 1), Write(v.of(), 1), grad);
                    team.split(rows, SHARE, |(master, m, v, grad)| {
                        vectorized(#[inline(always)] || adamw::update(master.0, m.0, v.0, grad.0, update));
                    });
                });
            });
        };
        same("adamw weights", &[weights.len(), master.len()]);
        let dtype = weights.dtype();
        self.run(work, [weights, master, m, v], [grad, scale], move |team, [weights, master, m, v], [grad, scale]| {
            let update = update(scale);
            with_type!(dtype, W => with_type!(gradient, G => {
                let (weights, grad) = (Write(weights.of::<W>(), 1), Read(grad.of::<G>(), 1));
                let rows = (weights, Write(master.of(), 1), Write(m.of(), 1), Write(v.of(), 1), grad);
                team.split(rows, SHARE, |(weights, master, m, v, grad)| {
                    vectorized(
                        #[inline(always)]
                        || adamw::update_copied(weights.0, master.0, m.0, v.0, grad.0, update),
                    );
                });
            }));
        });
    }

    fn kernels(&self) -> Option<&dyn Kernels> {
        Some(self)
    }
}
