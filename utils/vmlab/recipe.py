"""What a golden image holds. Its hash names the image: another recipe is another image."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import host
from .errors import LabError

HERE = Path(__file__).resolve().parent
LIB = host.REPO / "scripts" / "lib"
#: Every image: systemd as PID 1, a way in, and what Clawpot and its tests call.
BASE = [
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "procps",
    "psmisc",
    "util-linux",
    "iproute2",
    "iputils-ping",
    "openssh-server",
    "sudo",
    "rsync",
    "less",
    "busybox-static",
    "ca-certificates",
    "python3",
    "e2fsprogs",
    "nftables",
    "qemu-system-x86",
    "lz4",
    "zstd",
    "openssl",
    "docker-registry",
    "skopeo",
    "umoci",
    "buildah",
    "xfsprogs",
]
#: Besides that, what building Clawpot and its images needs.
TOOLCHAIN = [
    "gcc",
    "libc6-dev",
    "make",
    "git",
    "pkg-config",
    "curl",
    "python3-venv",
    "mmdebstrap",
    "debian-archive-keyring",
    "shellcheck",
    "qemu-utils",
    "openssh-client",
    "strace",
    "gdb",
    "vim-tiny",
    "bash-completion",
]
#: The first one that apt knows. Nested virtualisation with SVM emulated has been measured with both.
KERNELS = ("linux-image-cloud-amd64", "linux-image-amd64")
#: Files here that shape the image; the rest of this package only runs it.
SHAPING = ("recipe.py", "tree.py", "cloud.py")


@dataclass(frozen=True)
class Profile:
    name: str
    packages: tuple[str, ...]
    toolchain: bool
    #: Size of the root file system. It is sparse: only what is written takes room.
    disk_mib: int
    #: What the image takes at least while it is built: the tree and its packed form, and as much again to work in.
    room_mib: int
    memory_mib: int


PROFILES = {
    "dev": Profile("dev", (*BASE, *TOOLCHAIN), True, 24 * 1024, 8 * 1024, 4096),
    "small": Profile("small", tuple(BASE), False, 8 * 1024, 2560, 2048),
}


def profile(name: str) -> Profile:
    if name not in PROFILES:
        raise LabError(f"there is no profile {name!r}", f"choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


@dataclass(frozen=True)
class Extra:
    """A file or directory of this machine that goes into the image."""

    source: Path
    #: Where it is in the image, without the leading slash.
    to: str
    #: What changes when it does.
    identity: str


@dataclass(frozen=True)
class Recipe:
    profile: Profile
    release: str
    kernel: str
    extras: tuple[Extra, ...] = ()
    #: A cloud image to start from, in place of mmdebstrap.
    cloud_image: Path | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @functools.cached_property
    def _hash(self) -> str:
        # Once: whoever edits the recipe during a build must not change the name of what is being built.
        digest = hashlib.sha256()
        for name in (*SHAPING, *sorted(f"guest/{path.name}" for path in (HERE / "guest").iterdir())):
            digest.update(name.encode() + b"\0" + (HERE / name).read_bytes())
        parts = [self.profile.name, self.release, self.kernel, *self.profile.packages]
        parts += [f"{extra.to} {extra.identity}" for extra in self.extras]
        if self.cloud_image:
            parts.append(f"cloud image {file_digest(self.cloud_image)}")
        digest.update("\n".join(parts).encode())
        return digest.hexdigest()[:16]

    def hash(self) -> str:
        return self._hash


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def current(profile_name: str) -> Recipe:
    """What an image built now would hold."""
    wanted = profile(profile_name)
    notes: list[str] = []
    extras = [*certificates(), *firecracker(notes)]
    if wanted.toolchain:
        extras += [*rust(notes), *uv(notes)]
    named = os.environ.get("CLAWPOT_VM_CLOUD_IMAGE")
    cloud = Path(named) if named else None
    if cloud and not cloud.is_file():
        raise LabError(
            f"CLAWPOT_VM_CLOUD_IMAGE: {cloud} is not a file", "name a Debian cloud image (qcow2 or raw), or unset it"
        )
    return Recipe(wanted, release(), kernel_package(), tuple(extras), cloud, tuple(notes))


def release() -> str:
    named = os.environ.get("CLAWPOT_VM_RELEASE")
    if named:
        return named
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.split("=", 1)[1].strip('"')
    raise LabError("/etc/os-release names no Debian release", "set CLAWPOT_VM_RELEASE (bookworm, trixie)")


def kernel_package() -> str:
    """The package that the metapackage stands for, with its version: apt is asked, and knows the newest."""
    named = os.environ.get("CLAWPOT_VM_KERNEL")
    for metapackage in (named,) if named else KERNELS:
        told = subprocess.run(
            ["apt-cache", "depends", "--no-recommends", "--no-suggests", metapackage],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        for line in told.splitlines():
            words = line.split()
            if words[:1] == ["Depends:"] and words[1].startswith("linux-image-"):
                return words[1]
    raise LabError(
        f"apt knows no {named or ' or '.join(KERNELS)}", "apt-get update, with Debian's main and security suites in the sources"
    )


def certificates() -> list[Extra]:
    """Authorities that this machine trusts besides Debian's: mirrors and indexes may be behind them."""
    found = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))
    return [Extra(path, f"usr/local/share/ca-certificates/{path.name}", file_digest(path)) for path in found]


def firecracker(notes: list[str]) -> list[Extra]:
    """firecracker and jailer from FIRECRACKER_BIN, PATH, or what scripts/install-vm-assets.sh fetched."""
    fetched = sorted((host.REPO / "assets" / "firecracker").glob("*/firecracker"))
    named = os.environ.get("FIRECRACKER_BIN") or host.tool("firecracker") or (str(fetched[-1]) if fetched else "")
    if not named:
        notes.append("no Firecracker in it: none on PATH, and FIRECRACKER_BIN is not set")
        return []
    binary = Path(named).resolve()
    if not os.access(binary, os.X_OK):
        raise LabError(f"FIRECRACKER_BIN: {binary} cannot be run", "name the firecracker program itself")
    extras = [Extra(binary, "usr/local/bin/firecracker", file_digest(binary))]
    jailer = binary.with_name("jailer")
    other = host.tool("jailer")
    if not jailer.exists() and other:
        jailer = Path(other).resolve()
    if jailer.exists():
        extras.append(Extra(jailer, "usr/local/bin/jailer", file_digest(jailer)))
    else:
        notes.append(f"no jailer in it: none beside {binary} and none on PATH")
    return extras


def callers(program: str) -> str | None:
    """A program of the person behind sudo, whose PATH sudo has cut."""
    home = Path(host.caller().pw_dir)
    return shutil.which(
        program, path=os.pathsep.join([str(home / ".cargo/bin"), str(home / ".local/bin"), os.environ.get("PATH", "")])
    )


def rust(notes: list[str]) -> list[Extra]:
    """The host's toolchain as it is, without its manuals."""
    rustc = callers("rustc")
    if not rustc:
        notes.append("no Rust in it: rustc is neither on PATH nor in ~/.cargo/bin")
        return []
    env = {**os.environ, "HOME": host.caller().pw_dir}
    told = subprocess.run([rustc, "-vV"], capture_output=True, text=True, env=env, check=False, cwd=host.REPO)
    root = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True, env=env, check=False, cwd=host.REPO)
    if told.returncode or root.returncode:
        notes.append(f"no Rust in it: {rustc} fails: {(told.stderr or root.stderr).strip()[:200]}")
        return []
    targets = " ".join(sorted(path.name for path in Path(root.stdout.strip(), "lib/rustlib").iterdir()))
    return [Extra(Path(root.stdout.strip()), "opt/rust", f"{told.stdout} {targets}")]


def uv(notes: list[str]) -> list[Extra]:
    own = host.REPO / "target" / "python-tools" / "bin" / "uv"
    found = callers("uv") or (str(own) if own.exists() else None)
    if not found:
        notes.append("no uv in it: neither on PATH nor in target/python-tools (scripts/lint.sh installs it)")
        return []
    binary = Path(found).resolve()
    return [Extra(binary, "usr/local/bin/uv", file_digest(binary))]


def script_library() -> None:
    """Makes the helpers of scripts/ importable: the kernel's and the initramfs's formats are known there."""
    if str(LIB) not in sys.path:
        sys.path.insert(0, str(LIB))
