//! Reaching a server over its Unix socket.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::{CONNECTION_WINDOW, STREAM_WINDOW};

/// Why no server could be reached.
#[derive(Debug, thiserror::Error)]
#[error("no server answers on {socket}")]
pub struct Unreachable {
    pub socket: PathBuf,
    #[source]
    pub source: tonic::transport::Error,
}

/// An HTTP/2 channel to the server on the Unix socket at `socket`, connected.
pub async fn connect(socket: &Path) -> Result<Channel, Unreachable> {
    let path = socket.to_path_buf();
    // The URI is never resolved: the connector below ignores it.
    Endpoint::from_static("http://clawpot.invalid")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|source| Unreachable { socket: socket.to_path_buf(), source })
}
