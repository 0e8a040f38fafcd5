//! What can be waited for while attached. Everything here may be dropped and asked again at any time.

use std::pin::Pin;
use std::time::Instant;

use bytes::Bytes;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::{ExecInput, ExecOutput};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::inbox::Stream;
use crate::api::Api;

type Opening = Pin<Box<dyn Future<Output = Result<Response<Streaming<ExecOutput>>, Status>>>>;

/// The stream of the guest's frames: being opened, then open.
pub enum Inbound {
    Opening(Opening),
    Open(Box<Streaming<ExecOutput>>),
}

impl Inbound {
    /// Opens the stream whose input is what `input` gives.
    pub fn open(api: &Api, input: mpsc::Receiver<ExecInput>) -> Self {
        let mut vms = api.vms();
        Self::Opening(Box::pin(async move { vms.exec(ReceiverStream::new(input)).await }))
    }

    pub async fn next(&mut self) -> Result<Option<ExecOutput>, Status> {
        if let Self::Opening(opening) = self {
            *self = Self::Open(Box::new(opening.await?.into_inner()));
        }
        match self {
            Self::Open(frames) => frames.message().await,
            Self::Opening(_) => Ok(None),
        }
    }
}

/// Ready when the writer has room, or has given up.
pub async fn room(chunks: Option<mpsc::Sender<(Stream, Bytes)>>) {
    if let Some(chunks) = chunks
        && chunks.reserve().await.is_err()
    {
        // It says itself why it gave up.
    }
}

/// The next chunk of standard input, `None` once at its end; then never anything.
pub async fn read(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match stdin {
        Some(chunks) => chunks.recv().await,
        None => std::future::pending().await,
    }
}

pub async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

pub fn frame(frame: In) -> ExecInput {
    ExecInput { frame: Some(frame) }
}
