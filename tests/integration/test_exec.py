"""A command in a VM behaves as a command here: streams, exit codes, signals, limits."""

import hashlib
import signal
import subprocess
import time

import pytest

from harness.api import Api
from harness.server import Server
from harness.tools import until, within

MIB = 1 << 20


@pytest.mark.firecracker
def test_hello_from_one_command_and_nothing_is_left(server: Server) -> None:
    before = server.steady()
    done = server.cli("run", "--rm", "debian", "--", "uname", "-a").ok()
    assert done.text.startswith("Linux ") and done.text.count("\n") == 1
    assert not server.settle(before)


@pytest.mark.firecracker
@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("kill -SEGV $$", 139)],
)
def test_the_exit_code_inside_is_the_exit_code_outside(server: Server, vm: str, script: str, code: int) -> None:
    assert server.cli.sh(vm, script).code == code


@pytest.mark.firecracker
def test_standard_error_is_kept_apart(server: Server, vm: str) -> None:
    done = server.cli.sh(vm, "echo out; echo err >&2; echo out2").ok()
    assert done.text == "out\nout2\n"
    assert done.stderr == "err\n"


def test_64_mib_through_a_guest_and_back(server: Server, vm: str) -> None:
    block = hashlib.sha512(b"clawpot").digest() * (MIB // 64)
    data = b"".join(bytes([n]) + block[1:] for n in range(64))
    done = server.cli("exec", vm, "--", "cat", stdin=data, timeout=250).ok()
    assert len(done.stdout) == len(data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    print(f"64 MiB in and out in {done.seconds:.1f} s")


@pytest.mark.firecracker
def test_a_command_that_reads_no_input_ends_all_the_same(server: Server, vm: str) -> None:
    done = server.cli("exec", vm, "--", "head", "-c", "3", stdin=b"x" * (8 * MIB)).ok()
    assert done.stdout == b"xxx"


def test_output_that_nobody_reads_waits_in_constant_memory(server: Server, vm: str) -> None:
    """The reader stops; the writer inside stops too, and goes on when it is read again."""

    def resident() -> int:
        return int(until(lambda: _status(server.pid).get("VmRSS")).split()[0])

    # What it takes when it passes something on, which stays with it.
    server.cli("exec", vm, "--", "head", "-c", "1000000", "/dev/zero").ok()
    before = resident()
    slow = server.cli.start("exec", vm, "--", "sh", "-c", "head -c 67108864 /dev/zero; echo end >&2", bufsize=0)
    assert slow.stdout is not None
    slow.stdout.read(1)
    time.sleep(2)
    grown = resident() - before
    print(f"server holds {grown} KiB more")
    assert grown < 32 * 1024, f"server holds {grown} KiB more"
    assert slow.poll() is None
    rest, errors = slow.communicate(timeout=within(200))
    assert (len(rest), errors) == (67108863, b"end\n")


def _status(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def test_environment_directory_and_user(server: Server, vm: str) -> None:
    options = ("-e", "GREETING=hello there", "-w", "/tmp", "-u", "1234:5678")
    done = server.cli.sh(vm, 'echo "$GREETING $(pwd) $(id -u):$(id -g)"', *options).ok()
    assert done.text == "hello there /tmp 1234:5678\n"


def test_the_name_is_the_hostname(server: Server, vm: str) -> None:
    assert server.cli("exec", vm, "--", "uname", "-n").ok().text == f"{vm}\n"


def test_a_timeout_kills_the_whole_tree(server: Server, vm: str) -> None:
    """Also who fled into a session of his own, or lost his parent."""
    script = "setsid sleep 4711 & (setsid sh -c 'sleep 4712; sleep 4713' &) ; trap '' TERM; sleep 4714; sleep 4715"
    done = server.cli.sh(vm, script, "--timeout", "2s")
    done.fails(124)
    assert done.seconds < within(60), "not the end of its sleeps"
    assert server.cli.sh(vm, "grep -lazE '^sleep.471' /proc/[0-9]*/cmdline; true").ok().text == ""


def test_what_a_command_leaves_behind_does_not_hold_it_up(server: Server, vm: str) -> None:
    """A background process that keeps the output open: the exec ends with its main process, and so does that process."""
    done = server.cli.sh(vm, "sleep 4720 & echo started").ok()
    assert done.text == "started\n"


@pytest.mark.firecracker
def test_a_signal_to_the_command_line_reaches_the_command(server: Server, vm: str) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    process = server.cli.start("exec", vm, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=within(60))
    assert (out, process.returncode) == (b"caught\n", 3), errors


@pytest.mark.firecracker
def test_a_terminal(server: Server, vm: str) -> None:
    done = server.cli("exec", "-t", vm, "--", "sh", "-c", "test -t 0 && test -t 1 && tty", stdin=b"").ok()
    assert done.text.startswith("/dev/pts/")


def test_a_program_that_is_not_there(server: Server, vm: str) -> None:
    server.cli("exec", vm, "--", "no-such-program").fails(127, "no-such-program", "not found")


def test_a_directory_is_no_program(server: Server, vm: str) -> None:
    server.cli("exec", vm, "--", "/etc").fails(126, "/etc", "cannot be executed", "directory")


def test_another_user_in_a_directory_of_roots(server: Server, vm: str) -> None:
    """Debian's image begins in /root, which nobody else may enter: no reason to run nothing there as somebody else."""
    assert server.cli.sh(vm, "id -un; pwd", "-u", "nobody").ok().text == "nobody\n/root\n"
    server.cli.sh(vm, "ls", "-u", "nobody").fails(2, "Permission denied")


def test_no_such_directory_or_user(server: Server, vm: str) -> None:
    server.cli("exec", "-w", "/nowhere", vm, "--", "true").fails(126, "working directory", "/nowhere")
    server.cli("exec", "-u", "nobody-such", vm, "--", "true").fails(125, "user", "nobody-such")


# Arguments that this machine's kernel would refuse, too, cannot be given to the command line: they go through the API.
def _exec_through_the_api(server: Server, vm: str, argv: list[bytes]) -> list[object]:
    start = {"vm": vm, "exec_id": hashlib.sha256(repr(time.time()).encode()).hexdigest()[:16], "argv": argv}
    with Api(server.socket) as api:
        return list(api.stream("VmService", "Exec", iter([{"start": start}])))


def test_one_mib_in_one_argument_is_too_long(server: Server, vm: str) -> None:
    last = _exec_through_the_api(server, vm, [b"echo", b"x" * MIB])[-1]
    assert last.failed.reason == 3  # TOO_LONG
    assert "argument" in last.failed.message.lower() or "E2BIG" in last.failed.message, last.failed.message


def test_one_mib_of_arguments_works(server: Server, vm: str) -> None:
    argv = [b"sh", b"-c", b'echo "$# ${#1}"', b"sh", *[b"y" * 8191] * 128]
    frames = _exec_through_the_api(server, vm, argv)
    out = b"".join(frame.stdout.data for frame in frames if frame.HasField("stdout"))
    assert out == b"128 8191\n", frames[-1]
    assert frames[-1].exited.code == 0


def test_one_mib_of_arguments_on_the_command_line(server: Server, vm: str) -> None:
    words = ["y" * 8191] * 128
    assert server.cli("exec", vm, "--", "sh", "-c", 'echo "$#"', "sh", *words).ok().text == "128\n"


def test_a_client_that_vanishes_harms_nothing(server: Server, vm: str) -> None:
    """Killed without a word: its command runs on, the server and the VM are as they were."""
    # It goes on until it is told that it is enough; what it writes is there as a whole.
    count = "i=$((i+1)); echo $i > /tmp/vanished.new; mv /tmp/vanished.new /tmp/vanished; sleep 0.2"
    script = f"echo ready; i=0; until [ -e /tmp/enough ]; do {count}; done; echo over > /tmp/vanished"
    server.cli.sh(vm, "rm -f /tmp/enough; echo 0 > /tmp/vanished").ok()
    process = server.cli.start("exec", vm, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()

    def written() -> str:
        return server.cli.sh(vm, "cat /tmp/vanished").ok().text.strip()

    first = int(written())
    until(lambda: int(written()) > first, what="more of it")
    server.cli.sh(vm, "touch /tmp/enough").ok()
    until(lambda: written() == "over", what="the end of the command")


def test_many_at_once(server: Server, vm: str) -> None:
    running = [server.cli.start("exec", vm, "--", "sh", "-c", f"sleep 1; echo {n}; exit {n}") for n in range(12)]
    ended = [process.communicate(timeout=within(120))[0] for process in running]
    assert ended == [f"{n}\n".encode() for n in range(12)]
    assert [process.returncode for process in running] == list(range(12))


def test_a_closed_pipe_ends_the_command_line_quietly(server: Server, vm: str) -> None:
    process = server.cli.start("exec", vm, "--", "sh", "-c", "while :; do echo y; done")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(2)
    process.stdout.close()
    try:
        process.wait(within(60))
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert b"panicked" not in process.stderr.read()


def test_a_guest_without_memory(server: Server, vm: str) -> None:
    """The one that takes it all is killed; the agent and the VM are not."""
    assert server.cli("exec", vm, "--", "tail", "/dev/zero", timeout=250).code == 137
    assert server.cli.sh(vm, "echo alive").ok().text == "alive\n"


# Half a minute where the host has nothing else to do: the guest's only processor is shared by hundreds, in an emulator.
def test_a_fork_bomb(server: Server, vm: str) -> None:
    """It can use up the guest; its timeout clears all of it away."""
    bomb = server.cli("exec", "--timeout", "4s", vm, "--", "bash", "-c", "b() { b | b & }; b; sleep 100", timeout=300)
    assert bomb.code in (124, 137), bomb
    assert server.cli.sh(vm, "echo alive; ls -d /proc/[0-9]* | wc -l").ok().text.startswith("alive\n")
    count = server.cli.sh(vm, "grep -lzx '[b]ash' /proc/[0-9]*/cmdline | wc -l").text
    assert int(count) == 0, f"{count} of them live"


def test_arguments_are_bytes(server: Server, vm: str) -> None:
    done = server.cli("exec", vm, "--", "printf", "%s", b"\xff\xfe ok".decode("utf-8", "surrogateescape")).ok()
    assert done.stdout == b"\xff\xfe ok"


def test_input_that_is_not_read_holds_nothing_up(server: Server, vm: str) -> None:
    with open("/dev/zero", "rb") as endless:
        process = server.cli.start("exec", vm, "--", "sh", "-c", "echo ready; exec sleep 1000", stdin=endless)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        # Until its way is full.
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=within(60))
    assert process.returncode == 130
