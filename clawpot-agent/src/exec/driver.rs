//! The task behind one exec: pipes to rings, stdin to the process, its timeout, its end.

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use clawpot_common::v1::ExecExited;
use clawpot_common::v1::exec_exited;
use clawpot_common::v1::exec_lost::Stream as Which;
use futures_util::future::join;
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::io::{Io, end_of_terminal};
use super::resource::{Exec, index};
use crate::reaper::{End, Exit};

/// How long output is awaited after the main process has ended, while someone still holds the other ends.
const DRAIN: Duration = Duration::from_millis(200);

/// Most that is taken at the end beyond a ring's limit, bytes: what a pipe holds.
const LAST: usize = 1 << 20;

/// End of input on a terminal (VEOF): it has no other end of file.
const CTRL_D: u8 = 4;

/// Our ends.
#[derive(Debug)]
pub struct Pipes {
    pub stdin: Option<Arc<Io>>,
    pub stdout: Option<Arc<Io>>,
    /// None with a terminal.
    pub stderr: Option<Arc<Io>>,
}

/// Runs until the exec has ended and all its output is in the rings.
pub async fn drive(exec: &Arc<Exec>, pipes: Pipes, mut exit: oneshot::Receiver<Exit>, limit: Option<Duration>) {
    let deadline = limit.map(|limit| Instant::from_std(exec.started) + limit);
    let pumps = async {
        join(pump(exec, Which::Stdout, pipes.stdout.as_deref()), pump(exec, Which::Stderr, pipes.stderr.as_deref()))
            .await;
    };
    let mut pumps = pin!(pumps);
    let mut pumped = false;
    let mut timed_out = false;
    let exit = {
        let mut feeder = pin!(feed(exec, pipes.stdin));
        loop {
            tokio::select! {
                biased;
                exit = &mut exit => break exit,
                () = &mut pumps, if !pumped => pumped = true,
                never = &mut feeder => match never {},
                () = expired(deadline), if !timed_out => {
                    timed_out = true;
                    exec.kill();
                }
            }
        }
    };
    if !pumped {
        last_of(exec, Which::Stdout, pipes.stdout.as_deref());
        last_of(exec, Which::Stderr, pipes.stderr.as_deref());
        // Only those who wait for output of the descendants lose by the limit: the process's own is in the rings.
        timeout(DRAIN, pumps).await.unwrap_or_default();
    }
    finish(exec, exit.ok(), timed_out);
    // The caller's last frames leave before the pipes are closed and the cgroup is removed.
    tokio::task::yield_now().await;
}

async fn expired(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

/// From the pipe to the ring until the end of the pipe; stands still while the ring is full.
async fn pump(exec: &Exec, which: Which, pipe: Option<&Io>) {
    let Some(pipe) = pipe else { return };
    loop {
        let room = room(exec, which).await;
        let scratch = &exec.shared.scratch;
        let result = pipe
            .read_with(|fd| {
                let mut scratch = crate::lock(scratch);
                let size = room.min(scratch.len());
                let count = end_of_terminal(rustix::io::read(fd, &mut scratch[..size]))?;
                exec.state().wrote(which, &scratch[..count]);
                Ok(count)
            })
            .await;
        // A pipe that cannot be read has no more output for anyone.
        if !matches!(result, Ok(1..)) {
            return;
        }
    }
}

/// Bytes that may be read, once that is any.
async fn room(exec: &Exec, which: Which) -> usize {
    loop {
        let deadline = match exec.state().room(which) {
            Ok(room) => return room,
            Err(deadline) => deadline,
        };
        let changed = exec.room[index(which)].notified();
        match deadline {
            // Either way the state is looked at again.
            Some(deadline) => timeout_at(deadline, changed).await.unwrap_or_default(),
            None => changed.await,
        }
    }
}

/// What was in the pipe when the process ended, whether or not the ring has room.
fn last_of(exec: &Exec, which: Which, pipe: Option<&Io>) {
    let Some(pipe) = pipe else { return };
    let there = rustix::io::ioctl_fionread(pipe).ok().and_then(|there| usize::try_from(there).ok());
    let mut left = there.unwrap_or(0).min(LAST);
    while left > 0 {
        let mut scratch = crate::lock(&exec.shared.scratch);
        let size = left.min(scratch.len());
        match rustix::io::read(pipe, &mut scratch[..size]) {
            Ok(count @ 1..) => {
                exec.state().wrote(which, &scratch[..count]);
                left -= count;
            }
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return,
        }
    }
}

/// From the queue to the process; never returns, since its end is not the exec's.
async fn feed(exec: &Exec, pipe: Option<Arc<Io>>) -> Infallible {
    if let Some(pipe) = pipe {
        let is_terminal = exec.terminal.is_some();
        while !exhausted(exec, is_terminal).await {
            let result = pipe
                .write_with(|fd| {
                    let mut state = exec.state();
                    let queue = &mut state.stdin.queue;
                    let written = rustix::io::write(fd, queue.front())?;
                    // What was written came from the queue's front.
                    queue.ack(queue.base() + super::ring::wide(written)).map_err(|_| Errno::INVAL)?;
                    state.wake();
                    Ok(written)
                })
                .await;
            if result.is_err() {
                break;
            }
        }
        let mut state = exec.state();
        state.stdin.close();
        state.wake();
    }
    pending().await
}

/// Waits until there is something to write (`false`), or nothing will come any more.
async fn exhausted(exec: &Exec, is_terminal: bool) -> bool {
    loop {
        {
            let mut state = exec.state();
            let stdin = &mut state.stdin;
            if !stdin.queue.is_empty() {
                return false;
            }
            if stdin.ended && is_terminal && !stdin.closed {
                // Not part of the caller's stream: it has no offset. A full terminal loses it, as it does keys.
                if let Some(terminal) = &exec.terminal {
                    rustix::io::write(terminal.as_ref(), &[CTRL_D]).unwrap_or_default();
                }
            }
            if stdin.ended {
                return true;
            }
        }
        exec.stdin.notified().await;
    }
}

fn finish(exec: &Exec, exit: Option<Exit>, timed_out: bool) {
    let (end, at) = match exit {
        Some(Exit { end: End::Code(code), at }) => (exec_exited::End::Code(code), at),
        Some(Exit { end: End::Signal(signal), at }) => (exec_exited::End::Signal(signal), at),
        // The reaper never drops a waiter untold; if it did, the process is gone all the same.
        None => (exec_exited::End::Signal(libc::SIGKILL), std::time::Instant::now()),
    };
    let elapsed = at.saturating_duration_since(exec.started);
    let mut state = exec.state();
    state.stdin.close();
    state.end = Some(ExecExited {
        end: Some(end),
        timed_out,
        spawn_to_exit_us: u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX),
        stdout_bytes: state.output[0].end(),
        stderr_bytes: state.output[1].end(),
    });
    state.output.iter_mut().for_each(super::ring::Ring::shrink);
    state.wake();
}
