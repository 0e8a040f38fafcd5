use clawpot_core::ports::{BootFiles, DiskFile};
use clawpot_types::{Digest, Incarnation, MiB, Slot, Vcpus, VmId};

use super::*;

fn machine() -> Machine {
    Machine {
        id: MachineId { vm: VmId::from_random([0; 16]), incarnation: Incarnation(3) },
        name: "web".parse().unwrap(),
        vcpus: Vcpus::try_from(2).unwrap(),
        memory: MiB(4096),
        files: BootFiles {
            kernel: "/images/k".into(),
            kernel_digest: Digest::from_sha256(&[0; 32]),
            initramfs: "/images/i".into(),
            rootfs: "/images/r".into(),
        },
        disk: "/state/disks/a".into(),
        extra_disks: Vec::new(),
        seat: Seat {
            slot: Slot(7),
            uid: 1_900_000_007,
            gid: 1_900_000_007,
            netns: "/run/netns/x".into(),
            address: std::net::Ipv4Addr::LOCALHOST,
        },
    }
}

#[test]
fn command_line_tcg() {
    insta::assert_snapshot!(args::args(&machine(), Accel::Tcg).join("\n"));
}

/// In the order in which the guest is to number them, the VM's own last.
#[test]
fn extra_disks() {
    let mut machine = machine();
    let disk = |read_only, mount: Option<&str>| DiskFile {
        file: "/state/volumes/v".into(),
        read_only,
        mount: mount.map(|path| path.parse().unwrap()),
    };
    machine.extra_disks =
        vec![disk(false, None), disk(true, None), disk(false, Some("/data")), disk(true, Some("/ro"))];
    let args = args::args(&machine, Accel::Tcg);
    let told: Vec<_> = args.iter().filter(|arg| arg.contains("vd")).map(String::as_str).collect();
    insta::assert_snapshot!(told.join("\n"));
    let at = |text: &str| args.iter().position(|arg| arg.contains(text)).unwrap();
    assert!(at("drive=rootfs") < at("drive=vdb") && at("drive=vde") < at("drive=disk"));
}

#[test]
fn the_longest_command_line_is_one_that_a_kernel_takes() {
    let mut machine = machine();
    machine.name = "n".repeat(63).parse().unwrap();
    machine.id.incarnation = Incarnation(u64::MAX);
    let long = |n: usize| format!("/{n}{}", "a".repeat(clawpot_types::GuestPath::MAX - 2)).parse().unwrap();
    let disk = |n| DiskFile { file: "/v".into(), read_only: false, mount: Some(long(n)) };
    machine.extra_disks = (0..clawpot_types::guest::MAX_EXTRA_DISKS).map(disk).collect();
    for vmm in [crate::cmdline::QEMU, crate::cmdline::FIRECRACKER] {
        let line = crate::cmdline::line(&machine, vmm, crate::cmdline::Transport::Vsock);
        // Linux x86: COMMAND_LINE_SIZE is 2048. Firecracker adds some 40 bytes for each of its devices.
        assert!(line.len() + 13 * 45 < 2048, "{} bytes", line.len());
    }
}

#[test]
fn the_accelerator_is_all_that_kvm_changes() {
    let (tcg, kvm) = (args::args(&machine(), Accel::Tcg), args::args(&machine(), Accel::Kvm));
    let changed: Vec<_> = tcg.iter().zip(&kvm).filter(|(tcg, kvm)| tcg != kvm).map(|(_, kvm)| kvm.as_str()).collect();
    assert_eq!(changed, ["kvm"]);
    assert_eq!(tcg.len(), kvm.len());
}

#[test]
fn the_version_is_told_or_not() {
    assert_eq!(version_in("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright"), Some("7.2.22"));
    assert_eq!(version_in("QEMU emulator version 10.0.2"), Some("10.0.2"));
    for bad in ["", "QEMU emulator version ", "QEMU emulator version x", "qemu-img version 7.2"] {
        assert_eq!(version_in(bad), None, "{bad}");
    }
}

#[tokio::test]
async fn without_qemu_the_error_says_how_to_get_it() {
    let dir = tempfile::tempdir().unwrap();
    let instance = InstanceId::from_random([0; 4]);
    for (program, kind) in [("/nonexistent/qemu", Kind::NotFound), ("true", Kind::Unsupported)] {
        let config = Config { program: Some(program.to_owned()), ..Config::default() };
        let error = Qemu::new(dir.path(), &instance, Consoles::new(dir.path()), &config).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", error.chain());
    }
}
