//! Which request is accepted in which phase, whole.

use clawpot_core::request::{Answer, Request, answer};
use clawpot_core::{Desired, Phase};

#[test]
fn the_table_is_this() {
    let mut table = String::new();
    for phase in Phase::ALL {
        for desired in Desired::ALL {
            table.push_str(&format!("{phase}, {desired:?} wanted\n").to_lowercase());
            for request in Request::ALL {
                let answer = match answer(request, phase, desired) {
                    Answer::Accept => "accept".to_owned(),
                    Answer::Ignore => "ignore".to_owned(),
                    Answer::Await => "await".to_owned(),
                    Answer::Deny(why) => format!("deny: {why}"),
                };
                table.push_str(&format!("  {:<7} {answer}\n", format!("{request:?}").to_lowercase()));
            }
        }
    }
    insta::assert_snapshot!(table);
}

#[test]
fn delete_is_never_refused_but_in_quarantine_and_by_force_never() {
    for (phase, desired) in Phase::ALL.into_iter().flat_map(|phase| Desired::ALL.map(|desired| (phase, desired))) {
        let refused = matches!(answer(Request::Delete, phase, desired), Answer::Deny(_));
        assert_eq!(refused, phase == Phase::Quarantined, "{phase}, {desired:?} wanted");
        assert!(!matches!(answer(Request::Force, phase, desired), Answer::Deny(_)), "{phase}, {desired:?} wanted");
    }
}
