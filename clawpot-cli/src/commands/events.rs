//! `clawpot events`.

use clawpot_common::v1::{Event, ListEventsRequest, WatchEventsRequest};
use tonic::{Code, Status};

use super::Outcome;
use crate::api::{Api, Backoff, RECONNECT, is_lost, retrying};
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::event::{EventView, HEADER, line};

/// Events asked for at once; the most that the server gives.
const PAGE: u32 = 1_000;

/// Show what happened, oldest first; with `-o json` one event per line
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with what happens, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only those of this VM: its name, id, or the beginning of its id
    vm: Option<String>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let feed = Feed { api: global.api().await?, format: global.output, vm: args.vm.unwrap_or_default() };
    if !args.follow {
        feed.list(0).await?;
        return Ok(0);
    }
    tokio::select! {
        result = feed.follow() => result,
        _ = tokio::signal::ctrl_c() => Ok(0),
    }
}

struct Feed {
    api: Api,
    format: Format,
    vm: String,
}

/// How far a follower has come. What one change tells of has one id in all its events (`vm.phase` and `vm.exit`, say), and a
/// connection may break between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reached {
    id: u64,
    /// Events of that id that were shown; `None`: all there are.
    shown: Option<u64>,
}

impl Reached {
    fn all_of(id: u64) -> Self {
        Self { id, shown: None }
    }

    /// The id behind which a stream is to begin.
    fn asked_after(self) -> u64 {
        self.shown.map_or(self.id, |_| self.id.saturating_sub(1))
    }

    /// How many events of [`Self::id`] such a stream begins with that were shown already.
    fn again(self) -> u64 {
        self.shown.unwrap_or(0)
    }

    fn pass(&mut self, id: u64) {
        let before = if id == self.id { self.shown.unwrap_or(0) } else { 0 };
        *self = Self { id, shown: Some(before + 1) };
    }
}

impl Feed {
    /// Shows everything kept after event `after`; the id of the last one.
    async fn list(&self, mut after: u64) -> Result<u64, Failure> {
        // Of a VM that there is not, nothing is shown.
        let mut headed = after > 0 || self.format != Format::Table;
        loop {
            let request = ListEventsRequest { vm: self.vm.clone(), after_id: after, page_size: PAGE };
            let page = retrying("listing events", || {
                let (mut client, request) = (self.api.events(), request.clone());
                async move { client.list_events(request).await }
            });
            let events = page.await?.events;
            if !std::mem::replace(&mut headed, true) {
                output::line(HEADER)?;
            }
            let Some(last) = events.last().map(|event| event.id).filter(|last| *last > after) else {
                return Ok(after);
            };
            events.iter().try_for_each(|event| self.show(event))?;
            after = last;
        }
    }

    /// Never returns but for a failure. A lost server is looked for again; no event is shown twice, and none is left out.
    async fn follow(&self) -> Outcome {
        let mut reached = Reached::all_of(self.list(0).await?);
        let mut backoff = Backoff::new(RECONNECT);
        loop {
            let before = reached;
            let status = match self.watch(&mut reached).await {
                Ok(status) => status,
                Err(failure) => return Err(failure),
            };
            if reached != before {
                backoff = Backoff::new(RECONNECT);
            }
            if status.code() == Code::OutOfRange {
                output::note("some events are no longer kept and are missing here");
                reached = Reached::all_of(self.list(reached.id).await?);
            }
            match backoff.pause().filter(|_| is_lost(&status) || status.code() == Code::OutOfRange) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(Failure::status("following events", &status)),
            }
        }
    }

    /// Shows events as they come; the status with which the stream ended.
    async fn watch(&self, reached: &mut Reached) -> Result<Status, Failure> {
        let request = WatchEventsRequest { vm: self.vm.clone(), after_id: reached.asked_after() };
        let mut events = match self.api.events().watch_events(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return Ok(status),
        };
        let mut again = reached.again();
        loop {
            match events.message().await {
                // Shown before the connection broke.
                Ok(Some(event)) if event.id == reached.id && again > 0 => again -= 1,
                Ok(Some(event)) => {
                    self.show(&event)?;
                    reached.pass(event.id);
                }
                Ok(None) => return Ok(Status::unavailable("the server closed the stream")),
                Err(status) => return Ok(status),
            }
        }
    }

    fn show(&self, event: &Event) -> Result<(), Failure> {
        match self.format {
            Format::Table => output::line(&line(event)),
            Format::Json => output::json_line(&EventView::from(event)),
        }
    }
}
