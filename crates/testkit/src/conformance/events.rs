//! What `EventLog` promises, and `StateStore` of the events in a transaction.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use clawpot_core::event::{ATTACH, About, Draft, EXEC, Event, is_of_a_command};
use clawpot_core::ports::{Durability, Guard, Op, Txn, TxnOutcome};
use clawpot_types::{Error, Incarnation, Kind, Result, Revision, VmId};

use super::{Subject, absent, next, put, quiet, take};

/// Makes a new, empty log each time.
type Make = fn() -> Subject;

fn vm(n: u8) -> VmId {
    VmId::from_random([n; VmId::LEN])
}

/// What happens `second` seconds after the start.
fn draft(second: u64, n: u8, kind: &'static str) -> Draft {
    Draft {
        time: crate::time::START.after(Duration::from_secs(second)),
        about: About::Vm { vm: vm(n), name: "web".parse().unwrap(), incarnation: Incarnation(1) },
        kind,
        message: format!("what happened at {second}"),
        actor: "uid=1000".to_owned(),
    }
}

async fn txn(subject: &Subject, guards: Vec<Guard>, ops: Vec<Op>, events: Vec<Draft>) -> Result<TxnOutcome> {
    subject.store.txn(Txn { guards, ops, events, durability: Durability::Normal }).await
}

/// Commits `drafts` at one revision and returns the events that they become.
async fn told(subject: &Subject, drafts: Vec<Draft>) -> Vec<Event> {
    let TxnOutcome::Committed(id) = txn(subject, vec![], vec![], drafts.clone()).await.unwrap() else {
        panic!("nothing guards it")
    };
    drafts.iter().map(|draft| draft.committed(id)).collect()
}

/// `count` events, each in a transaction of its own.
async fn many(subject: &Subject, count: u64) -> Vec<Event> {
    let mut all = Vec::new();
    for second in 1..=count {
        all.extend(told(subject, vec![draft(second, 1, "vm.phase")]).await);
    }
    all
}

async fn all(subject: &Subject) -> Vec<Event> {
    subject.events.list(None, Revision(0), usize::MAX - 1).await.unwrap()
}

pub async fn events_come_back_in_order(make: Make) {
    let subject = make();
    let mut written = told(&subject, vec![draft(1, 1, "vm.create")]).await;
    written.extend(told(&subject, vec![draft(2, 1, "vm.phase"), draft(2, 2, "vm.create")]).await);
    assert_eq!(
        written.iter().map(|event| event.id.0).collect::<Vec<_>>(),
        [1, 2, 2],
        "an event has its transaction's id"
    );
    assert_eq!(all(&subject).await, written);
    assert_eq!(subject.events.list(None, Revision(1), 100).await.unwrap(), written[1..]);
    assert!(subject.events.list(None, Revision(2), 100).await.unwrap().is_empty());
}

pub async fn an_event_is_part_of_its_transaction(make: Make) {
    let subject = make();
    let done = txn(&subject, vec![absent("a")], vec![put("a", "1")], vec![draft(1, 1, "vm.create")]).await.unwrap();
    assert_eq!(done, TxnOutcome::Committed(Revision(1)));
    // Neither happens.
    let late = txn(&subject, vec![absent("a")], vec![put("b", "1")], vec![draft(2, 2, "vm.create")]).await.unwrap();
    assert!(matches!(late, TxnOutcome::Conflict { .. }), "{late:?}");
    let refused = txn(&subject, vec![], vec![put("b", "not JSON")], vec![draft(3, 3, "vm.create")]).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::InvalidArgument);
    let ids: Vec<_> = all(&subject).await.into_iter().map(|event| (event.id, event.about.id().to_owned())).collect();
    assert_eq!(ids, [(Revision(1), vm(1).to_string())]);
    assert_eq!(subject.store.get("a").await.unwrap().unwrap().revision, Revision(1));
}

pub async fn one_event_of_a_kind(make: Make) {
    let subject = make();
    let twice = vec![draft(1, 1, "vm.phase"), draft(2, 1, "vm.phase")];
    assert_eq!(txn(&subject, vec![], vec![], twice).await.unwrap_err().kind(), Kind::InvalidArgument);
    assert!(all(&subject).await.is_empty());
    told(&subject, vec![draft(1, 1, "vm.phase"), draft(1, 2, "vm.phase"), draft(1, 1, "vm.exit")]).await;
    assert_eq!(all(&subject).await.len(), 3);
}

/// A watcher that has seen an id has seen all below it.
pub async fn ids_are_in_order_whoever_writes(make: Make) {
    let subject = Arc::new(make());
    let mut seen = subject.events.watch(None, Revision(0)).await.unwrap();
    // Fewer than are kept, and than a watcher may be behind.
    let writers = u8::try_from(subject.events_kept / 10).unwrap().clamp(2, 8);
    let tasks = (1..=writers).map(|n| {
        let subject = Arc::clone(&subject);
        tokio::spawn(async move {
            for second in 0..5 {
                told(&subject, vec![draft(second, n, "vm.phase")]).await;
            }
        })
    });
    let tasks: Vec<_> = tasks.collect();
    for task in tasks {
        task.await.unwrap();
    }
    let count = usize::from(writers) * 5;
    let ids: Vec<u64> = take(&mut seen, count).await.iter().map(|event| event.id.0).collect();
    assert_eq!(ids, (1..=u64::try_from(count).unwrap()).collect::<Vec<_>>());
}

pub async fn events_are_found_by_vm(make: Make) {
    let subject = make();
    for second in 1..=6 {
        told(&subject, vec![draft(second, if second % 2 == 0 { 2 } else { 1 }, "vm.phase")]).await;
    }
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
        all.extend(told(&subject, (0..id).map(|n| draft(1, n, "vm.phase")).collect()).await);
    }
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
    many(&subject, kept * 3).await;
    let ids: BTreeSet<u64> = all(&subject).await.iter().map(|event| event.id.0).collect();
    assert!(ids.len() >= subject.events_kept, "only {} are left", ids.len());
    assert!(ids.len() <= subject.events_kept * 3 / 2, "{} are kept", ids.len());
    assert!((kept * 2 + 1..=kept * 3).all(|id| ids.contains(&id)), "the newest stay");
}

/// However many commands are run, what is known of creates and deletes stays.
pub async fn commands_push_out_only_commands(make: Make) {
    let subject = make();
    let mut history = told(&subject, vec![draft(1, 1, "vm.create")]).await;
    history.extend(told(&subject, vec![draft(2, 2, "vm.create"), draft(2, 2, EXEC), draft(2, 2, ATTACH)]).await);
    history.retain(|event| !is_of_a_command(&event.kind));
    let many = u64::try_from(subject.events_kept * 5).unwrap();
    for second in 3..many {
        told(&subject, vec![draft(second, 1, if second % 2 == 0 { EXEC } else { ATTACH })]).await;
    }
    history.extend(told(&subject, vec![draft(many, 1, "vm.delete")]).await);
    let (execs, others): (Vec<_>, Vec<_>) =
        all(&subject).await.into_iter().partition(|event| is_of_a_command(&event.kind));
    assert_eq!(others, history);
    assert!(execs.len() >= subject.execs_kept && execs.len() <= subject.execs_kept * 3 / 2, "{} are kept", execs.len());
    assert_eq!(execs.last().unwrap().id, Revision(many - 1), "the newest stay");
    assert_eq!(subject.events.list(Some(&vm(2)), Revision(0), 100).await.unwrap(), history[1..2]);
    // Who watched from before is told that some are missing.
    let seen = match subject.events.watch(None, Revision(2)).await {
        Err(error) => error,
        Ok(mut events) => next(&mut events).await.unwrap_err(),
    };
    assert_eq!(seen.kind(), Kind::Compacted);
    // And the others bound themselves as ever.
    for second in many..many + u64::try_from(subject.events_kept * 2).unwrap() {
        told(&subject, vec![draft(second, 1, "vm.phase")]).await;
    }
    let (left, others): (Vec<_>, Vec<_>) =
        all(&subject).await.into_iter().partition(|event| is_of_a_command(&event.kind));
    assert!(others.len() >= subject.events_kept && others.len() <= subject.events_kept * 3 / 2, "{}", others.len());
    assert!(left.len() >= subject.execs_kept, "{} are left", left.len());
}

pub async fn old_events_go_by_age(make: Make) {
    let subject = make();
    told(&subject, vec![draft(1, 1, "vm.create")]).await;
    let mut new = draft(2, 1, "vm.phase");
    new.time = new.time.after(subject.events_age + Duration::from_secs(1));
    let new = told(&subject, vec![new]).await;
    assert_eq!(all(&subject).await, new);
}

pub async fn an_event_watcher_sees_was_and_comes(make: Make) {
    let subject = make();
    let mut all = many(&subject, 3).await;
    let mut everything = subject.events.watch(None, Revision(1)).await.unwrap();
    let mut of_another = subject.events.watch(Some(&vm(2)), Revision(0)).await.unwrap();
    assert_eq!(take(&mut everything, 2).await, all[1..3]);
    all.extend(told(&subject, vec![draft(4, 1, "vm.phase")]).await);
    assert_eq!(next(&mut everything).await.unwrap(), all[3], "and nothing twice");
    quiet(&mut everything).await;
    quiet(&mut of_another).await;
    let other = told(&subject, vec![draft(5, 2, "vm.create")]).await;
    assert_eq!(next(&mut of_another).await.unwrap(), other[0]);
}

pub async fn an_event_watcher_below_the_floor_is_told(make: Make) {
    let subject = make();
    let kept = u64::try_from(subject.events_kept).unwrap();
    many(&subject, kept * 3).await;
    let error: Error = match subject.events.watch(None, Revision(1)).await {
        Err(error) => error,
        Ok(mut events) => next(&mut events).await.unwrap_err(),
    };
    assert_eq!(error.kind(), Kind::Compacted);
    let mut events = subject.events.watch(None, Revision(kept * 3 - 1)).await.unwrap();
    assert_eq!(next(&mut events).await.unwrap().id, Revision(kept * 3));
}
