//! The letterbox: the generated protocol and the client's side of it.
//!
//! - [`v1`] the public API, [`agent`] host ↔ guest; wire types stop at the doors of the crates that use them.
//! - [`builder`] the lines that a builder VM speaks; no protobuf.
//! - [`client`] reaches a server over its Unix socket.

pub mod builder;
pub mod client;

/// The public API, `clawpot.v1`.
#[allow(missing_debug_implementations, clippy::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("clawpot.v1");
}

/// Host ↔ guest agent, `clawpot.agent.v1`.
pub mod agent {
    #[allow(missing_debug_implementations, clippy::all, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("clawpot.agent.v1");
    }
}

/// Encoded `FileDescriptorSet` of every proto file, for reflection and SDKs.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Port of the guest agent: vsock, or TCP on the management NIC under QEMU.
pub const AGENT_PORT: u32 = 10051;

/// Highest host ↔ guest protocol version this build speaks.
pub const AGENT_PROTOCOL: u32 = 1;

/// Largest message of the host ↔ guest protocol, bytes: an `ExecStart` with the 6 MiB that the kernel allows in
/// arguments and environment, and room for framing.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// HTTP/2 windows, bytes: per stream and per connection. Constant memory whatever flows.
pub const STREAM_WINDOW: u32 = 256 << 10;
pub const CONNECTION_WINDOW: u32 = 16 << 20;

/// Largest chunk of exec data in one frame, bytes.
pub const EXEC_CHUNK: usize = 64 << 10;

/// Standard input that may be on its way without acknowledgement, bytes: its sender waits for a `stdin_ack` beyond that, so
/// that acknowledgements, signals and the hang-up behind it in the same stream are never held up by a process that does
/// not read. The guest refuses more than twice this.
pub const STDIN_WINDOW: usize = 256 << 10;
