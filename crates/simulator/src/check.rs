//! What must be so once nothing goes wrong any more: everything is where it is wanted, and the records say what is.

use std::collections::BTreeSet;
use std::time::Duration;

use clawpot_control::{Row, Service};
use clawpot_core::ports::Clock as _;
use clawpot_core::{Desired, Phase, VmRecord};
use clawpot_types::Slot;

use crate::disk::at_once;
use crate::volumes;
use crate::world::World;

/// Virtual. The longest of what may be under way: a delay of 300 s, a boot's 120 s, a clock that went back by 60 s; several
/// of them after one another.
const PATIENCE: Duration = Duration::from_secs(3_600);
/// Nothing may change for so long before the host is compared with the records.
const QUIET: Duration = Duration::from_secs(5);

/// Waits until every VM is where it is wanted, and has been for a while.
///
/// # Errors
/// Which one is not, in spite of all patience.
pub async fn settle(world: &World) -> Result<(), String> {
    let begun = tokio::time::Instant::now();
    let mut before = None;
    loop {
        let daemon = world.daemon().await;
        let now = (daemon.life, snapshot(&daemon.service), world.oracle.volumes());
        let restless = daemon.service.records().rows_after(None).into_iter().find_map(|(_, row)| restless(world, &row));
        let restless = restless.or_else(|| volumes::restless(world));
        // A call that is still on its way may be answered with what was true long ago.
        let restless = restless.or_else(|| (!world.weather.is_over()).then(|| "a call is still on its way".to_owned()));
        match restless {
            None if before.as_ref() == Some(&now) => return Ok(()),
            Some(what) if begun.elapsed() > PATIENCE => return Err(format!("it is stuck: {what}")),
            None if begun.elapsed() > PATIENCE * 2 => return Err("it never comes to rest".to_owned()),
            _ => {}
        }
        before = Some(now);
        tokio::time::sleep(QUIET).await;
        if let Some(broken) = world.oracle.verdict() {
            return Err(broken);
        }
    }
}

fn snapshot(service: &Service) -> Vec<(String, u64)> {
    let rows = service.records().rows_after(None).into_iter();
    rows.map(|(id, row)| (id.as_str().to_owned(), row.revision().0)).collect()
}

/// `None`: there is nothing left to do for it.
fn restless(world: &World, row: &Row) -> Option<String> {
    let Row::Known { record, .. } = row else { return Some("a record cannot be read".to_owned()) };
    let over = record.expires_at.is_some_and(|at| at <= world.clock.now());
    let at_rest = match (record.desired, record.phase) {
        (Desired::Running, _) if over || (record.phase != Phase::Running && record.restart.at.is_some()) => false,
        (Desired::Running, Phase::Running) | (Desired::Stopped, Phase::Stopped) => true,
        (Desired::Running, Phase::Failed) => {
            record.failure.as_ref().is_some_and(|failure| failure.generation >= record.generation)
        }
        _ => false,
    };
    (!at_rest).then(|| format!("VM {} ({}) is {}, wanted {:?}", record.id, record.name, record.phase, record.desired))
}

/// Compares the records with the host and with the disk, at one instant.
#[must_use]
pub fn truth(world: &World, service: &Service) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut records = Vec::new();
    for (id, row) in service.records().rows_after(None) {
        match row {
            Row::Known { record, revision } => {
                if world.oracle.vms().get(&id).map(|seen| seen.revision) != Some(revision) {
                    wrong.push(format!("VM {id}: the daemon knows revision {revision}, the disk another"));
                }
                records.push(record);
            }
            Row::Unreadable { why, .. } => wrong.push(format!("VM {id}: {why}")),
        }
    }
    if records.len() != world.oracle.vms().len() {
        wrong.push(format!("the daemon knows {} VMs, the disk {}", records.len(), world.oracle.vms().len()));
    }
    for record in &records {
        wrong.extend(untrue(world, record).map(|what| format!("VM {} is {}: {what}", record.id, record.phase)));
    }
    let records: Vec<&VmRecord> = records.iter().map(AsRef::as_ref).collect();
    wrong.extend(strange(world, &records));
    wrong.extend(claims(world, &records));
    wrong.extend(volumes::truth(world, &records));
    wrong
}

fn untrue(world: &World, record: &VmRecord) -> Option<String> {
    let lives = world.host.living().contains(&record.machine());
    let has_net = world.host.slots().contains(&record.slot);
    let has_disk = world.host.disk_serial(&record.id).is_some();
    if record.disk_made && !has_disk {
        return Some("its disk is gone".to_owned());
    }
    let ended = record.exit.as_ref().is_some_and(|exit| exit.incarnation == record.incarnation);
    match record.phase {
        Phase::Running if ended => Some("it ended".to_owned()),
        Phase::Stopped | Phase::Failed if !ended && record.incarnation.0 > 0 => {
            Some("nobody says how it ended".to_owned())
        }
        Phase::Running if !lives => Some("its VMM does not live".to_owned()),
        Phase::Running if !has_net => Some("it has no network".to_owned()),
        Phase::Running if record.failure.is_some() => Some("it keeps an old failure".to_owned()),
        Phase::Failed if record.failure.is_none() => Some("nobody says why".to_owned()),
        Phase::Failed if world.weather.always_calm() => {
            Some(format!("though nothing went wrong: {:?}", record.failure.as_ref().map(|failure| &failure.message)))
        }
        Phase::Stopped | Phase::Failed if has_net => Some("its network is there".to_owned()),
        _ => None,
    }
}

/// What is on the host and should not be.
fn strange(world: &World, records: &[&VmRecord]) -> Vec<String> {
    let running: Vec<_> = records.iter().filter(|record| record.phase == Phase::Running).collect();
    let machines: BTreeSet<_> = running.iter().map(|record| record.machine()).collect();
    let slots: BTreeSet<Slot> = running.iter().map(|record| record.slot).collect();
    let mut wrong = Vec::new();
    for machine in world.host.machines().into_iter().filter(|machine| !machines.contains(machine)) {
        wrong.push(format!("machine {machine} is on the host and nobody's"));
    }
    for slot in world.host.slots().into_iter().filter(|slot| !slots.contains(slot)) {
        wrong.push(format!("slot {slot} is on the host and nobody's"));
    }
    let owned = |line: &str| records.iter().any(|record| line.contains(record.id.as_str()));
    let files =
        world.host.left_behind().into_iter().filter(|line| line.starts_with("disk") || line.starts_with("console"));
    wrong.extend(files.filter(|line| !owned(line)).map(|line| format!("{line} is on the host and nobody's")));
    wrong
}

/// The claims on slots and names are the records', no more and no fewer.
fn claims(world: &World, records: &[&VmRecord]) -> Vec<String> {
    let expected: BTreeSet<String> = records
        .iter()
        .flat_map(|record| {
            [
                clawpot_control::records::slot_key(record.slot),
                clawpot_control::records::name_key(&record.name),
                clawpot_control::records::vm_key(&record.id),
            ]
        })
        .collect();
    match keys(world) {
        Ok(found) if found == expected => Vec::new(),
        Ok(found) => vec![format!(
            "the disk has keys {:?} too many and {:?} too few",
            found.difference(&expected).collect::<Vec<_>>(),
            expected.difference(&found).collect::<Vec<_>>()
        )],
        Err(error) => vec![error],
    }
}

/// What is in the store of VMs.
fn keys(world: &World) -> Result<BTreeSet<String>, String> {
    let listing = at_once(world.disk.state.list("")).map_err(|error| error.chain())?;
    let keys = listing.entries.into_iter().map(|entry| entry.key);
    Ok(keys.filter(|key| !key.starts_with("requests/") && !key.starts_with("volumes/")).collect())
}

/// After the last VM and the last volume were deleted there is nothing.
#[must_use]
pub fn empty(world: &World) -> Vec<String> {
    let mut left = world.host.left_behind();
    left.extend(volumes::left(world));
    match keys(world) {
        Ok(keys) => left.extend(keys.into_iter().map(|key| format!("key {key}"))),
        Err(error) => left.push(error),
    }
    left.into_iter().map(|line| format!("left behind: {line}")).collect()
}
