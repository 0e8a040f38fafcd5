//! The first call of each incarnation: who is there, since when, and what time it is.

use std::time::Duration;

use clawpot_common::AGENT_PROTOCOL;
use clawpot_common::agent::v1::{HelloRequest, HelloResponse};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tonic::Status;

use crate::micros;

/// A clock that is further off than this is set; the rest is left to it.
const TOLERATED_SKEW: Duration = Duration::from_millis(500);

/// What a host may ask for beyond the first version of the protocol: so far what that version itself has.
const CAPABILITIES: [&str; 3] = ["exec", "exec.tty", "shutdown"];

/// Which machine this is, as the kernel's command line says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub vm_id: String,
    pub incarnation: u64,
}

/// How far the boot was when, since the kernel's start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    pub agent_start: Duration,
    pub rootfs_ready: Duration,
    pub listening: Duration,
}

/// The wall clock: a test has none to set.
#[derive(Clone, Copy, Debug)]
pub struct WallClock {
    pub may_set: bool,
}

/// Refuses a host that means another machine; sets the clock.
pub fn answer(
    request: &HelloRequest,
    identity: &Identity,
    timings: &Timings,
    clock: WallClock,
) -> Result<HelloResponse, Status> {
    if request.vm_id != identity.vm_id || request.incarnation != identity.incarnation {
        return Err(Status::failed_precondition(format!(
            "this is VM {} incarnation {}, not VM {} incarnation {}",
            identity.vm_id,
            identity.incarnation,
            super::exec::shown(request.vm_id.as_bytes()),
            request.incarnation
        )));
    }
    let skew = skew(now_ns(), i128::from(request.host_time_ns));
    let off = request.host_time_ns != 0 && Duration::from_nanos(skew.unsigned_abs()) > TOLERATED_SKEW;
    let stepped = off && clock.may_set && step(request.host_time_ns);
    Ok(HelloResponse {
        protocol: AGENT_PROTOCOL.min(request.protocol.max(1)),
        capabilities: CAPABILITIES.map(str::to_owned).to_vec(),
        incarnation: identity.incarnation,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        clock_skew_ns: skew,
        clock_stepped: stepped,
        agent_start_us: micros(timings.agent_start),
        rootfs_ready_us: micros(timings.rootfs_ready),
        listening_us: micros(timings.listening),
    })
}

fn now_ns() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

/// Positive: the guest is ahead. What does not fit (292 years) is cut.
fn skew(guest: i128, host: i128) -> i64 {
    i64::try_from(guest - host).unwrap_or(if guest > host { i64::MAX } else { i64::MIN })
}

fn step(host_time_ns: u64) -> bool {
    let seconds = i64::try_from(host_time_ns / 1_000_000_000);
    let nanos = i64::try_from(host_time_ns % 1_000_000_000);
    let (Ok(tv_sec), Ok(tv_nsec)) = (seconds, nanos) else { return false };
    match clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec }) {
        Ok(()) => true,
        Err(errno) => {
            crate::console::say(format_args!("setting the clock: {errno}"));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: WallClock = WallClock { may_set: false };

    fn request(vm_id: &str, incarnation: u64) -> HelloRequest {
        HelloRequest { protocol: 9, host_time_ns: 0, vm_id: vm_id.into(), incarnation }
    }

    #[test]
    fn another_machine_is_refused() {
        let identity = Identity { vm_id: "a".into(), incarnation: 3 };
        let timings = Timings { agent_start: Duration::from_micros(7), ..Timings::default() };
        let answered = answer(&request("a", 3), &identity, &timings, CLOCK).unwrap();
        assert_eq!((answered.protocol, answered.incarnation, answered.agent_start_us), (AGENT_PROTOCOL, 3, 7));
        for other in [request("b", 3), request("a", 2)] {
            let status = answer(&other, &identity, &timings, CLOCK).unwrap_err();
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
            assert!(status.message().starts_with("this is VM a incarnation 3, not"), "{}", status.message());
        }
    }

    #[test]
    fn skew_has_a_sign_and_an_end() {
        assert_eq!(skew(5, 3), 2);
        assert_eq!(skew(3, 5), -2);
        assert_eq!(skew(i128::from(i64::MAX) * 4, 0), i64::MAX);
        assert_eq!(skew(0, i128::from(u64::MAX)), i64::MIN);
    }
}
