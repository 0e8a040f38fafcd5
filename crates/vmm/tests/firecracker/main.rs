//! The driver against a real Firecracker and its jailer: `FIRECRACKER_BIN` (and `JAILER_BIN`, else beside it) or from PATH.
//!
//! The guests are a few hand-written instructions, which run even on hosts where no Linux does: API, jailer, tap, cgroup,
//! console and exit are tested everywhere. What needs a Linux is in [`linux`].

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod guest;
mod host;
mod linux;

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use clawpot_core::ports::{Console, GuestEndpoint, Vmm};
use clawpot_core::{Fact, VmmFact};
use clawpot_host::cgroup::Cgroups;
use clawpot_types::Kind;
use clawpot_vmm::console::Consoles;
use clawpot_vmm::firecracker::Probed;

use guest::Then;
use host::Corner;

/// Until the console has said `text`.
async fn said(corner: &Corner, text: &str) -> Vec<String> {
    for _ in 0..200 {
        let tail = corner.consoles.tail(&corner.machine.id.vm, 100).await.unwrap();
        if tail.iter().any(|line| line.contains(text)) {
            return tail;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    let tail = corner.consoles.tail(&corner.machine.id.vm, 100).await.unwrap();
    panic!("the console never said {text:?}: {tail:?}");
}

fn exited(fact: &Fact<VmmFact>) -> String {
    match fact {
        Fact::Present(VmmFact::Exited { how }) => how.to_string(),
        other => panic!("it has not ended: {other:?}"),
    }
}

async fn end(corner: &Corner, driver: &impl Vmm) {
    let id = &corner.machine.id;
    driver.stop(id).await.unwrap();
    tokio::time::timeout(Duration::from_secs(10), driver.exited(id)).await.expect("killed processes end");
    driver.destroy(id).await.unwrap();
    driver.destroy(id).await.unwrap();
    assert!(driver.inspect(id).await.is_absent());
    assert!(driver.list().await.unwrap().is_empty());
    let group = Cgroups::find().unwrap().group(&format!("clawpot/{}", corner.instance)).unwrap();
    assert!(!group.exists().unwrap(), "{group:?} is left behind");
    assert!(!corner.root().exists());
    let tail = corner.consoles.tail(&id.vm, 100).await.unwrap();
    assert!(!tail.is_empty(), "the console log stays");
    corner.consoles.erase(&id.vm).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machines_life() {
    let programs = programs_or_skip!();
    let corner = Corner::new(&guest::kernel("the guest speaks\r\n", Then::Halt)).await;
    let driver = corner.driver(&programs).await;
    let (machine, id) = (&corner.machine, &corner.machine.id);
    assert!(driver.inspect(id).await.is_absent());

    driver.prepare(machine).await.unwrap();
    driver.prepare(machine).await.unwrap();
    assert_eq!(driver.inspect(id).await, Fact::Present(VmmFact::Prepared));
    driver.start(machine).await.unwrap();
    driver.start(machine).await.unwrap();
    said(&corner, "the guest speaks").await;
    assert_eq!(driver.list().await.unwrap(), std::slice::from_ref(id));

    let members = Cgroups::find().unwrap().group(&format!("clawpot/{}/{id}", corner.instance)).unwrap();
    let members = members.members().unwrap();
    assert_eq!(members.len(), 1, "one process, in its group: {members:?}");
    let proc = |file: &str| format!("/proc/{}/{file}", members[0].pid);
    let status = std::fs::read_to_string(proc("status")).unwrap();
    let uid = machine.seat.uid.to_string();
    assert!(status.lines().any(|line| line.split_whitespace().eq(["Uid:", &uid, &uid, &uid, &uid])), "{status}");
    assert!(status.lines().any(|line| line.split_whitespace().eq(["CapEff:", "0000000000000000"])), "{status}");
    assert!(status.lines().any(|line| line.split_whitespace().eq(["NoNewPrivs:", "1"])), "{status}");
    let namespace = |path: &std::path::Path| std::fs::metadata(path).unwrap().ino();
    assert_eq!(namespace(proc("ns/net").as_ref()), namespace(corner.netns()));
    let program = std::fs::read_link(proc("exe")).unwrap();
    assert!(
        program.ends_with("firecracker") && !program.starts_with(corner.state.path()),
        "inside its chroot: {program:?}"
    );

    // The VMM's user can put nothing into its root any more.
    for dir in ["", "run", "dev", "dev/net"] {
        let meta = std::fs::metadata(corner.root().join(dir)).unwrap();
        assert_eq!((meta.uid(), meta.mode() & 0o777), (0, 0o755), "{dir:?}");
    }
    let GuestEndpoint::Vsock(path) = driver.attach(id, &machine.seat).await.unwrap() else { panic!("not vsock") };
    assert!(std::fs::symlink_metadata(&path).unwrap().file_type().is_socket());
    clawpot_host::unix::connect(&path).await.unwrap();
    // Beside the root lies the name that every VM's has.
    let own = std::fs::read_link(corner.root().with_file_name("v.sock")).unwrap();
    assert_eq!(corner.root().with_file_name(own), path);
    assert_eq!(driver.inspect(id).await, Fact::Present(VmmFact::Running { attached: true }));
    assert_eq!(driver.destroy(id).await.unwrap_err().kind(), Kind::FailedPrecondition);
    end(&corner, &driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_daemon_takes_over() {
    let programs = programs_or_skip!();
    let mut corner = Corner::new(&guest::kernel("the guest speaks\r\n", Then::Halt)).await;
    let id = corner.machine.id.clone();
    let first = corner.driver(&programs).await;
    first.prepare(&corner.machine).await.unwrap();
    first.start(&corner.machine).await.unwrap();
    said(&corner, "the guest speaks").await;
    drop(first);

    corner.consoles = Consoles::new(corner.state.path());
    let second = corner.driver(&programs).await;
    assert_eq!(second.list().await.unwrap(), std::slice::from_ref(&id));
    assert_eq!(second.inspect(&id).await, Fact::Present(VmmFact::Running { attached: false }));
    second.attach(&id, &corner.machine.seat).await.unwrap();
    assert_eq!(second.inspect(&id).await, Fact::Present(VmmFact::Running { attached: true }));
    end(&corner, &second).await;
}

/// Wherever a daemon dies in a start, the next one brings the guest up.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_start_is_finished() {
    let programs = programs_or_skip!();
    for millis in [0, 2, 5, 10, 15, 20, 30, 50] {
        let corner = Corner::new(&guest::kernel("the guest speaks\r\n", Then::Halt)).await;
        let id = &corner.machine.id;
        let first = corner.driver(&programs).await;
        first.prepare(&corner.machine).await.unwrap();
        let interrupted = tokio::time::timeout(Duration::from_millis(millis), first.start(&corner.machine)).await;
        // What had begun on another thread ends, as in a daemon it would not; the fork is all that it does.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let second = corner.driver(&programs).await;
        if second.inspect(id).await == Fact::Present(VmmFact::Prepared) {
            second.start(&corner.machine).await.unwrap();
        }
        second.attach(id, &corner.machine.seat).await.unwrap();
        println!("interrupted after {millis} ms: {}", interrupted.is_err());
        said(&corner, "the guest speaks").await;
        end(&corner, &second).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_resets_ends_its_vmm() {
    let programs = programs_or_skip!();
    let corner = Corner::new(&guest::kernel("and goes\r\n", Then::Reset)).await;
    let driver = corner.driver(&programs).await;
    driver.prepare(&corner.machine).await.unwrap();
    driver.start(&corner.machine).await.unwrap();
    let id = &corner.machine.id;
    tokio::time::timeout(Duration::from_secs(10), driver.exited(id)).await.expect("it ends by itself");
    let tail = said(&corner, "and goes").await;
    assert_eq!(exited(&driver.inspect(id).await), "exit status 0", "{tail:?}");
    // Used: a machine starts once.
    assert_eq!(driver.start(&corner.machine).await.unwrap_err().kind(), Kind::FailedPrecondition);
    end(&corner, &driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_comes_in_firecrackers_words() {
    let programs = programs_or_skip!();
    let corner = Corner::new(b"not a kernel").await;
    let driver = corner.driver(&programs).await;
    driver.prepare(&corner.machine).await.unwrap();
    let error = driver.start(&corner.machine).await.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    let chain = error.chain();
    assert!(chain.contains("PUT /actions: refused with 400") && chain.contains("kernel"), "{chain}");
    end(&corner, &driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_tap_it_says_so() {
    let programs = programs_or_skip!();
    let mut corner = Corner::new(&guest::kernel("never\r\n", Then::Halt)).await;
    // The tap belongs to another user.
    corner.machine.seat.uid += 1;
    corner.machine.seat.gid += 1;
    let driver = corner.driver(&programs).await;
    driver.prepare(&corner.machine).await.unwrap();
    let chain = driver.start(&corner.machine).await.unwrap_err().chain();
    assert!(chain.contains("PUT /network-interfaces/eth0: refused with 400"), "{chain}");
    end(&corner, &driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jailer_that_fails_is_told_by_its_console() {
    let programs = programs_or_skip!();
    let mut corner = Corner::new(&guest::kernel("never\r\n", Then::Halt)).await;
    corner.machine.seat.netns = "/nonexistent/netns".into();
    let driver = corner.driver(&programs).await;
    driver.prepare(&corner.machine).await.unwrap();
    let error = driver.start(&corner.machine).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{}", error.chain());
    said(&corner, "/nonexistent/netns").await;
    assert_eq!(exited(&driver.inspect(&corner.machine.id).await), "exit status 1");
    end(&corner, &driver).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_believes_the_console_alone() {
    let programs = programs_or_skip!();
    let corner = Corner::new(&guest::kernel("Linux version 0.0\r\n", Then::Halt)).await;
    let driver = corner.driver(&programs).await;
    let files = &corner.machine.files;
    let probed = driver.probe(&files.kernel, &files.initramfs).await.unwrap();
    assert!(matches!(probed, Probed::GuestRan(_)), "{probed}");

    // Runs, but is no Linux; ends at once, so the probe does not wait.
    let other = Corner::new(&guest::kernel("something else\r\n", Then::Reset)).await;
    let probed = driver.probe(&other.machine.files.kernel, &files.initramfs).await.unwrap();
    assert!(matches!(&probed, Probed::Silent(why) if why.contains("something else")), "{probed}");

    let broken = Corner::new(b"not a kernel").await;
    let probed = driver.probe(&broken.machine.files.kernel, &files.initramfs).await.unwrap();
    assert!(matches!(&probed, Probed::Refused(why) if why.contains("refused with 400")), "{probed}");
    assert!(!corner.root().parent().unwrap().with_file_name("probe").exists());
    assert!(driver.list().await.unwrap().is_empty());
}
