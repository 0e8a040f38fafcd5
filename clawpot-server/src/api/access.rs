//! Who may call. Today there is one way in, a Unix socket that only root and its group can open (0660); the kernel tells
//! who is at the other end, and every change is recorded under that name.

use tonic::Request;
use tonic::transport::server::UdsConnectInfo;

/// "uid=1000", as the kernel says (`SO_PEERCRED`).
pub fn actor<T>(request: &Request<T>) -> String {
    match request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred) {
        Some(peer) => format!("uid={}", peer.uid()),
        None => "unknown".to_owned(),
    }
}
