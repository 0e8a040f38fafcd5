use clawpot_core::ports::Net as _;
use clawpot_host::process::Tool;
use clawpot_types::{Kind, Slot};

use super::world::{Guest, PORT, PUBLIC, on_host, paths};
use crate::SlotNet;
use crate::steps::Step;

const SLOT: Slot = Slot(5);

/// Nothing bears the slot's name: no link, no namespace, no element.
pub(super) async fn left_behind(net: &SlotNet, slot: Slot) {
    assert!(!net.list().await.unwrap().contains(&slot));
    let rules = Tool::new(paths().nft).args(["list", "ruleset"]).run().await.unwrap();
    let name = net.shop().site.names.slot(slot);
    assert!(!String::from_utf8_lossy(&rules).contains(&format!("\"{name}\"")), "elements are left of {name}");
}

#[test]
fn a_crash_at_any_step_of_ensure_is_found_and_undone_or_completed() {
    const STEPS: [Step; 9] = [
        Step::Named,
        Step::Mounted,
        Step::Taps,
        Step::Veth,
        Step::Configured,
        Step::Rules,
        Step::MarkedReady,
        Step::MarkedGiven,
        Step::Admitted,
    ];
    on_host(|world| async move {
        for step in STEPS {
            for complete in [false, true] {
                let net = world.open("a").await;
                net.shop().steps.crash_after(step);
                assert_eq!(net.ensure(SLOT).await.unwrap_err().kind(), Kind::Cancelled, "{step:?}");
                drop(net);

                let net = world.open("a").await;
                assert_eq!(net.list().await.unwrap(), [SLOT], "{step:?}");
                // One that is ready was never given to anybody.
                assert_eq!(net.left(SLOT).await.unwrap().is_none(), step == Step::MarkedReady, "{step:?}");
                if complete {
                    net.ensure(SLOT).await.unwrap();
                    let guest = Guest::start(&net, SLOT);
                    assert!(guest.tcp(PUBLIC, PORT).is_some(), "{step:?}");
                }
                net.remove(SLOT).await.unwrap();
                left_behind(&net, SLOT).await;
            }
        }
    });
}

#[test]
fn a_crash_at_any_step_of_remove_is_found_and_completed() {
    const STEPS: [Step; 4] = [Step::MarkedUsed, Step::Silenced, Step::Forgotten, Step::Unnamed];
    on_host(|world| async move {
        for step in STEPS {
            for again in [false, true] {
                let net = world.open("a").await;
                net.ensure(SLOT).await.unwrap();
                net.shop().steps.crash_after(step);
                assert_eq!(net.remove(SLOT).await.unwrap_err().kind(), Kind::Cancelled, "{step:?}");
                drop(net);

                let net = world.open("a").await;
                assert_eq!(net.look(SLOT).await.unwrap(), None, "{step:?}: a used namespace is never given out");
                // Behind the last step the kernel may have finished by itself.
                if step != Step::Unnamed {
                    assert_eq!(net.left(SLOT).await.unwrap(), Some(()), "{step:?}: half removed is not removed");
                }
                if again {
                    net.ensure(SLOT).await.unwrap();
                    assert!(Guest::start(&net, SLOT).tcp(PUBLIC, PORT).is_some(), "{step:?}");
                }
                net.remove(SLOT).await.unwrap();
                left_behind(&net, SLOT).await;
            }
        }
    });
}
