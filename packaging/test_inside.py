"""Run by packaging/test-in-vm as root in a VM whose PID 1 is systemd, from the unpacked package. Changes that machine.

One story, as its steps depend on each other: the first that fails ends it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATE = Path("/var/lib/clawpot")
UNIT = Path("/usr/lib/systemd/system/clawpot.service")
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
#: Two levels of emulation: a guest's boot takes half a minute.
PATIENCE = 600


def run(*words: str, check: bool = True, seconds: float = PATIENCE, **more: object) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, **more)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as late:
        said = b"".join(part for part in (late.stdout, late.stderr) if part).decode(errors="replace")
        tree = subprocess.run(("ps", "axfo", "pid,stat,etime,args"), capture_output=True, text=True, check=False).stdout
        raise AssertionError(f"{' '.join(words)}: not done within {seconds:.0f} s; it said:\n{said}\n{tree}") from late
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def show(name: str) -> str:
    return run("systemctl", "show", "clawpot", "--property", name, "--value").stdout.strip()


def until(what: str, holds, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def install(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # Not as root: what the script does for an ordinary user with sudo.
    environment = ["PREFIX=/usr", f"BIN_DIR={ROOT}/bin"]
    command = ["runuser", "-u", "installer", "--", "env", *environment, str(ROOT / "packaging/install.sh"), *words]
    return run(*command, check=check)


class Vm:
    """The VM `web`, and what must stay the same of it."""

    def __init__(self) -> None:
        said = json.loads(run("clawpot", "inspect", "web", "-o", "json").stdout)
        self.id = (said[0] if isinstance(said, list) else said)["id"]
        self.groups = [path.parent for path in Path("/sys/fs/cgroup").rglob(f"{self.id}-*/cgroup.procs")]
        self.before = self.now()

    def processes(self) -> dict[str, str]:
        pids = {pid for group in self.groups for pid in (group / "cgroup.procs").read_text().split()}
        # The 22nd field of stat: when it was started, which with its pid is one process and no other.
        return {pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19] for pid in pids}

    def now(self) -> tuple[object, ...]:
        limits = {name: (group / name).read_text() for group in self.groups for name in ("memory.max", "pids.max")}
        inside = run("clawpot", "exec", "web", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
        return self.processes(), limits, inside, self.namespace()

    def namespace(self) -> str:
        """The name in /run/netns of the network namespace that its VMM is in: its mount is there for everybody."""
        theirs = {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in self.processes()}
        found = [path.name for path in Path("/run/netns").iterdir() if path.stat().st_ino in theirs]
        assert len(found) == 1, f"{found}: not one of those in /run/netns"
        assert "tap0" in run("ip", "-n", found[0], "-o", "link").stdout
        return found[0]

    def is_untouched(self) -> None:
        now = self.now()
        assert now == self.before, f"{now} != {self.before}"


def shares_our_mounts() -> None:
    pid = show("MainPID")
    assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/1/ns/mnt"), "a mount namespace of its own"


def installed() -> None:
    # sudo looks its host's name up each time, and there is no network here that would answer.
    with Path("/etc/hosts").open("a") as hosts:
        hosts.write(f"127.0.1.1 {os.uname().nodename}\n")
    run("useradd", "--create-home", "installer")
    Path("/etc/sudoers.d/installer").write_text("installer ALL=(ALL) NOPASSWD: ALL\n")
    FORWARD.write_text("0\n")
    done = install("install")
    assert "✓ installed" in done.stdout, done.stdout
    assert FORWARD.read_text().strip() == "1"
    assert "clawpot" in run("getent", "group", "clawpot").stdout
    verified = run("systemd-analyze", "verify", "--man=no", str(UNIT))
    assert "clawpot.service" not in verified.stderr, verified.stderr
    install("install")
    shutil.copytree(ROOT / "assets", STATE / "images")
    for blob in (STATE / "images/blobs/sha256").iterdir():
        blob.chmod(0o444)
    fetch_firecracker()


def fetch_firecracker() -> None:
    """As scripts/install-vm-assets.sh leaves it, and nowhere else: the unit's server is to find it there."""
    found = shutil.which("firecracker")
    if not found or not Path("/dev/kvm").exists():
        print("  QEMU runs the VM: no firecracker or no /dev/kvm in this machine")
        return
    version = run(found, "--version").stdout.split()[1]
    fetched = STATE / "images/firecracker" / version
    fetched.mkdir(parents=True)
    for name in ("firecracker", "jailer"):
        Path(found).with_name(name).rename(fetched / name)
    assert not shutil.which("firecracker")


def started() -> None:
    Path("/etc/clawpot").mkdir()
    Path("/etc/clawpot/server.toml").write_text(f"boot_timeout_secs = {PATIENCE}\nprobe_timeout_secs = 120\n")
    run("systemctl", "enable", "--now", "clawpot")
    assert show("ActiveState") == "active", "Type=notify: it is active when it says so, and not before"
    host = json.loads(run("clawpot", "host", "-o", "json").stdout)
    print(f"  VMs run on {host['vmm']}: {host['vmm_reason']}")
    expected = "firecracker" if (STATE / "images/firecracker").exists() else "qemu"
    assert host["vmm"] == expected, host["vmm_reason"]
    shares_our_mounts()
    run("clawpot", "create", "debian", "--name", "web", "--memory", "128")
    until("web runs", lambda: "running" in run("clawpot", "ls").stdout.lower(), PATIENCE)


def who_may_call() -> None:
    run("useradd", "--groups", "clawpot", "friend")
    run("useradd", "stranger")
    assert "web" in run("runuser", "-u", "friend", "--", "clawpot", "ls").stdout
    refused = run("runuser", "-u", "stranger", "--", "clawpot", "ls", check=False)
    assert refused.returncode != 0 and "web" not in refused.stdout
    assert "may not open" in refused.stderr, refused.stderr


def restarted(vm: Vm) -> None:
    before = show("MainPID")
    run("systemctl", "restart", "clawpot")
    assert show("MainPID") != before
    vm.is_untouched()
    shares_our_mounts()


def killed(vm: Vm) -> None:
    before = show("MainPID")
    os.kill(int(before), signal.SIGKILL)
    until("systemd started another", lambda: show("MainPID") not in ("0", before) and show("ActiveState") == "active")
    vm.is_untouched()


def stopped_and_started(vm: Vm) -> None:
    run("systemctl", "stop", "clawpot")
    assert vm.processes() == vm.before[0], "stopping the unit ended the VM"
    assert run("clawpot", "ls", check=False).returncode != 0
    run("systemctl", "start", "clawpot")
    vm.is_untouched()


def systemd_anew(vm: Vm) -> None:
    """What systemd does to control groups when it thinks all over: ours are none of its units'."""
    run("systemctl", "daemon-reload")
    run("systemctl", "daemon-reexec")
    run("systemd-run", "--wait", "--quiet", "--property=MemoryMax=64M", "--property=TasksMax=10", "true")
    vm.is_untouched()


def uninstalled(vm: Vm) -> None:
    refused = install("uninstall", check=False)
    assert refused.returncode != 0 and "still run" in refused.stderr, refused.stderr
    assert show("ActiveState") == "active"
    vm.is_untouched()
    # A VM that is stopped keeps its record and its disk, and nothing of the host.
    run("clawpot", "stop", "web")
    done = install("uninstall")
    assert "net.ipv4.ip_forward is 0 again" in done.stdout, done.stdout
    assert FORWARD.read_text().strip() == "0"
    gone = ("/usr/bin/clawpot", "/usr/sbin/clawpot-server", str(UNIT), "/etc/sysctl.d/60-clawpot.conf")
    left = [path for path in gone if os.path.exists(path)]
    assert not left, left
    assert show("LoadState") == "not-found"
    assert STATE.exists()
    assert not [path.name for path in Path("/run/netns").glob("cp*")]
    assert not [path for path in Path("/sys/fs/cgroup").glob("clawpot/*") if path.is_dir()]
    assert "clawpot" not in run("nft", "list", "tables").stdout
    assert not run("pgrep", "-x", "clawpot-edge", check=False).stdout, run("ps", "axfo", "pid,stat,args").stdout
    assert [path.name for path in Path("/run/clawpot/blocks").iterdir()] == ["lock"]
    addresses = run("ip", "-o", "-4", "address", "show", "dev", "lo").stdout.splitlines()
    assert len(addresses) == 1 and "127.0.0.1" in addresses[0], addresses
    assert list(STATE.glob("disks/*"))


def main() -> int:
    vm: Vm | None = None
    for step in (installed, started, who_may_call, restarted, killed, stopped_and_started, systemd_anew, uninstalled):
        begun = time.monotonic()
        try:
            if step.__code__.co_argcount:
                vm = vm or Vm()
                step(vm)  # type: ignore[call-arg]
            else:
                step()  # type: ignore[call-arg]
        except (AssertionError, OSError) as error:
            print(f"✗ {step.__name__}: {error}")
            print(run("journalctl", "-u", "clawpot", "-n", "60", "--no-pager", check=False).stdout)
            return 1
        print(f"✓ {step.__name__}  {time.monotonic() - begun:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
