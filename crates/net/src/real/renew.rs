use std::net::UdpSocket;

use clawpot_core::ports::Net as _;
use clawpot_host::process::Tool;
use clawpot_types::Slot;

use super::world::{Guest, PATIENCE, PORT, PUBLIC, again, on_host, paths};
use crate::kernel::nfnetlink::Ruleset;
use crate::{SlotNet, renew};

/// The host gets an address that looks public; rules written now know it.
async fn get_an_address() {
    let ip = clawpot_host::process::find_program("ip", None).unwrap();
    Tool::new(ip).args(["addr", "add", "203.0.113.77/24", "dev", "uplink"]).run().await.unwrap();
    // No longer than the host's addresses are remembered.
    tokio::time::sleep(crate::original::REMEMBERED).await;
}

/// Those slots in use have been looked at, by this or by the background, which looks at times of its own and may have one in
/// hand: then this passes it over.
pub(super) async fn renewed(net: &SlotNet, slots: &[u32]) {
    renew::all(net.shop()).await.unwrap();
    for slot in slots {
        drop(net.shop().turn(Slot(*slot)).await.unwrap());
    }
}

async fn rules_of(net: &SlotNet, slot: u32) -> String {
    let netns = clawpot_host::netns::open(&net.seat(Slot(slot)).unwrap().netns).unwrap();
    let list = Tool::new(paths().nft).args(["-s", "list", "ruleset"]).with(|spawn| spawn.netns(netns));
    String::from_utf8(list.run().await.unwrap()).unwrap()
}

async fn have_todays_rules(net: &SlotNet, slots: &[u32]) {
    let first = rules_of(net, slots[0]).await;
    assert!(first.contains("203.0.113.77"), "{first}");
    for slot in slots {
        assert_eq!(rules_of(net, *slot).await, first, "slot {slot}");
    }
}

#[test]
fn a_slot_in_use_gets_new_rules_and_keeps_its_connections() {
    on_host(|world| async move {
        let net = world.open("a").await;
        for slot in [Slot(1), Slot(2)] {
            net.ensure(slot).await.unwrap();
        }
        let guest = Guest::start(&net, Slot(1));
        let talking = guest.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((PUBLIC, PORT)).unwrap();
            socket
        });
        // A link that is up sends only a moment later: asked again, from the same port.
        let talks = || again(|| talking.send(b"?").and_then(|_| talking.recv(&mut [0; 64])).ok()).is_some();
        assert!(talks());
        get_an_address().await;
        net.ensure(Slot(3)).await.unwrap();
        renewed(&net, &[1, 2, 3]).await;
        have_todays_rules(&net, &[3, 1, 2]).await;
        assert!(talks());
        let before = net.nft_runs();
        renew::all(net.shop()).await.unwrap();
        assert_eq!(net.nft_runs(), before, "once is enough");
    });
}

#[test]
fn slots_in_use_do_not_wait_for_a_new_one() {
    on_host(|world| async move {
        let net = world.open("a").await;
        for slot in [Slot(1), Slot(2)] {
            net.ensure(slot).await.unwrap();
        }
        drop(net);
        get_an_address().await;
        let net = world.open("a").await;
        renewed(&net, &[1, 2]).await;
        have_todays_rules(&net, &[1, 2]).await;
        // What nft made of them in a slot in use is what a new one gets.
        let before = net.nft_runs();
        net.ensure(Slot(3)).await.unwrap();
        renew::all(net.shop()).await.unwrap();
        assert_eq!(net.nft_runs(), before);
        have_todays_rules(&net, &[1, 2, 3]).await;
    });
}

#[test]
fn slots_in_use_are_renewed_where_the_kernel_takes_no_copies() {
    on_host(|world| async move {
        let net = world.open("a").await;
        for slot in [Slot(1), Slot(2)] {
            net.ensure(slot).await.unwrap();
        }
        // Not by the background, before copies are refused.
        let held = [net.shop().turn(Slot(1)).await.unwrap(), net.shop().turn(Slot(2)).await.unwrap()];
        get_an_address().await;
        net.shop().original().unwrap().refuse_copies();
        let before = net.nft_runs();
        drop(held);
        renewed(&net, &[1, 2]).await;
        have_todays_rules(&net, &[1, 2]).await;
        renew::all(net.shop()).await.unwrap();
        assert_eq!(net.nft_runs(), before + 2, "once is enough");
    });
}

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE`, and `…NEWCHAIN`.
const NEW_TABLE: u16 = 0x0a00;
const NEW_CHAIN: u16 = 0x0a03;

/// `struct nfgenmsg` of the family `ip`, then attributes: a name of four bytes, and one that no kernel knows.
const IP: [u8; 4] = [2, 0, 0, 0];
const NAME: [u8; 8] = [8, 0, 1, 0, b'a', b'b', b'c', 0];
const UNKNOWN: [u8; 8] = [8, 0, 99, 0, 1, 2, 3, 4];

#[test]
fn copies_that_the_kernel_refuses_are_not_tried_again() {
    on_host(|world| async move {
        // In a table that is not there; a table that comes back without all of it.
        let refused =
            [(NEW_CHAIN, [IP.as_slice(), &NAME].concat()), (NEW_TABLE, [IP.as_slice(), &NAME, &UNKNOWN].concat())];
        for (kind, body) in refused {
            let net = world.open("a").await;
            net.shop().original().unwrap().keep(Ruleset::of_one(kind, body));
            let before = net.nft_runs();
            for (n, slot) in (1..).zip([1, 2]) {
                net.ensure(Slot(slot)).await.unwrap();
                assert_eq!(net.nft_runs(), before + n, "by nft");
            }
            assert_eq!(rules_of(&net, 1).await, rules_of(&net, 2).await);
            assert!(Guest::start(&net, Slot(2)).reaches(PUBLIC, PORT));
            for slot in [1, 2] {
                net.remove(Slot(slot)).await.unwrap();
            }
        }
    });
}

#[test]
fn a_copy_that_fails_is_no_refusal() {
    on_host(|world| async move {
        let net = world.open("a").await;
        // More than the socket takes at a time: the kernel never saw it.
        let long = [IP.as_slice(), &vec![0; 1 << 20]].concat();
        net.shop().original().unwrap().keep(Ruleset::of_one(NEW_TABLE, long));
        let before = net.nft_runs();
        for slot in [1, 2] {
            net.ensure(Slot(slot)).await.unwrap();
            assert_eq!(net.nft_runs(), before + 1, "by nft once, and copied again");
        }
        assert_eq!(rules_of(&net, 1).await, rules_of(&net, 2).await);
        assert!(Guest::start(&net, Slot(2)).reaches(PUBLIC, PORT));
    });
}
