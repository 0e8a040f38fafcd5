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
    if feed.format == Format::Table {
        output::line(HEADER)?;
    }
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

impl Feed {
    /// Shows everything kept after event `after`; the id of the last one.
    async fn list(&self, mut after: u64) -> Result<u64, Failure> {
        loop {
            let request = ListEventsRequest { vm: self.vm.clone(), after_id: after, page_size: PAGE };
            let page = retrying("listing events", || {
                let (mut client, request) = (self.api.events(), request.clone());
                async move { client.list_events(request).await }
            });
            let events = page.await?.events;
            let Some(last) = events.last().map(|event| event.id).filter(|last| *last > after) else {
                return Ok(after);
            };
            events.iter().try_for_each(|event| self.show(event))?;
            after = last;
        }
    }

    /// Never returns but for a failure. A lost server is looked for again; no event is shown twice.
    async fn follow(&self) -> Outcome {
        let mut after = self.list(0).await?;
        let mut backoff = Backoff::new(RECONNECT);
        loop {
            let before = after;
            let status = match self.watch(&mut after).await {
                Ok(status) => status,
                Err(failure) => return Err(failure),
            };
            if after > before {
                backoff = Backoff::new(RECONNECT);
            }
            if status.code() == Code::OutOfRange {
                output::note("some events are no longer kept and are missing here");
                after = self.list(after).await?;
            }
            match backoff.pause().filter(|_| is_lost(&status) || status.code() == Code::OutOfRange) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(Failure::status("following events", &status)),
            }
        }
    }

    /// Shows events as they come; the status with which the stream ended.
    async fn watch(&self, after: &mut u64) -> Result<Status, Failure> {
        let request = WatchEventsRequest { vm: self.vm.clone(), after_id: *after };
        let mut events = match self.api.events().watch_events(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return Ok(status),
        };
        loop {
            match events.message().await {
                Ok(Some(event)) if event.id > *after => {
                    self.show(&event)?;
                    *after = event.id;
                }
                Ok(Some(_)) => {}
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
