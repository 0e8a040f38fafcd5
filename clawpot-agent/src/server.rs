//! The gRPC service: wire in, the rooms behind it, wire out.

use std::pin::Pin;
use std::sync::Arc;

use clawpot_common::agent::v1::agent_server::{Agent, AgentServer};
use clawpot_common::agent::v1::{HelloRequest, HelloResponse, ShutdownRequest, ShutdownResponse};
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{ExecFailed, ExecInput, ExecOutput};
use clawpot_common::{CONNECTION_WINDOW, MAX_MESSAGE_BYTES, STREAM_WINDOW};
use futures_core::Stream;
use futures_util::{StreamExt, stream};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use crate::exec::attachment::{Output, attach};
use crate::exec::{Shared, failed};
use crate::hello::{self, Identity, Timings, WallClock};
use crate::shutdown::Stop;

/// Largest HTTP/2 frame that we take, bytes: a full chunk of exec data goes in one, header included.
const MAX_FRAME: u32 = 128 << 10;

/// Attachments on one connection.
const MAX_STREAMS: u32 = 4096;

/// What the calls act on.
#[derive(Debug)]
pub struct Service {
    pub identity: Identity,
    pub timings: Timings,
    pub clock: WallClock,
    pub execs: Arc<Shared>,
    /// Where a shutdown that was asked for is carried out.
    pub stop: mpsc::Sender<Stop>,
}

/// Serves whoever comes in until `incoming` ends. Straight from HTTP/2 to the service: what tonic's own server puts between
/// (routes, limits, deadlines of requests) has nothing to do here, and every exec of every guest would pay for it.
pub async fn serve<I, C>(service: Service, incoming: I) -> std::io::Result<()>
where
    I: Stream<Item = std::io::Result<C>>,
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let agent = AgentServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let agent = TowerToHyperService::new(agent);
    let mut incoming = std::pin::pin!(incoming);
    while let Some(connection) = incoming.next().await {
        let serving = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(MAX_STREAMS)
            .max_frame_size(MAX_FRAME)
            .serve_connection(TokioIo::new(connection?), agent.clone());
        // However a connection ends, its execs wait for the host's next one.
        tokio::spawn(async move { serving.await.unwrap_or_default() });
    }
    Ok(())
}

type ExecStream = Pin<Box<dyn Stream<Item = Result<ExecOutput, Status>> + Send>>;

#[tonic::async_trait]
impl Agent for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        hello::answer(request.get_ref(), &self.identity, &self.timings, self.clock).map(Response::new)
    }

    type ExecStream = ExecStream;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<ExecStream>, Status> {
        let output = match begin(&self.execs, request.into_inner()).await? {
            Ok(output) => output.boxed(),
            Err(failed) => stream::iter([Ok(ExecOutput { frame: Some(Out::Failed(failed)) })]).boxed(),
        };
        Ok(Response::new(output))
    }

    async fn shutdown(&self, request: Request<ShutdownRequest>) -> Result<Response<ShutdownResponse>, Status> {
        self.execs.close();
        // A second request while the first is under way changes nothing.
        if let Err(mpsc::error::TrySendError::Closed(_)) = self.stop.try_send(Stop::after(request.get_ref().grace_ms)) {
            return Err(Status::unavailable("the machine is shutting down"));
        }
        Ok(Response::new(ShutdownResponse {}))
    }
}

/// The first frame says which exec; the rest of the stream is the attachment's.
async fn begin(execs: &Arc<Shared>, mut input: Streaming<ExecInput>) -> Result<Result<Output, ExecFailed>, Status> {
    let Some(first) = input.message().await? else {
        return Err(Status::invalid_argument("the stream ended before its first frame: start or attach"));
    };
    Ok(match first.frame {
        Some(In::Start(start)) => execs.start(start).and_then(|exec| attach(&exec, [0, 0], input)),
        Some(In::Attach(at)) => {
            execs.get(&at.exec_id).and_then(|exec| attach(&exec, [at.stdout_offset, at.stderr_offset], input))
        }
        _ => {
            Err(failed(clawpot_common::v1::exec_failed::Reason::BadRequest, "the first frame must be start or attach"))
        }
    })
}
