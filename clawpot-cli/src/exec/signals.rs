//! Signals to this program, and what they mean to the process in the guest.

use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal as Source, SignalKind, signal};

use super::end;
use crate::failure::Failure;

/// A second Ctrl-C within this time ends the process instead of asking it.
const TWICE_WITHIN: Duration = Duration::from_secs(2);

pub const SIGINT: i32 = 2;
pub const SIGPIPE: i32 = 13;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// To be forwarded.
    Number(i32),
    /// The terminal changed its size.
    Resize,
}

/// Every signal that is not ours to act on.
#[derive(Debug)]
pub struct Signals {
    interrupt: Source,
    terminate: Source,
    hangup: Source,
    quit: Source,
    user1: Source,
    user2: Source,
    window: Source,
}

impl Signals {
    pub fn listen() -> Result<Self, Failure> {
        let on = |kind| {
            signal(kind).map_err(|error| Failure::new("this program: listening for signals").because(error.to_string()))
        };
        Ok(Self {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            quit: on(SignalKind::quit())?,
            user1: on(SignalKind::user_defined1())?,
            user2: on(SignalKind::user_defined2())?,
            window: on(SignalKind::window_change())?,
        })
    }

    pub async fn next(&mut self) -> Signal {
        let number = |kind: SignalKind| Signal::Number(kind.as_raw_value());
        tokio::select! {
            _ = self.interrupt.recv() => number(SignalKind::interrupt()),
            _ = self.terminate.recv() => number(SignalKind::terminate()),
            _ = self.hangup.recv() => number(SignalKind::hangup()),
            _ = self.quit.recv() => number(SignalKind::quit()),
            _ = self.user1.recv() => number(SignalKind::user_defined1()),
            _ = self.user2.recv() => number(SignalKind::user_defined2()),
            _ = self.window.recv() => Signal::Resize,
        }
    }

    /// Waits until this program is asked to end, before there is a process that could be told; the exit code that tells of it.
    pub async fn asked_to_end(&mut self) -> u8 {
        loop {
            if let Signal::Number(signal) = self.next().await {
                return end::of_signal(signal);
            }
        }
    }
}

/// Counts Ctrl-C.
#[derive(Debug, Default)]
pub struct Interrupts {
    last: Option<Instant>,
}

impl Interrupts {
    /// Whether this one comes so soon after the last that the process shall end.
    pub fn is_second(&mut self, now: Instant) -> bool {
        let last = self.last.replace(now);
        last.is_some_and(|last| now.saturating_duration_since(last) <= TWICE_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_interrupt_within_two_seconds_is_meant() {
        let (mut interrupts, start) = (Interrupts::default(), Instant::now());
        let mut at = |ms| interrupts.is_second(start + Duration::from_millis(ms));
        assert_eq!([at(0), at(3_000), at(4_900), at(9_000)], [false, false, true, false]);
    }
}
