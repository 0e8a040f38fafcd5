//! Progress of long work: a few messages a second, none of which holds the work up.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use clawpot_core::ports::{BoxStream, ImageDetail, ImageProgress, ImageStep};
use clawpot_types::Result;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// Between two messages about the same thing.
const EVERY: Duration = Duration::from_millis(200);
/// Messages that wait for a slow client; more are dropped.
const BACKLOG: usize = 64;

/// Where progress is told.
#[derive(Clone, Debug)]
pub struct Teller(mpsc::Sender<Result<ImageProgress>>);

/// One thing that is being done.
#[derive(Debug)]
pub struct Meter {
    teller: Teller,
    id: String,
    total: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    doing: &'static str,
    since: Instant,
    from: u64,
    told: Option<Instant>,
}

impl Teller {
    #[must_use]
    pub fn meter(&self, id: &str, total: u64) -> Meter {
        let state = State { doing: "", since: Instant::now(), from: 0, told: None };
        Meter { teller: self.clone(), id: id.to_owned(), total, state: Mutex::new(state) }
    }
}

impl Meter {
    pub fn done(&self) {
        self.at("done", self.total);
    }

    /// `bytes` of the total are done. What is new is told at once, the rest now and then.
    pub fn at(&self, doing: &'static str, bytes: u64) {
        let Ok(mut state) = self.state.lock() else { return };
        let now = Instant::now();
        if state.doing != doing {
            *state = State { doing, since: now, from: bytes, told: None };
        }
        if bytes < self.total && state.told.is_some_and(|told| now.duration_since(told) < EVERY) {
            return;
        }
        state.told = Some(now);
        let millis = u64::try_from(now.duration_since(state.since).as_millis()).unwrap_or(u64::MAX).max(1);
        let rate = bytes.saturating_sub(state.from).saturating_mul(1000) / millis;
        let step = ImageStep {
            id: self.id.clone(),
            doing: doing.to_owned(),
            bytes,
            total_bytes: self.total,
            bytes_per_second: rate,
        };
        // Full: somebody reads slowly and learns the next number.
        self.teller.0.try_send(Ok(ImageProgress::Step(step))).unwrap_or_default();
    }
}

/// Runs `work` as a stream of what it tells, ended by its result. Dropping the stream drops the work.
pub fn stream<F>(work: impl FnOnce(Teller) -> F) -> BoxStream<Result<ImageProgress>>
where
    F: Future<Output = Result<ImageDetail>> + Send + 'static,
{
    let (send, mut receive) = mpsc::channel(BACKLOG);
    let work = work(Teller(send.clone()));
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        let last = work.await.map(|detail| ImageProgress::Done(Box::new(detail)));
        // Nobody listens: nobody needs to know.
        send.send(last).await.unwrap_or_default();
    }));
    Box::pin(futures_util::stream::poll_fn(move |cx| {
        let _alive = &task;
        receive.poll_recv(cx)
    }))
}
