"""packaging/: what the unit may not say, and what `make install` lays down and takes away. Nothing of this host is changed."""

import configparser
import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGING = REPO / "packaging"
UNIT = PACKAGING / "systemd/clawpot.service.in"
#: Each was read in systemd.exec(5), systemd.service(5) and systemd.resource-control(5): none gives the service a mount
#: namespace, and none reaches a VM through what is inherited but for the limits that are meant to.
HARMLESS = {
    "Type",
    "NotifyAccess",
    "ExecStart",
    "Restart",
    "RestartSec",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "KillMode",
    "LimitNOFILE",
    "TasksMax",
}
#: Known to imply one, or to empty /run/clawpot when the unit stops.
FORBIDDEN = [
    "Bind",
    "BindReadOnly",
    "DynamicUser",
    "ExecPaths",
    "Extension",
    "ImportCredential",
    "InaccessiblePaths",
    "LoadCredential",
    "LogNamespace",
    "Mount",
    "NoExecPaths",
    "PrivateDevices",
    "PrivateIPC",
    "PrivateMounts",
    "PrivateNetwork",
    "PrivateTmp",
    "PrivateUsers",
    "ProcSubset",
    "ProtectControlGroups",
    "ProtectHome",
    "ProtectHostname",
    "ProtectKernel",
    "ProtectProc",
    "ProtectSystem",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "RestrictNamespaces",
    "RootDirectory",
    "RootImage",
    "RuntimeDirectory",
    "SetCredential",
    "SystemCallFilter",
    "TemporaryFileSystem",
    "NetworkNamespacePath",
    "NoNewPrivileges",
    "OOMScoreAdjust",
    "Slice",
]


def unit() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read_string(UNIT.read_text())
    return parsed


def test_the_unit_says_only_what_is_known_to_be_harmless():
    said = set(unit()["Service"])
    assert not [key for key in said if key.startswith(tuple(FORBIDDEN))]
    assert said <= HARMLESS, f"read what {said - HARMLESS} does to mount namespaces and to children, then name it in HARMLESS"


def test_what_is_forbidden_would_be_found():
    for key in ("PrivateTmp", "ProtectSystem", "BindPaths", "RuntimeDirectory", "ReadWritePaths", "DynamicUser"):
        assert key.startswith(tuple(FORBIDDEN)) and key not in HARMLESS


def test_the_server_alone_ends_with_the_unit():
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["KillMode"] == "control-group"
    # VMs are not in it: their groups lie at the top of the hierarchy (crates/host/src/cgroup).
    assert "Delegate" not in service


def test_systemd_understands_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    (tmp_path / "clawpot-server").write_text("#!/bin/sh\n")
    (tmp_path / "clawpot-server").chmod(0o755)
    filled = tmp_path / "clawpot.service"
    filled.write_text(UNIT.read_text().replace("@SBIN@", str(tmp_path)).replace("@STATE@", "/var/lib/clawpot"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", filled], capture_output=True, text=True, check=False)
    # It looks at all that is wanted by it too; what it says of other units is their affair.
    assert not [line for line in done.stderr.splitlines() if "clawpot.service" in line], done.stderr
    assert done.returncode == 0, done.stderr


@pytest.fixture
def built() -> Path:
    built = Path(os.environ.get("CLAWPOT_BIN_DIR", REPO / "target/debug"))
    if not all((built / name).exists() for name in ("clawpot", "clawpot-server", "clawpot-edge", "clawpot-unpack")):
        pytest.skip(f"nothing is built in {built}")
    return built


@pytest.fixture
def make(built: Path, tmp_path: Path):
    def make(verb: str, **more: str) -> subprocess.CompletedProcess[str]:
        words = ["make", "-s", "-C", str(REPO), verb, f"DESTDIR={tmp_path}/dest", f"BIN_DIR={built}"]
        words += [f"{name}={value}" for name, value in more.items()]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    return make


def files(root: Path) -> set[str]:
    return {"/" + str(found.relative_to(root)) for found in root.rglob("*") if not found.is_dir()}


@pytest.mark.parametrize(("prefix", "kin"), [("/usr", "/usr/lib"), ("/usr/local", "/usr/local/lib"), ("/opt/clawpot", "/etc")])
def test_install_lays_down_and_uninstall_takes_away(make, tmp_path, prefix, kin):
    if os.geteuid() != 0:
        pytest.skip("what is installed is root's")
    dest = tmp_path / "dest"
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    done = make("install", PREFIX=prefix)
    assert done.returncode == 0, done.stderr
    laid = files(dest)
    unit_path = f"{kin if kin != '/etc' else '/etc'}/systemd/system/clawpot.service"
    assert {
        f"{prefix}/bin/clawpot",
        f"{prefix}/sbin/clawpot-server",
        f"{prefix}/sbin/clawpot-edge",
        f"{prefix}/sbin/clawpot-unpack",
        unit_path,
        f"{kin}/sysusers.d/clawpot.conf",
        f"{kin}/tmpfiles.d/clawpot.conf",
        "/etc/sysctl.d/60-clawpot.conf",
        f"{prefix}/share/man/man1/clawpot-run.1",
        f"{prefix}/share/man/man8/clawpot-server.8",
        f"{prefix}/share/bash-completion/completions/clawpot",
    } <= laid
    text = (dest / unit_path[1:]).read_text()
    assert f"ExecStart={prefix}/sbin/clawpot-server\n" in text
    assert "@" not in text.replace("make install", "")
    assert os.access(dest / prefix[1:] / "sbin/clawpot-server", os.X_OK)
    again = make("install", PREFIX=prefix)
    assert again.returncode == 0 and files(dest) == laid, again.stderr

    (dest / prefix[1:] / "bin/other").write_text("somebody else's")
    done = make("uninstall", PREFIX=prefix)
    assert done.returncode == 0, done.stderr
    assert files(dest) == {f"{prefix}/bin/other"}
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before


def tree_of(tmp_path: Path, version: str) -> Path:
    """As `install.sh` gathers it."""
    tree = tmp_path / version
    for name in ("bin/clawpot", "sbin/clawpot-server", "sbin/clawpot-unpack", "lib/systemd/system/clawpot.service"):
        file = tree / "usr/local" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(version)
    return tree


def place(tree: Path, dest: Path) -> subprocess.CompletedProcess[str]:
    words = [str(PACKAGING / "install.sh"), "place", str(tree)]
    return subprocess.run(words, env={**os.environ, "DESTDIR": str(dest)}, capture_output=True, text=True, check=False)


def events_in(directory: Path, act) -> set[tuple[str, str]]:
    """What inotify(7) tells of the files in it while `act` runs."""
    kinds = {0x2: "modified", 0x40: "moved away", 0x80: "moved in", 0x100: "created", 0x200: "deleted"}
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(handle, os.fsencode(directory), sum(kinds)) >= 0
        act()
        told, at, seen = os.read(handle, 1 << 20), 0, set()
        while at < len(told):
            _, mask, _, length = struct.unpack_from("iIII", told, at)
            name = told[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            seen |= {(word, name) for kind, word in kinds.items() if mask & kind}
            at += 16 + length
        return seen
    finally:
        os.close(handle)


@pytest.mark.skipif(os.geteuid() != 0, reason="what is installed is root's")
def test_each_file_is_the_old_one_or_the_new_one(tmp_path):
    """Whoever starts a program while it is replaced must not find none, nor half of it."""
    dest = tmp_path / "dest"
    assert place(tree_of(tmp_path, "1.0"), dest).returncode == 0
    done: list[subprocess.CompletedProcess[str]] = []
    seen = events_in(dest / "usr/local/sbin", lambda: done.append(place(tree_of(tmp_path, "2.0"), dest)))
    assert done[0].returncode == 0, done[0].stderr
    names = {"clawpot-server", "clawpot-unpack"}
    assert {event for event in seen if event[1] in names} == {("moved in", name) for name in names}
    assert {file.read_text() for file in dest.rglob("*") if file.is_file()} == {"2.0"}
    assert len(files(dest)) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="what is installed is root's")
def test_what_fails_leaves_the_old_version_as_it_was(tmp_path):
    dest = tmp_path / "dest"
    assert place(tree_of(tmp_path, "1.0"), dest).returncode == 0
    before = files(dest)
    tree = tree_of(tmp_path, "2.0")
    # No file can be made below a file.
    for name in ("a", "zz"):
        (dest / name).write_text("1.0")
        (tree / name).mkdir()
        (tree / name / "file").write_text("2.0")
    done = place(tree, dest)
    assert done.returncode != 0 and "nothing was replaced" in done.stderr, done.stderr
    assert {file.read_text() for file in dest.rglob("*") if file.is_file()} == {"1.0"}
    assert files(dest) == before | {"/a", "/zz"}


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_a_user_with_sudo_calls_it_once(built, tmp_path, verb):
    """A sudo that asks for a password, or looks its host's name up, is to do so once."""
    nobody = ["unshare", "--user", "--"]
    if subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    sudo = tmp_path / "sudo"
    sudo.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n')
    sudo.chmod(0o755)
    given = {"DESTDIR": f"{tmp_path}/dest", "BIN_DIR": str(built), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = [*nobody, "bash", str(PACKAGING / "install.sh"), verb]
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert asked.startswith("-- env PREFIX=") and f"DESTDIR={tmp_path}/dest" in asked
    assert (" place " if verb == "install" else " remove") in asked
    assert not (tmp_path / "dest").exists()


def test_the_group_is_the_one_that_the_server_looks_for():
    assert "\ng clawpot " in "\n" + (PACKAGING / "sysusers.conf").read_text()
    assert 'unwrap_or("clawpot")' in (REPO / "clawpot-server/src/socket.rs").read_text()


def test_every_sysctl_is_named_once_and_has_a_reason():
    lines = (PACKAGING / "sysctl.conf").read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith("#")]
    assert settings == ["net.ipv4.ip_forward = 1"]
    assert lines[0].startswith("#")
