//! Records as messages.

use std::time::Duration;

use clawpot_common::v1;
use clawpot_control::Row;
use clawpot_control::service::quarantine_hint;
use clawpot_core::event::{About, Event};
use clawpot_core::{
    Desired, DiskSource, Exit, ExtraDisk, Failure, Phase, Quarantine, Reason, RestartPolicy, Timing, VmRecord,
};
use clawpot_types::{Error, Kind, Retry, Revision, Timestamp, VmId};

pub fn vm(id: &VmId, row: &Row) -> v1::Vm {
    match row {
        Row::Known { revision, record } => known(*revision, record),
        Row::Unreadable { revision, why } => v1::Vm {
            id: id.to_string(),
            revision: revision.0,
            phase: v1::Phase::Quarantined.into(),
            failure: Some(v1::Failure {
                during: v1::Phase::Quarantined.into(),
                message: format!("VM {id}: its record cannot be read: {why}"),
                hint: format!("restore the store from a backup, or give the VM up: clawpot rm --force {id}"),
                ..Default::default()
            }),
            ..Default::default()
        },
    }
}

pub fn known(revision: Revision, record: &VmRecord) -> v1::Vm {
    v1::Vm {
        id: record.id.to_string(),
        name: record.name.to_string(),
        labels: record.labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        revision: revision.0,
        generation: record.generation.0,
        incarnation: record.incarnation.0,
        phase: phase(record.phase).into(),
        desired: desired(record.desired).into(),
        spec: Some(spec(&record.spec)),
        created_at: Some(timestamp(record.created_at)),
        phase_changed_at: Some(timestamp(record.phase_since)),
        timings: record.timings.iter().map(timing).collect(),
        image_digest: record.image.digest.to_string(),
        vmm: record.vmm.as_ref().map(|choice| choice.kind.to_string()).unwrap_or_default(),
        vmm_version: record.vmm.as_ref().map(|choice| choice.version.clone()).unwrap_or_default(),
        address: record.address.map(|address| address.to_string()).unwrap_or_default(),
        failure: record
            .quarantine
            .as_ref()
            .map(|why| quarantine(record, why))
            .or_else(|| record.failure.as_ref().map(failure)),
        remove_when_done: record.remove_when_done,
        ttl_ms: record.ttl.map_or(0, |ttl| ttl.0),
        expires_at: record.expires_at.filter(|_| record.desired == Desired::Running).map(timestamp),
        restart: restart(record.restart.policy).into(),
        restart_attempts: record.restart.attempts,
        restart_at: record.restart.at.map(timestamp),
        last_exit: record.exit.as_ref().map(exit),
        desired_by: record.intent_by.clone(),
    }
}

const fn restart(policy: RestartPolicy) -> v1::RestartPolicy {
    match policy {
        RestartPolicy::Never => v1::RestartPolicy::RestartNever,
        RestartPolicy::OnFailure => v1::RestartPolicy::RestartOnFailure,
        RestartPolicy::Always => v1::RestartPolicy::RestartAlways,
    }
}

fn exit(exit: &Exit) -> v1::Exit {
    use v1::exit::Reason as Wire;
    let reason = match exit.reason {
        Reason::PoweredOff => Wire::PoweredOff,
        Reason::GuestPanicked => Wire::GuestPanicked,
        Reason::VmmDied => Wire::VmmDied,
        Reason::HostRebooted => Wire::HostRebooted,
        Reason::BootTimeout => Wire::BootTimeout,
        Reason::Failed => Wire::Failed,
        Reason::Stopped => Wire::Stopped,
        Reason::TtlOver => Wire::TtlOver,
        Reason::Deleted => Wire::Deleted,
    };
    v1::Exit {
        reason: reason.into(),
        by: exit.by.clone(),
        message: exit.message.clone(),
        incarnation: exit.incarnation.0,
        at: Some(timestamp(exit.at)),
    }
}

fn spec(spec: &clawpot_core::VmSpec) -> v1::VmSpec {
    let env = |(name, value): &(String, String)| v1::EnvVar {
        name: name.clone().into_bytes().into(),
        value: value.clone().into_bytes().into(),
    };
    v1::VmSpec {
        image: spec.image.to_string(),
        vcpus: spec.vcpus.into(),
        memory_mib: spec.memory.0,
        disk_mib: spec.disk.0,
        env: spec.env.iter().map(env).collect(),
        cwd: spec.cwd.clone(),
        user: spec.user.clone(),
        network: match spec.reach {
            clawpot_core::Reach::Default => v1::Network::Default,
            clawpot_core::Reach::None => v1::Network::None,
        }
        .into(),
        volumes: spec.extra_disks.iter().filter_map(volume).collect(),
    }
}

/// Other disks are the server's own affair.
fn volume(disk: &ExtraDisk) -> Option<v1::VolumeMount> {
    let DiskSource::Volume(name) = &disk.source else { return None };
    Some(v1::VolumeMount {
        volume: name.to_string(),
        path: disk.mount.as_ref().map(ToString::to_string).unwrap_or_default(),
        read_only: disk.read_only,
    })
}

fn failure(failure: &Failure) -> v1::Failure {
    v1::Failure {
        during: phase(failure.during).into(),
        message: failure.message.clone(),
        hint: failure.hint.clone().unwrap_or_default(),
        retryable: Error::new(failure.kind, "").retry() == Retry::Later,
        cleanup: failure.cleanup.clone().unwrap_or_default(),
        console_tail: failure.console_tail.clone(),
    }
}

fn quarantine(record: &VmRecord, why: &Quarantine) -> v1::Failure {
    v1::Failure {
        during: phase(why.from).into(),
        message: why.message.clone(),
        hint: quarantine_hint(&record.name),
        ..Default::default()
    }
}

fn timing(timing: &Timing) -> v1::PhaseTiming {
    let duration = Duration::from_micros(timing.micros);
    v1::PhaseTiming {
        name: timing.name.clone(),
        duration: Some(prost_types::Duration {
            seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
            // Below 10^9 by definition.
            nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
        }),
    }
}

pub fn timestamp(at: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: i64::try_from(at.0 / 1_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at.0 % 1_000_000 * 1000).unwrap_or_default(),
    }
}

pub fn event(event: Event) -> v1::Event {
    let told = v1::Event {
        id: event.id.0,
        time: Some(timestamp(event.time)),
        kind: event.kind,
        message: event.message,
        actor: event.actor,
        ..v1::Event::default()
    };
    match event.about {
        About::Vm { vm, name, incarnation } => {
            v1::Event { vm_id: vm.to_string(), vm_name: name.to_string(), incarnation: incarnation.0, ..told }
        }
        About::Volume { volume, volume_name } => {
            v1::Event { volume_id: volume.to_string(), volume_name: volume_name.to_string(), ..told }
        }
        About::Image { image, image_name } => v1::Event { image_digest: image.to_string(), image_name, ..told },
        About::Images { images_removed } => v1::Event { images_removed, ..told },
    }
}

pub const fn phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Accepted => v1::Phase::Accepted,
        Phase::Preparing => v1::Phase::Preparing,
        Phase::Booting => v1::Phase::Booting,
        Phase::Restoring => v1::Phase::Restoring,
        Phase::Running => v1::Phase::Running,
        Phase::Paused => v1::Phase::Paused,
        Phase::Sleeping => v1::Phase::Sleeping,
        Phase::Asleep => v1::Phase::Asleep,
        Phase::Waking => v1::Phase::Waking,
        Phase::Stopping => v1::Phase::Stopping,
        Phase::Stopped => v1::Phase::Stopped,
        Phase::Deleting => v1::Phase::Deleting,
        Phase::Failed => v1::Phase::Failed,
        Phase::Quarantined => v1::Phase::Quarantined,
    }
}

const fn desired(desired: Desired) -> v1::Desired {
    match desired {
        Desired::Running => v1::Desired::Running,
        Desired::Stopped => v1::Desired::Stopped,
        Desired::Deleted => v1::Desired::Deleted,
    }
}

/// 0 on the wire: for ever.
pub fn ttl(ms: u64) -> Option<clawpot_types::Millis> {
    (ms > 0).then_some(clawpot_types::Millis(ms))
}

/// A grace in milliseconds is taken as it is; the service bounds it.
pub const fn grace(ms: u64) -> clawpot_types::Millis {
    clawpot_types::Millis(ms)
}

/// For fields that count in `u32`.
pub fn count(value: usize) -> Result<u32, Error> {
    u32::try_from(value).map_err(|_| Error::new(Kind::Internal, format!("{value} does not fit the message")))
}
