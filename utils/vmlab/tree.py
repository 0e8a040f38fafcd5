"""The root file system of a golden image, as a directory."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from . import host
from .errors import LabError
from .recipe import HERE, LIB, Recipe, script_library

#: Nobody reads these in a test machine.
LEFT_OUT = (
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/lintian/*",
)
#: Work that a machine of an hour's life can do without, most of it seconds of an emulated boot.
MASKED = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-pstore.service",
    "systemd-timesyncd.service",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "nftables.service",
    "rsync.service",
    # The tests start registries of their own.
    "docker-registry.service",
    "systemd-update-utmp.service",
    "systemd-journal-flush.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-rfkill.socket",
    "dev-hugepages.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "dev-mqueue.mount",
    "sys-fs-fuse-connections.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-binfmt.service",
    "systemd-sysusers.service",
    "systemd-machine-id-commit.service",
    "systemd-hwdb-update.service",
    "systemd-update-done.service",
    "systemd-random-seed.service",
]
#: The programs under test are sshd's children: no limit of tasks, and they outlive its restart.
SSH_SERVICE = "[Service]\nTasksMax=infinity\nLimitNOFILE=1048576\nKillMode=process\n"
#: An emulated machine is slow to come and should be quick to go.
PATIENCE = "[Manager]\nDefaultTimeoutStopSec=15s\nDefaultTimeoutStartSec=300s\nDefaultDeviceTimeoutSec=300s\n"
#: Modules that the initrd loads; the rest comes from the root file system.
BOOT_MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4"]
#: Parts of a Rust toolchain that only people read.
UNREAD = shutil.ignore_patterns("doc", "man", "*.html")


def fill(recipe: Recipe, scratch: Path, fresh: bool) -> Path:
    """Packages, kernel, extras and our own files, in `scratch`/root. `fresh`: today's packages, not those kept from before."""
    root = scratch / "root"
    if recipe.cloud_image:
        from .cloud import unpack  # only where it is wanted

        unpack(recipe, scratch, root)
    else:
        packages(recipe, scratch, root, fresh)
    kernel(recipe, scratch, root)
    for extra in recipe.extras:
        to = root / extra.to
        to.parent.mkdir(parents=True, exist_ok=True)
        if extra.source.is_dir():
            shutil.copytree(extra.source, to, symlinks=True, ignore=UNREAD, dirs_exist_ok=True)
            own(to)
        else:
            shutil.copyfile(extra.source, to)
            to.chmod(0o644 if to.suffix == ".crt" else 0o755)
    configure(root)
    (root / "etc/clawpot-golden").write_text(recipe.hash() + "\n")
    return root


def pack(recipe: Recipe, root: Path, image: Path) -> None:
    """An ext4 file system of the whole disk."""
    # Zeroed tables are never written: the file is sparse, and the initrd mounts with noinit_itable.
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    words = ["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-i", "32768", "-E", options, "-d", root, image]
    host.run("mke2fs", *words, f"{recipe.profile.disk_mib}M", seconds=900)


def own(directory: Path) -> None:
    for base, _, names in os.walk(directory):
        for path in (Path(base), *(Path(base, name) for name in names)):
            os.chown(path, 0, 0, follow_symlinks=False)


def apt_answer(function: str, *words: str) -> list[str]:
    """What scripts/lib/debian.sh finds out about this machine's apt."""
    script = 'source "$0/common.sh"; source "$0/debian.sh"; "$@"'
    told = host.run("bash", "-c", script, LIB, function, *words)
    return [line for line in told.splitlines() if line]


def packages(recipe: Recipe, scratch: Path, root: Path, fresh: bool) -> None:
    """The packages alone are kept beside the images: most changes of a recipe are not to them, and they take the longest."""
    names = "\n".join([recipe.release, *recipe.profile.packages, *LEFT_OUT])
    kept = scratch.parent / f"base-{recipe.profile.name}-{hashlib.sha256(names.encode()).hexdigest()[:16]}.tar"
    if fresh or not kept.exists():
        bootstrap(recipe, scratch, root)
        half = scratch / "base.tar"
        host.run("tar", "-C", root, "--numeric-owner", "--xattrs", "-cpf", half, ".", seconds=900)
        for old in scratch.parent.glob(f"base-{recipe.profile.name}-*.tar"):
            old.unlink()
        half.rename(kept)
        host.give_to_caller(kept)
    else:
        root.mkdir()
        host.run("tar", "-C", root, "--numeric-owner", "--xattrs", "-xpf", kept, seconds=900)


def bootstrap(recipe: Recipe, scratch: Path, root: Path) -> None:
    sources = apt_answer("debian_sources", recipe.release)
    if not sources:
        raise LabError(
            f"apt knows no Debian suite {recipe.release} with component main", "see 'apt-get indextargets'; or apt-get update"
        )
    (scratch / "sources.list").write_text("\n".join(sources) + "\n")
    words = ["--mode=root", "--format=directory", "--variant=essential", f"--include={','.join(recipe.profile.packages)}"]
    words += ['--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    words += [f"--aptopt={line}" for line in apt_answer("transport_options")]
    if any(Path("/etc/apt/auth.conf.d").glob("*")):
        words.append('--aptopt=Dir::Etc::netrcparts "/etc/apt/auth.conf.d"')
    env = {**os.environ, "TMPDIR": str(scratch), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    # Whatever mmdebstrap mounts is gone with its namespace, also when it is killed.
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "mmdebstrap",
        *words,
        recipe.release,
        root,
        scratch / "sources.list",
    ]
    host.run(*command, seconds=1500, env=env)
    (root / "etc/apt/apt.conf.d/99mmdebstrap").unlink(missing_ok=True)


def kernel(recipe: Recipe, scratch: Path, root: Path) -> None:
    """`scratch`/vmlinux and `scratch`/initrd, and the modules in the tree."""
    script_library()
    import initramfs
    import kernel as bzimage

    package = scratch / "kernel"
    package.mkdir()
    # root downloads without apt's sandbox user, who may not enter the directory.
    words = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", recipe.kernel]
    done = subprocess.run(
        words, cwd=package, capture_output=True, text=True, check=False, timeout=600, stdin=subprocess.DEVNULL
    )
    files = list(package.glob("*.deb"))
    if done.returncode != 0 or not files:
        raise LabError(f"cannot download {recipe.kernel}: {done.stderr.strip()[-500:]}", "apt-get update")
    host.run("dpkg-deb", "-x", files[0], package / "tree", seconds=300)
    modules = next(path for path in package.glob("tree/**/lib/modules/*") if path.is_dir())
    image = next((package / "tree/boot").glob("vmlinuz-*"))
    vmlinux = bzimage.unpack(bzimage.payload_of(image.read_bytes()))
    bzimage.check(vmlinux)
    (scratch / "vmlinux").write_bytes(vmlinux)
    order, data = initramfs.collect(modules, BOOT_MODULES)
    archive = initramfs.Cpio()
    for directory in ("dev", "proc", "sys", "root", "bin", "modules"):
        archive.add(directory, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, (HERE / "guest/init").read_bytes())
    archive.add("bin/busybox", 0o100755, (root / "bin/busybox").read_bytes())
    archive.add("modules/order", 0o100644, "".join(f"{name}.ko\n" for name in order).encode())
    for name in order:
        archive.add(f"modules/{name}.ko", 0o100644, data[name])
    (scratch / "initrd").write_bytes(archive.finish())
    shutil.copytree(modules, root / "usr/lib/modules" / modules.name, symlinks=True)
    host.run("chroot", root, "/sbin/depmod", modules.name)
    shutil.rmtree(package)


def configure(root: Path) -> None:
    guest = HERE / "guest"
    for name, to, mode in (
        ("clawpot-vm-early", "usr/local/lib", 0o755),
        ("clawpot-vm-ready", "usr/local/lib", 0o755),
        ("clawpot-vm-early.service", "etc/systemd/system", 0o644),
        ("clawpot-vm-ready.service", "etc/systemd/system", 0o644),
    ):
        target = root / to / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(guest / name, target)
        target.chmod(mode)
    shutil.copyfile(guest / "sshd.conf", root / "etc/ssh/sshd_config.d/clawpot-vm.conf")
    shutil.copyfile(guest / "profile.sh", root / "etc/profile.d/zz-clawpot-vm.sh")
    for unit, by in (("clawpot-vm-early.service", "sysinit.target"), ("clawpot-vm-ready.service", "multi-user.target")):
        wants = root / "etc/systemd/system" / f"{by}.wants"
        wants.mkdir(parents=True, exist_ok=True)
        (wants / unit).symlink_to(f"/etc/systemd/system/{unit}")
    for unit in MASKED:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    files = {
        "etc/machine-id": "",
        "etc/hostname": "clawpot-vm\n",
        "etc/hosts": "127.0.0.1 localhost clawpot-vm\n::1 localhost\n",
        "etc/resolv.conf": "nameserver 10.0.2.3\n",
        "etc/fstab": "",
        "etc/modprobe.d/clawpot-vm.conf": "options kvm_amd npt=1 nested=0\n",
        "etc/sysctl.d/90-clawpot-vm.conf": "net.ipv4.ip_forward=1\n",
        "etc/systemd/system/ssh.service.d/clawpot-vm.conf": SSH_SERVICE,
        "etc/systemd/system.conf.d/clawpot-vm.conf": PATIENCE,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    for key in (root / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    # The account is for keys alone; sshd refuses one that is locked with "!".
    shadow = root / "etc/shadow"
    shadow.write_text(re.sub(r"^root:[^:]*:", "root:*:", shadow.read_text(), flags=re.M))
    if any((root / "usr/local/share/ca-certificates").glob("*.crt")):
        host.run("chroot", root, "/usr/sbin/update-ca-certificates")
    for path in [*(root / "tmp").iterdir(), *(root / "run").iterdir(), *(root / "var/lib/apt/lists").iterdir()]:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "work").mkdir(exist_ok=True)
