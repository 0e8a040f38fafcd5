//! What a guest's agent says: hello, and the frames of an exec. The guest is hostile.
//!
//! Input: eight bytes each for where stdout and stderr stand, then messages with their lengths, as in a gRPC stream.
//! Compiled into the fuzz target and into the test that replays its corpus.

use bytes::{Buf, Bytes};
use clawpot_agent_client::{Offsets, check_hello, check_output};
use clawpot_common::{agent, v1};
use clawpot_core::exec::{ExecOutput, Stream};
use prost::Message;

/// Most that one frame may carry, bytes (crates/agent-client/src/exec.rs).
const FRAME: u64 = 128 << 10;
/// Longest text of a guest that is handed on, characters.
const TEXT: usize = 500;

pub fn run(data: &[u8]) {
    if let Ok(answer) = agent::v1::HelloResponse::decode(data)
        && let Ok(hello) = check_hello(answer)
    {
        assert_eq!(hello.protocol, 1);
        assert!(is_clean(&hello.agent_version) && is_clean(&hello.kernel_release));
        assert!(hello.timings.len() <= 3);
    }
    let mut bytes = Bytes::copy_from_slice(data);
    if bytes.remaining() < 16 {
        return;
    }
    let mut at = Offsets { stdout: bytes.get_u64_le(), stderr: bytes.get_u64_le() };
    while let Ok(message) = v1::ExecOutput::decode_length_delimited(&mut bytes) {
        // After the first that breaks the rules nothing is read any more.
        let Ok((output, now)) = check_output(message, at) else { return };
        moved_as_told(&output, at, now);
        if matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed { .. }) {
            return;
        }
        at = now;
    }
}

/// Where the streams stand after a frame follows from where they stood and from the frame, and from nothing else.
fn moved_as_told(output: &ExecOutput, before: Offsets, after: Offsets) {
    let (stdout, stderr) = match output {
        ExecOutput::Stdout { offset, data } => {
            assert_eq!(*offset, before.stdout);
            assert!(data.len() as u64 <= FRAME);
            (before.stdout + data.len() as u64, before.stderr)
        }
        ExecOutput::Stderr { offset, data } => {
            assert_eq!(*offset, before.stderr);
            assert!(data.len() as u64 <= FRAME);
            (before.stdout, before.stderr + data.len() as u64)
        }
        ExecOutput::Lost { stream: Stream::Stdout, from, to } => {
            assert!(*from == before.stdout && to >= from);
            (*to, before.stderr)
        }
        ExecOutput::Lost { stream: Stream::Stderr, from, to } => {
            assert!(*from == before.stderr && to >= from);
            (before.stdout, *to)
        }
        ExecOutput::Failed { message, .. } => {
            assert!(is_clean(message));
            (before.stdout, before.stderr)
        }
        _ => (before.stdout, before.stderr),
    };
    assert_eq!((after.stdout, after.stderr), (stdout, stderr), "{output:?}");
}

fn is_clean(text: &str) -> bool {
    text.chars().count() <= TEXT && !text.chars().any(char::is_control)
}
