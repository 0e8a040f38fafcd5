//! Get, list, watch: from the projection, never from the store.

use std::collections::BTreeMap;

use clawpot_core::event::Event;
use clawpot_core::ports::BoxStream;
use clawpot_types::{Error, Kind, Label, Result, Revision, VmId};
use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;

use super::Service;
use crate::records::{Changed, Row};

/// VMs on a page where the client does not say.
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

pub type Labels = BTreeMap<Label, Label>;

#[derive(Debug)]
pub struct Page {
    pub rows: Vec<(VmId, Row)>,
    /// Empty at the end.
    pub next: String,
}

impl Service {
    pub fn get(&self, vm: &str) -> Result<(VmId, Row)> {
        let id = self.records.find(vm)?;
        let row = self.records.get(&id).ok_or_else(|| Error::new(Kind::NotFound, format!("VM {id}: it is gone")))?;
        Ok((id, row))
    }

    /// In the order of ids; `size` 0 means 100, at most 1,000. A token of another store is refused.
    pub fn list(&self, labels: &Labels, size: usize, token: &str) -> Result<Page> {
        let after = self.read_token(token)?;
        let size = if size == 0 { DEFAULT_PAGE } else { size.min(MAX_PAGE) };
        let mut matching = self.records.rows_after(after.as_ref()).into_iter().filter(|(_, row)| matches(row, labels));
        let rows: Vec<_> = matching.by_ref().take(size).collect();
        let next = match (matching.next(), rows.last()) {
            (Some(_), Some((last, _))) => format!("{:x}.{last}", self.records.store().epoch()),
            _ => String::new(),
        };
        Ok(Page { rows, next })
    }

    fn read_token(&self, token: &str) -> Result<Option<VmId>> {
        if token.is_empty() {
            return Ok(None);
        }
        let refused =
            || Error::new(Kind::InvalidArgument, "page_token: not one of this store").hint("list from the start");
        let (epoch, last) = token.split_once('.').ok_or_else(refused)?;
        if u64::from_str_radix(epoch, 16).ok() != Some(self.records.store().epoch()) {
            return Err(refused());
        }
        last.parse().map(Some).map_err(|_| refused())
    }

    /// What is, then every change. Ends with `Compacted` for a watcher that is too slow.
    #[must_use]
    pub fn watch(&self, only: Option<VmId>, labels: Labels) -> BoxStream<Result<Changed>> {
        let mut changes = self.records.subscribe();
        let wanted = move |id: &VmId, labels: &Labels, changed: &Changed| {
            only.as_ref().is_none_or(|only| only == id)
                && match (&changed.row, &changed.last) {
                    (Some(row), _) => matches(row, labels),
                    (None, Some(last)) => subset(labels, &last.labels),
                    (None, None) => labels.is_empty(),
                }
        };
        let now: Vec<_> = self
            .records
            .rows_after(None)
            .into_iter()
            .map(|(id, row)| Changed { id, revision: row.revision(), row: Some(row), last: None })
            .filter(|changed| wanted(&changed.id, &labels, changed))
            .collect();
        // A change between subscribing and reading is in both; its revision tells.
        let seen: BTreeMap<VmId, Revision> = now.iter().map(|changed| (changed.id.clone(), changed.revision)).collect();
        let later = async_stream(async move |send| {
            loop {
                match changes.recv().await {
                    Ok(changed) if seen.get(&changed.id).is_some_and(|seen| *seen >= changed.revision) => {}
                    Ok(changed) if !wanted(&changed.id, &labels, &changed) => {}
                    Ok(changed) => {
                        if send.send(Ok(changed)).await.is_err() {
                            return;
                        }
                    }
                    Err(RecvError::Lagged(_)) => {
                        let slow =
                            Error::new(Kind::Compacted, "watch: this watcher is too slow").hint("list and watch again");
                        send.send(Err(slow)).await.unwrap_or_default();
                        return;
                    }
                    Err(RecvError::Closed) => return,
                }
            }
        });
        Box::pin(futures_util::stream::iter(now.into_iter().map(Ok)).chain(later))
    }

    pub async fn events(&self, vm: &str, after: Revision, limit: usize) -> Result<Vec<Event>> {
        let vm = self.event_filter(vm)?;
        let limit = if limit == 0 { DEFAULT_PAGE } else { limit.min(MAX_PAGE) };
        self.deps.events.list(vm.as_ref(), after, limit).await
    }

    pub async fn watch_events(&self, vm: &str, after: Revision) -> Result<BoxStream<Result<Event>>> {
        let vm = self.event_filter(vm)?;
        self.deps.events.watch(vm.as_ref(), after).await
    }

    /// Events outlive their VM: a full id is taken as it is.
    fn event_filter(&self, vm: &str) -> Result<Option<VmId>> {
        match vm {
            "" => Ok(None),
            text => self.records.find(text).or_else(|gone| text.parse().map_err(|_| gone)).map(Some),
        }
    }
}

fn matches(row: &Row, labels: &Labels) -> bool {
    match row {
        Row::Known { record, .. } => subset(labels, &record.labels),
        // Its labels cannot be read: shown wherever no labels are asked for.
        Row::Unreadable { .. } => labels.is_empty(),
    }
}

fn subset(asked: &Labels, has: &Labels) -> bool {
    asked.iter().all(|(key, value)| has.get(key) == Some(value))
}

/// A stream fed by a task through a bounded channel; the task ends with the stream.
pub(crate) fn async_stream<T, F>(feed: impl FnOnce(tokio::sync::mpsc::Sender<T>) -> F + Send + 'static) -> BoxStream<T>
where
    T: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (send, mut receive) = tokio::sync::mpsc::channel(16);
    let task = tokio::spawn(async move {
        let closed = send.clone();
        tokio::select! {
            biased;
            () = feed(send) => {}
            () = closed.closed() => {}
        }
    });
    let guard = AbortOnDrop(task);
    Box::pin(futures_util::stream::poll_fn(move |cx| {
        let _alive = &guard;
        receive.poll_recv(cx)
    }))
}

#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
