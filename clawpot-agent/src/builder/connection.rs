//! One connection: requests in, answers and the lines of a build out, in bounds whatever the other side does.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use clawpot_common::builder::{Line, Lines, MAX_LINE, Request, Response, decode, encode};
use futures_core::Stream;
use futures_util::StreamExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

use super::Builder;
use super::build::{Order, run};

/// Answers on their way: a host that reads slowly slows the build down.
const ANSWERS: usize = 64;
/// Read at once, bytes.
const BUFFER: usize = 16 << 10;
/// How long a host that has said its last still gets answers.
const LINGER: Duration = Duration::from_secs(5);

/// Serves whoever comes in until `incoming` ends.
pub async fn serve<I, C>(builder: Arc<Builder>, incoming: I) -> io::Result<()>
where
    I: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Send + 'static,
{
    let mut incoming = std::pin::pin!(incoming);
    while let Some(connection) = incoming.next().await {
        let connection = connection?;
        // One too many is closed.
        let Ok(permit) = builder.connections.clone().try_acquire_owned() else { continue };
        let builder = builder.clone();
        tokio::spawn(async move {
            converse(&builder, connection).await;
            drop(permit);
        });
    }
    Ok(())
}

async fn converse<C: AsyncRead + AsyncWrite>(builder: &Arc<Builder>, connection: C) {
    let (from, to) = tokio::io::split(connection);
    let (answers, queue) = mpsc::channel(ANSWERS);
    let mut writing = std::pin::pin!(write(to, queue));
    tokio::select! {
        () = &mut writing => {}
        // Whether it ended or broke: with it goes the build that it asked for.
        _ = read(builder, from, answers) => {
            tokio::time::timeout(LINGER, writing).await.unwrap_or_default();
        }
    }
}

/// Until nobody has anything to say any more, or nobody listens.
async fn write(mut to: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Response>) {
    while let Some(response) = queue.recv().await {
        let Ok(line) = encode(&response) else { continue };
        if to.write_all(&line).await.is_err() || (queue.is_empty() && to.flush().await.is_err()) {
            return;
        }
    }
}

/// Until the host hangs up. Its build is cancelled by what is dropped then.
async fn read(builder: &Arc<Builder>, mut from: impl AsyncRead + Unpin, answers: mpsc::Sender<Response>) -> Option<()> {
    let (mut lines, mut buffer) = (Lines::default(), vec![0; BUFFER]);
    // Held, not used: dropped with this function.
    let mut build = None;
    loop {
        let count = from.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
        let mut input = buffer.get(..count)?;
        while let Some(line) = lines.next(&mut input) {
            let answer = match request(line) {
                Ok(Request::Ping) => Some(Response::Pong),
                Ok(request @ Request::Build { .. }) => match begin(builder, request, &answers) {
                    Ok(hold) => {
                        build = Some(hold);
                        None
                    }
                    Err(refused) => Some(refused),
                },
                Err(refused) => Some(refused),
            };
            if let Some(answer) = answer {
                answers.send(answer).await.ok()?;
            }
        }
        // A build that has ended is not held on to.
        build = build.filter(|hold: &oneshot::Sender<()>| !hold.is_closed());
    }
}

fn request(line: Line) -> Result<Request, Response> {
    let message = match line {
        Line::TooLong => format!("a line longer than {MAX_LINE} bytes"),
        Line::Whole(line) => match decode::<Request>(&line) {
            Ok(request) => match request.check() {
                Ok(()) => return Ok(request),
                Err(refused) => refused.to_string(),
            },
            Err(error) => format!("not a request: {error}"),
        },
    };
    Err(Response::Err { message })
}

/// Starts a build, unless there is one. It goes on for as long as what this returns is held.
fn begin(
    builder: &Arc<Builder>,
    request: Request,
    answers: &mpsc::Sender<Response>,
) -> Result<oneshot::Sender<()>, Response> {
    let Ok(permit) = builder.building.clone().try_acquire_owned() else {
        let message = "a build is already running here, and one runs at a time; ask again when it has ended";
        return Err(Response::Err { message: message.to_owned() });
    };
    let (hold, cancel) = oneshot::channel();
    let order = Order::new(request, answers.clone(), cancel);
    let builder = builder.clone();
    tokio::spawn(async move { run(&builder, order, permit).await });
    Ok(hold)
}
