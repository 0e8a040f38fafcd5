use std::time::{Duration, Instant};

use clawpot_core::ports::Net as _;
use clawpot_host::process::Tool;
use clawpot_types::{Kind, Slot};

use super::crash::left_behind;
use super::renew::renewed;
use super::world::{Guest, PORT, PUBLIC, on_host, paths};
use crate::SlotNet;
use crate::kernel::netlink::Netlink;
use crate::kernel::{conntrack, look};
use crate::mark::Standing;

#[test]
fn nothing_is_left_of_a_slot_and_then_of_the_instance() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let slot = Slot(5);
        assert_eq!(net.look(slot).await.unwrap(), None);
        assert!(net.list().await.unwrap().is_empty());
        net.ensure(slot).await.unwrap();
        net.ensure(slot).await.unwrap();
        assert_eq!(net.look(slot).await.unwrap(), Some(()));
        assert_eq!(net.list().await.unwrap(), [slot]);
        assert_eq!(net.give_up().await.unwrap_err().kind(), Kind::FailedPrecondition);

        let guest = Guest::start(&net, slot);
        assert!(guest.tcp(PUBLIC, PORT).is_some() && guest.udp(PUBLIC, PORT).is_some());
        drop(guest);
        net.remove(slot).await.unwrap();
        net.remove(slot).await.unwrap();
        assert_eq!(net.look(slot).await.unwrap(), None);
        left_behind(&net, slot).await;
        assert_eq!(conntrack::forget(&[net.seat(slot).unwrap().address].into()).unwrap(), 0);

        net.give_up().await.unwrap();
        let rules = Tool::new(paths().nft).args(["list", "ruleset"]).run().await.unwrap();
        assert_eq!(String::from_utf8_lossy(&rules), "");
        let claims = std::fs::read_dir(world.blocks()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(claims.collect::<Vec<_>>(), ["lock"]);
        let resolver = std::net::UdpSocket::bind((net.resolver().address, 53));
        assert_eq!(resolver.unwrap_err().kind(), std::io::ErrorKind::AddrNotAvailable);
    });
}

#[test]
fn slots_that_are_not_ours_to_give() {
    on_host(|world| async move {
        let net = world.open("a").await;
        assert_eq!(net.slots(), 1023);
        for slot in [Slot(1023), Slot(u32::MAX)] {
            assert_eq!(net.seat(slot).unwrap_err().kind(), Kind::InvalidArgument);
            assert_eq!(net.ensure(slot).await.unwrap_err().kind(), Kind::InvalidArgument);
        }
        net.warm(&[Slot(1023)]).await;
    });
}

/// Every user of the host can open the directory of names, and lock it for ever.
#[test]
fn a_locked_directory_of_names_keeps_no_server_from_its_start() {
    on_host(async |world| {
        let names = std::fs::File::open(crate::NETNS_DIR).unwrap();
        rustix::fs::flock(&names, rustix::fs::FlockOperation::LockExclusive).unwrap();
        world.open("a").await.ensure(Slot(0)).await.unwrap();
    });
}

/// Until those and no others are ready.
async fn until_ready(net: &SlotNet, slots: &[u32]) {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let ready: Vec<u32> = net.shop().ready().into_iter().map(|(slot, _)| slot.0).collect();
        if ready == slots {
            return;
        }
        assert!(Instant::now() < end, "ready: {ready:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[test]
fn a_warm_slot_costs_one_transaction() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.warm(&[Slot(0), Slot(1), Slot(2)]).await;
        until_ready(&net, &[0, 1, 2]).await;
        // Warm is not given, but listed.
        assert_eq!(net.look(Slot(0)).await.unwrap(), None);
        assert_eq!(net.list().await.unwrap(), [Slot(0), Slot(1), Slot(2)]);

        let (there, before) = (links(), (net.nft_runs(), net.nft_transactions()));
        net.ensure(Slot(0)).await.unwrap();
        assert_eq!((net.nft_runs(), net.nft_transactions()), (before.0, before.1 + 1));
        assert_eq!(links(), there, "no link was made");
        assert!(Guest::start(&net, Slot(0)).reaches(PUBLIC, PORT));

        // Others are wished for: one stays, one goes, one comes; the given one is left alone.
        net.warm(&[Slot(2), Slot(3)]).await;
        until_ready(&net, &[2, 3]).await;
        assert_eq!(net.look(Slot(0)).await.unwrap(), Some(()));
        left_behind(&net, Slot(1)).await;

        // A server that starts finds them all as they were, and takes a ready one without making it.
        drop(net);
        let net = world.open("a").await;
        assert_eq!(net.look(Slot(0)).await.unwrap(), Some(()));
        until_ready(&net, &[2, 3]).await;
        // It looks at the rules of those in use too, which is nothing of what is counted here.
        renewed(&net, &[0]).await;
        let (there, before) = (links(), (net.nft_runs(), net.nft_transactions()));
        net.ensure(Slot(3)).await.unwrap();
        assert_eq!((net.nft_runs(), net.nft_transactions()), (before.0, before.1 + 1));
        assert_eq!(links(), there, "no link was made");

        // Asked for while it is being made ahead: made once.
        net.warm(&[Slot(4)]).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        net.ensure(Slot(4)).await.unwrap();
        assert_eq!(net.look(Slot(4)).await.unwrap(), Some(()));
        for slot in [0, 3, 4] {
            net.remove(Slot(slot)).await.unwrap();
        }
        net.give_up().await.unwrap();
        assert!(net.list().await.unwrap().is_empty());
    });
}

/// Numbers of the host's links; none is given twice.
fn links() -> Vec<u32> {
    look::links(&mut Netlink::route().unwrap()).unwrap().into_iter().map(|link| link.index).collect()
}

#[test]
fn every_slots_rules_are_what_nft_made_of_them() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let slots = [Slot(1), Slot(2), Slot(3)];
        for slot in slots {
            net.ensure(slot).await.unwrap();
        }
        assert_eq!(net.nft_runs(), 2, "the host's table, and the first slot's rules");
        let mut listed = Vec::new();
        for slot in slots {
            let netns = clawpot_host::netns::open(&net.seat(slot).unwrap().netns).unwrap();
            let nft = Tool::new(paths().nft).args(["list", "ruleset"]).with(|spawn| spawn.netns(netns));
            listed.push(String::from_utf8(nft.run().await.unwrap()).unwrap());
        }
        assert!(listed[0].contains("policy drop") && listed[0].contains("169.254.0.0/16"), "{}", listed[0]);
        assert_eq!(listed[1], listed[0]);
        assert_eq!(listed[2], listed[0]);
    });
}

#[test]
fn a_server_that_starts_again_interrupts_nobody() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(1)).await.unwrap();
        let guest = Guest::start(&net, Slot(1));
        assert!(guest.reaches(PUBLIC, PORT));
        drop(net);
        let net = world.open("a").await;
        assert!(guest.reaches(PUBLIC, PORT));
        assert_eq!(net.look(Slot(1)).await.unwrap(), Some(()));
    });
}

#[test]
fn addresses_are_chosen_where_the_host_has_none_and_kept_when_it_gets_some() {
    on_host(|world| async move {
        let ip = clawpot_host::process::find_program("ip", None).unwrap();
        let route = async |words: &str| Tool::new(&ip).args(words.split(' ')).run().await.unwrap();
        route("route add 10.201.0.0/16 via 203.0.113.1").await;
        route("addr add 10.202.3.4/24 dev uplink").await;
        route("route add unreachable 10.203.0.0/20").await;
        let net = world.open("a").await;
        net.ensure(Slot(1)).await.unwrap();
        let address = net.seat(Slot(1)).unwrap().address;
        assert_eq!(address.to_string(), "10.211.0.3");
        let guest = Guest::start(&net, Slot(1));
        assert!(guest.reaches(PUBLIC, PORT));

        // Somebody's VPN comes up where the VMs are: theirs are more particular routes, and the claim stays.
        route("route add 10.211.0.0/16 via 203.0.113.1").await;
        drop(net);
        let net = world.open("a").await;
        assert_eq!(net.seat(Slot(1)).unwrap().address, address);
        assert!(guest.reaches(PUBLIC, PORT));
        // Once nothing holds it to the range it goes elsewhere.
        drop(guest);
        net.remove(Slot(1)).await.unwrap();
        net.give_up().await.unwrap();
        drop(net);
        assert_eq!(world.open("a").await.seat(Slot(1)).unwrap().address.to_string(), "10.222.0.3");
    });
}

/// Begins `work` on the slot, and goes away in its middle.
async fn left_half_way(net: &SlotNet, slot: Slot, work: impl Future<Output = clawpot_types::Result<()>>) {
    let half = async {
        while net.shop().standing(slot) != Standing::Leftover {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        // First, so that nothing is too fast for this test.
        biased;
        () = half => {}
        done = work => panic!("it was never in its middle: {done:?}"),
    }
}

#[test]
fn a_caller_that_goes_away_stops_nothing_half_way() {
    on_host(|world| async move {
        let net = world.open("a").await;
        left_half_way(&net, Slot(1), net.ensure(Slot(1))).await;
        // Waits for its turn, then finds it done.
        net.ensure(Slot(1)).await.unwrap();
        let counted = (net.nft_runs(), net.nft_transactions());
        assert_eq!(counted, (2, 3), "the table, the slot's rules; its elements without the program");
        left_half_way(&net, Slot(1), net.remove(Slot(1))).await;
        net.ensure(Slot(1)).await.unwrap();
        assert_eq!(net.look(Slot(1)).await.unwrap(), Some(()));
    });
}

#[test]
fn a_namespace_that_somebody_holds_does_not_keep_its_slot() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(1)).await.unwrap();
        let held = clawpot_host::netns::open(&net.seat(Slot(1)).unwrap().netns).unwrap();
        net.remove(Slot(1)).await.unwrap();
        left_behind(&net, Slot(1)).await;
        net.ensure(Slot(1)).await.unwrap();
        drop(held);
        assert!(Guest::start(&net, Slot(1)).reaches(PUBLIC, PORT));
    });
}

#[test]
fn a_veth_taken_away_by_hand_is_made_again() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(1)).await.unwrap();
        let ip = clawpot_host::process::find_program("ip", None).unwrap();
        let name = format!("cp{}-1", world.instance("a"));
        Tool::new(ip).args(["netns", "del", &name]).run().await.unwrap();
        assert_eq!(net.look(Slot(1)).await.unwrap(), None);
        net.ensure(Slot(1)).await.unwrap();
        assert!(Guest::start(&net, Slot(1)).reaches(PUBLIC, PORT));
    });
}

#[test]
fn slots_removed_together_are_forgotten_by_one_look() {
    on_host(|world| async move {
        let net = world.open("a").await;
        for n in 0..20 {
            net.ensure(Slot(n)).await.unwrap();
        }
        let guests = [Guest::start(&net, Slot(0)), Guest::start(&net, Slot(19))];
        assert!(guests.iter().all(|guest| guest.reaches(PUBLIC, PORT)));
        drop(guests);
        for removed in join_all((0..20).map(|n| net.remove(Slot(n))).collect()).await {
            removed.unwrap();
        }
        // One that came late has a look of its own.
        let looks = net.shop().forgetting.looks();
        assert!((1..=3).contains(&looks), "{looks}");
        for slot in [Slot(0), Slot(19)] {
            left_behind(&net, slot).await;
            assert_eq!(conntrack::forget(&[net.seat(slot).unwrap().address].into()).unwrap(), 0);
        }
    });
}

#[test]
fn figures() {
    on_host(|world| async move {
        const SLOTS: u32 = 20;
        let net = world.open("a").await;
        let mut cold = Vec::new();
        for n in 0..SLOTS {
            cold.push(timed(net.ensure(Slot(n))).await);
        }
        let mut gone = Vec::new();
        for n in 0..SLOTS {
            gone.push(timed(net.remove(Slot(n))).await);
        }
        let wanted: Vec<Slot> = (0..SLOTS).map(Slot).collect();
        net.warm(&wanted).await;
        until_ready(&net, &(0..SLOTS).collect::<Vec<_>>()).await;
        let mut warm = Vec::new();
        for slot in &wanted {
            warm.push(timed(net.ensure(*slot)).await);
        }
        let mut look = Vec::new();
        for slot in &wanted {
            let start = Instant::now();
            net.look(*slot).await.unwrap().unwrap();
            look.push(start.elapsed());
        }
        let start = Instant::now();
        let removals: Vec<_> = wanted.iter().map(|slot| net.remove(*slot)).collect();
        for removed in join_all(removals).await {
            removed.unwrap();
        }
        let all = start.elapsed();
        for (what, times) in [("cold ensure", cold), ("warm ensure", warm), ("remove", gone), ("look", look)] {
            println!("{what}: {}", summary(times));
        }
        println!("remove of {SLOTS} at once: {all:?}");
    });
}

async fn timed(work: impl Future<Output = clawpot_types::Result<()>>) -> Duration {
    let start = Instant::now();
    work.await.unwrap();
    start.elapsed()
}

async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, output) in futures.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(context) {
                *output = Some(value);
            }
        }
        match futures.iter().all(|(_, output)| output.is_some()) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    futures.into_iter().filter_map(|(_, output)| output).collect()
}

fn summary(mut times: Vec<Duration>) -> String {
    times.sort();
    let median = times[times.len() / 2];
    format!("median {median:?}, min {:?}, max {:?}, n={}", times[0], times[times.len() - 1], times.len())
}
