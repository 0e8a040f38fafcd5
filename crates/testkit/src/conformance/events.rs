//! What `EventLog` promises.

use std::collections::BTreeSet;
use std::time::Duration;

use clawpot_core::event::Event;
use clawpot_types::{Error, Incarnation, Kind, Revision, VmId};

use super::{Subject, next, quiet, take};

/// Makes a new, empty log each time.
type Make = fn() -> Subject;

fn vm(n: u8) -> VmId {
    VmId::from_random([n; VmId::LEN])
}

fn event(id: u64, n: u8, kind: &str) -> Event {
    Event {
        id: Revision(id),
        time: crate::time::START.after(Duration::from_secs(id)),
        vm: vm(n),
        name: "web".parse().unwrap(),
        incarnation: Incarnation(1),
        kind: kind.to_owned(),
        message: format!("what happened at {id}"),
        actor: "uid=1000".to_owned(),
    }
}

pub async fn events_come_back_in_order(make: Make) {
    let subject = make();
    let all = vec![event(1, 1, "vm.create"), event(2, 1, "vm.phase"), event(5, 2, "vm.create")];
    subject.events.append(all[..2].to_vec()).await.unwrap();
    subject.events.append(all[2..].to_vec()).await.unwrap();
    subject.events.append(vec![]).await.unwrap();
    assert_eq!(subject.events.list(None, Revision(0), 100).await.unwrap(), all);
    assert_eq!(subject.events.list(None, Revision(2), 100).await.unwrap(), all[2..]);
    assert!(subject.events.list(None, Revision(5), 100).await.unwrap().is_empty());
}

pub async fn appending_again_changes_nothing(make: Make) {
    let subject = make();
    let first = event(1, 1, "vm.create");
    let mut retold = first.clone();
    retold.message = "told differently".to_owned();
    let others = [event(1, 1, "vm.phase"), event(1, 2, "vm.create")];
    subject.events.append(vec![first.clone()]).await.unwrap();
    subject.events.append(vec![retold, others[0].clone(), others[1].clone()]).await.unwrap();
    let listed = subject.events.list(None, Revision(0), 100).await.unwrap();
    assert_eq!(listed, [first, others[0].clone(), others[1].clone()]);
}

pub async fn events_are_found_by_vm(make: Make) {
    let subject = make();
    let all: Vec<Event> = (1..=6).map(|id| event(id, if id % 2 == 0 { 2 } else { 1 }, "vm.phase")).collect();
    subject.events.append(all).await.unwrap();
    let ids = |events: Vec<Event>| events.iter().map(|event| event.id.0).collect::<Vec<_>>();
    assert_eq!(ids(subject.events.list(Some(&vm(2)), Revision(0), 100).await.unwrap()), [2, 4, 6]);
    assert_eq!(ids(subject.events.list(Some(&vm(1)), Revision(3), 100).await.unwrap()), [5]);
    assert!(subject.events.list(Some(&vm(9)), Revision(0), 100).await.unwrap().is_empty());
}

/// Paging by the last id, with several events of one id at every place where a page may end.
pub async fn pages_lose_nothing(make: Make) {
    let subject = make();
    let mut all = Vec::new();
    for id in 1..=6 {
        all.extend((0..id).map(|n| event(id, u8::try_from(n).unwrap(), "vm.phase")));
    }
    subject.events.append(all.clone()).await.unwrap();
    for limit in 1..=all.len() + 1 {
        let (mut seen, mut after) = (Vec::new(), Revision(0));
        loop {
            let page = subject.events.list(None, after, limit).await.unwrap();
            let Some(last) = page.last() else { break };
            assert!(page.len() <= limit.max(6), "a page of {} for a limit of {limit}", page.len());
            after = last.id;
            seen.extend(page);
        }
        assert_eq!(seen, all, "limit {limit}");
    }
    assert!(subject.events.list(None, Revision(0), 0).await.unwrap().is_empty());
}

pub async fn old_events_go_by_count(make: Make) {
    let subject = make();
    let kept = u64::try_from(subject.events_kept).unwrap();
    for id in 1..=kept * 3 {
        subject.events.append(vec![event(id, 1, "vm.phase")]).await.unwrap();
    }
    let listed = subject.events.list(None, Revision(0), usize::MAX - 1).await.unwrap();
    let ids: BTreeSet<u64> = listed.iter().map(|event| event.id.0).collect();
    assert!(ids.len() >= subject.events_kept, "only {} are left", ids.len());
    assert!(ids.len() <= subject.events_kept * 3 / 2, "{} are kept", ids.len());
    assert!((kept * 2 + 1..=kept * 3).all(|id| ids.contains(&id)), "the newest stay");
}

pub async fn old_events_go_by_age(make: Make) {
    let subject = make();
    let old = event(1, 1, "vm.create");
    let mut new = event(2, 1, "vm.phase");
    subject.events.append(vec![old.clone()]).await.unwrap();
    new.time = old.time.after(subject.events_age + Duration::from_secs(1));
    subject.events.append(vec![new.clone()]).await.unwrap();
    assert_eq!(subject.events.list(None, Revision(0), 100).await.unwrap(), [new]);
}

pub async fn an_event_watcher_sees_was_and_comes(make: Make) {
    let subject = make();
    let all: Vec<Event> = (1..=4).map(|id| event(id, 1, "vm.phase")).collect();
    subject.events.append(all[..3].to_vec()).await.unwrap();
    let mut everything = subject.events.watch(None, Revision(1)).await.unwrap();
    let mut of_another = subject.events.watch(Some(&vm(2)), Revision(0)).await.unwrap();
    assert_eq!(take(&mut everything, 2).await, all[1..3]);
    subject.events.append(vec![all[2].clone(), all[3].clone()]).await.unwrap();
    assert_eq!(next(&mut everything).await.unwrap(), all[3], "and nothing twice");
    quiet(&mut everything).await;
    quiet(&mut of_another).await;
    let other = event(5, 2, "vm.create");
    subject.events.append(vec![other.clone()]).await.unwrap();
    assert_eq!(next(&mut of_another).await.unwrap(), other);
}

pub async fn an_event_watcher_below_the_floor_is_told(make: Make) {
    let subject = make();
    let kept = u64::try_from(subject.events_kept).unwrap();
    for id in 1..=kept * 3 {
        subject.events.append(vec![event(id, 1, "vm.phase")]).await.unwrap();
    }
    subject.events.list(None, Revision(0), 1).await.unwrap();
    let error: Error = match subject.events.watch(None, Revision(1)).await {
        Err(error) => error,
        Ok(mut events) => next(&mut events).await.unwrap_err(),
    };
    assert_eq!(error.kind(), Kind::Compacted);
    let mut events = subject.events.watch(None, Revision(kept * 3 - 1)).await.unwrap();
    assert_eq!(next(&mut events).await.unwrap().id, Revision(kept * 3));
}
