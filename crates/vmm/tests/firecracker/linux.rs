//! With a real kernel, named by variables: `CLAWPOT_TEST_KERNEL` (a `vmlinux`), and for a whole guest
//! `CLAWPOT_TEST_INITRAMFS`, `CLAWPOT_TEST_ROOTFS` and `CLAWPOT_TEST_DISK` (an empty formatted one) too.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_core::ports::{Console, GuestEndpoint, Vmm};
use clawpot_types::MiB;
use clawpot_types::guest::AGENT_PORT;
use clawpot_vmm::firecracker::Probed;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::guest::{self, Then};
use crate::host::Corner;
use crate::{end, programs_or_skip};

/// Under an emulated CPU inside an emulated CPU.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

fn file(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.is_none() {
        eprintln!("SKIPPED: no {variable}");
    }
    path
}

/// Puts a copy of `from` in place of what the corner has there, with its mode.
fn replace(target: &Path, from: &Path) {
    let mode = std::fs::metadata(target).unwrap().permissions();
    clawpot_host::fs::remove_file_if_exists(target).unwrap();
    clawpot_host::fs::clone_file(from, target).unwrap();
    std::fs::set_permissions(target, mode).unwrap();
}

async fn corner_with(kernel: &Path, initramfs: Option<&Path>) -> Corner {
    let corner = Corner::new(&guest::kernel("", Then::Halt)).await;
    replace(&corner.machine.files.kernel, kernel);
    if let Some(initramfs) = initramfs {
        replace(&corner.machine.files.initramfs, initramfs);
    }
    corner
}

/// What the probe says of this host, whatever it is.
#[tokio::test(flavor = "multi_thread")]
async fn this_hosts_verdict() {
    let programs = programs_or_skip!();
    let Some(kernel) = file("CLAWPOT_TEST_KERNEL") else { return };
    let corner = corner_with(&kernel, None).await;
    let driver = corner.driver(&programs).await;
    let files = &corner.machine.files;
    println!("{}", driver.probe(&files.kernel, &files.initramfs).await.unwrap());
}

/// From the start to an agent that takes a connection, where the probe says that guests run.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_takes_a_connection() {
    let programs = programs_or_skip!();
    let names = ["KERNEL", "INITRAMFS", "ROOTFS", "DISK"].map(|name| file(&format!("CLAWPOT_TEST_{name}")));
    let [Some(kernel), Some(initramfs), Some(rootfs), Some(disk)] = names else { return };
    let mut corner = corner_with(&kernel, Some(&initramfs)).await;
    replace(&corner.machine.files.rootfs, &rootfs);
    replace(&corner.machine.disk, &disk);
    corner.machine.memory = MiB(256);
    let driver = corner.driver(&programs).await;
    let files = &corner.machine.files;
    let probed = driver.probe(&files.kernel, &files.initramfs).await.unwrap();
    println!("{probed}");
    if !matches!(probed, Probed::GuestRan(_)) {
        eprintln!("SKIPPED: no guest runs here");
        return;
    }
    let start = Instant::now();
    driver.prepare(&corner.machine).await.unwrap();
    println!("prepared: {} ms", start.elapsed().as_millis());
    driver.start(&corner.machine).await.unwrap();
    println!("started: {} ms", start.elapsed().as_millis());
    let endpoint = driver.attach(&corner.machine.id, &corner.machine.seat).await.unwrap();
    let GuestEndpoint::Vsock(path) = endpoint else { panic!("not vsock") };
    while !connects(&path).await {
        if start.elapsed() > BOOT_LIMIT {
            let tail = corner.consoles.tail(&corner.machine.id.vm, 100).await.unwrap();
            panic!("no agent after {BOOT_LIMIT:?}: {tail:#?}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("agent: {} ms", start.elapsed().as_millis());
    end(&corner, &driver).await;
    println!("gone: {} ms", start.elapsed().as_millis());
}

async fn connects(path: &Path) -> bool {
    let mut stream = clawpot_host::unix::connect(path).await.unwrap();
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await.unwrap();
    let mut answer = [0; 64];
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await;
    matches!(read, Ok(Ok(read)) if answer[..read].starts_with(b"OK "))
}
