//! A device that is written outside the crate of kernels: it notes what its streams are asked for,
//! and has another device do it.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use pillion_kernels::{
    AdamW, AttentionShape, Buffer, Completion, Cpu, DType, Device, Documents, Error, Event, Failure, Kernels, Region,
    Status, Stream, View, ViewMut,
};

/// The names of the functions that streams of a [`Logged`] device were asked for, in order.
type Log = Arc<Mutex<Vec<&'static str>>>;

pub(crate) struct Logged {
    inner: Arc<dyn Device>,
    log: Log,
    waits: Arc<AtomicU64>,
}

struct LoggedStream {
    inner: Box<dyn Stream>,
    log: Log,
    waits: Arc<AtomicU64>,
}

/// An event of a [`Logged`] stream: counts how often a thread waits for it.
struct Watched {
    inner: Event,
    waits: Arc<AtomicU64>,
}

impl Completion for Watched {
    fn status(&self) -> Status {
        self.inner.status()
    }

    fn advance(&self) -> Status {
        self.inner.advance()
    }

    fn call_back(&self, waker: &Waker) {
        self.inner.call_back(waker);
    }

    fn wait(&self) -> Result<(), Failure> {
        self.waits.fetch_add(1, Ordering::Relaxed);
        self.inner.wait()
    }

    fn origin(&self) -> &dyn Any {
        self
    }
}

impl Default for Logged {
    fn default() -> Logged {
        Logged::over(Arc::new(Cpu))
    }
}

impl Logged {
    /// A device whose work `inner` does.
    pub(crate) fn over(inner: Arc<dyn Device>) -> Logged {
        Logged { inner, log: Log::default(), waits: Arc::default() }
    }

    /// How often threads have waited for events of its streams.
    pub(crate) fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// What its streams were asked for since the last call.
    pub(crate) fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.log.lock().expect("no rank panics with it"))
    }
}

// SAFETY: its streams and memory are those of another device.
unsafe impl Device for Logged {
    fn name(&self) -> &'static str {
        "logged"
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer, Error> {
        self.inner.allocate(dtype, len)
    }

    fn stream(&self) -> Box<dyn Stream> {
        Box::new(LoggedStream { inner: self.inner.stream(), log: self.log.clone(), waits: self.waits.clone() })
    }

    fn take_in(&self, region: Region) -> Result<Region, Error> {
        self.inner.take_in(region)
    }
}

impl LoggedStream {
    fn inner(&self, name: &'static str) -> &dyn Stream {
        self.log.lock().expect("no rank panics with it").push(name);
        &*self.inner
    }

    fn kernels(&self, name: &'static str) -> &dyn Kernels {
        self.inner(name).kernels().expect("Cpu has kernels")
    }
}

macro_rules! delegate {
    ($to:ident: $($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self, $($argument: $type),*) $(-> $result)? {
            LoggedStream::$to(self, stringify!($name)).$name($($argument),*)
        })*
    };
}

// SAFETY: the other device's stream keeps the promises, and is asked for the same in the same
// order. Its events stand behind the ones that are given out.
unsafe impl Stream for LoggedStream {
    fn record(&self) -> Event {
        Event::new(Arc::new(Watched { inner: self.inner("record").record(), waits: self.waits.clone() }))
    }

    delegate! { inner:
        wait_for(event: &Event);
        synchronize() -> Result<(), Failure>;
        host_waits() -> u64;
        upload_bytes(out: ViewMut<'_>, bytes: &[u8]);
        read_bytes(x: View<'_>, out: &mut [u8]) -> Result<(), Failure>;
        zero(out: ViewMut<'_>);
        cast(out: ViewMut<'_>, x: View<'_>);
        square_norm(out: ViewMut<'_>, x: View<'_>, weight: f64);
        copy(out: ViewMut<'_>, x: View<'_>);
        accumulate(out: ViewMut<'_>, x: View<'_>);
        adamw(
            weights: Option<ViewMut<'_>>,
            master: ViewMut<'_>,
            m: ViewMut<'_>,
            v: ViewMut<'_>,
            grad: View<'_>,
            scale: View<'_>,
            settings: AdamW,
            step: u64
        );
    }

    fn kernels(&self) -> Option<&dyn Kernels> {
        Some(self)
    }
}

impl Kernels for LoggedStream {
    delegate! { kernels:
        embedding(out: ViewMut<'_>, table: View<'_>, tokens: View<'_>);
        embedding_backward(grad_table: ViewMut<'_>, grad_out: View<'_>, tokens: View<'_>);
        rms_norm(out: ViewMut<'_>, inverse_rms: ViewMut<'_>, x: View<'_>, weight: View<'_>, epsilon: f32);
        rms_norm_backward(
            grad_x: ViewMut<'_>,
            grad_weight: ViewMut<'_>,
            grad_out: View<'_>,
            x: View<'_>,
            inverse_rms: View<'_>,
            weight: View<'_>
        );
        linear(y: ViewMut<'_>, x: View<'_>, w: View<'_>, addend: Option<View<'_>>, rows: usize);
        linear_backward_input(grad_x: ViewMut<'_>, grad_y: View<'_>, w: View<'_>, rows: usize, accumulate: bool);
        linear_backward_weight(grad_w: ViewMut<'_>, grad_y: View<'_>, x: View<'_>, rows: usize);
        rope(x: ViewMut<'_>, cos: View<'_>, sin: View<'_>, heads: usize, head_dim: usize, inverse: bool);
        attention(
            out: ViewMut<'_>,
            log_sum: ViewMut<'_>,
            q: View<'_>,
            k: View<'_>,
            v: View<'_>,
            shape: AttentionShape,
            documents: Option<&Documents>
        );
        attention_from(
            first: usize,
            out: ViewMut<'_>,
            q: View<'_>,
            k: View<'_>,
            v: View<'_>,
            shape: AttentionShape
        );
        attention_backward(
            grad_q: ViewMut<'_>,
            grad_k: ViewMut<'_>,
            grad_v: ViewMut<'_>,
            grad_out: View<'_>,
            q: View<'_>,
            k: View<'_>,
            v: View<'_>,
            out: View<'_>,
            log_sum: View<'_>,
            shape: AttentionShape,
            documents: Option<&Documents>
        );
        swiglu(out: ViewMut<'_>, gate: View<'_>, up: View<'_>);
        swiglu_backward(
            out: ViewMut<'_>,
            grad_gate: ViewMut<'_>,
            grad_up: ViewMut<'_>,
            grad_out: View<'_>,
            gate: View<'_>,
            up: View<'_>
        );
        cross_entropy(logits: ViewMut<'_>, rounded: Option<ViewMut<'_>>, targets: View<'_>, loss: ViewMut<'_>, z_loss: f32);
    }
}
