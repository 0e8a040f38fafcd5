"""utils/monitor_build.py as it is run, against a server that plays Buildkite."""

import hashlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

import buildkite as client_module
import monitor_build
from fake_buildkite import COMMIT, PIPELINE, TOKEN, Answer, Buildkite, artifact, said, script

PROGRAM = Path(monitor_build.__file__)
#: Looks and waits are short here; nothing below depends on how short.
QUICK = ("--poll-interval", "0.02", "--retry-wait", "0.02", "--timeout", "120")


@pytest.fixture
def api() -> Iterator[Buildkite]:
    fake = Buildkite()
    yield fake
    fake.close()


@pytest.fixture
def run(api: Buildkite, tmp_path: Path):
    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        env = environment(api, **more)
        return subprocess.run(command(*words), capture_output=True, text=True, env=env, cwd=tmp_path, check=False)

    return run


@pytest.fixture
def until_time_is_up(run):
    """Runs it with little time; with more where all of it went by before the first answers, as on a machine that is busy."""

    def until_time_is_up(*words: str) -> subprocess.CompletedProcess[str]:
        for patience in ("1", "4", "16", "60"):
            done = run(*words, "--timeout", patience)
            if "there is no build" in done.stderr or "the build is still" in done.stderr:
                break
        return done

    return until_time_is_up


def command(*words: str) -> list[str]:
    return [sys.executable, str(PROGRAM), *QUICK, *(words or (COMMIT,))]


def environment(api: Buildkite, **more: str) -> dict[str, str]:
    # Nothing of this machine's own settings: a proxy would stand between us and loopback.
    kept = {"PATH": os.environ["PATH"], "BUILDKITE_API_TOKEN": TOKEN, "BUILDKITE_API_URL": api.api.url}
    return {name: value for name, value in {**kept, **more}.items() if value}


def asked(api: Buildkite, what: str) -> list[str]:
    return [path for path, _ in api.api.requests if what in path]


def sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def with_artifact(api: Buildkite, data: bytes, path: str = "report/junit.xml", state: str = "passed") -> None:
    job = script(1, state, step_key="unit-tests")
    api.look(state, job)
    api.artifacts = [artifact(1, job, path, len(data), sha1(data))]
    api.files[api.artifacts[0]["id"]] = data


# --- states


def test_each_change_of_state_is_one_line_and_a_passed_build_is_0(api, run):
    api.look("scheduled", script(1, "scheduled"), script(2, "waiting"), {"id": "w", "type": "waiter", "state": "waiting"})
    api.look("running", script(1, "running"), script(2, "waiting"))
    api.look("running", script(1, "passed"), script(2, "running"))
    api.look("running", script(1, "passed"), script(2, "running"))
    api.look("passed", script(1, "passed"), script(2, "passed"))
    done = run()
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1)[1].strip() for line in done.stdout.splitlines()]
    assert lines == [
        "build 7: https://buildkite.com/clawpot/clawpot/builds/7",
        "step 1: scheduled",
        "step 2: waiting",
        "build: scheduled",
        "step 1: scheduled → running",
        "build: running",
        "step 1: running → passed",
        "step 2: waiting → running",
        "step 2: running → passed",
        "build: passed",
        "build 7 passed: https://buildkite.com/clawpot/clawpot/builds/7",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("state", ["failed", "canceled", "skipped", "not_run"])
def test_any_other_end_is_1(api, run, state):
    api.look(state)
    assert run().returncode == 1


def test_a_build_that_appears_late_is_waited_for(api, run):
    api.look("passed")
    api.builds = []
    api.first = [said(404, {"message": "No pipeline found"}), said(200, []), said(200, [{"number": 7}])]
    done = run()
    assert done.returncode == 0, done.stderr
    assert "no build of 0123456789ab yet" in done.stdout


def test_of_several_builds_the_newest_counts_over_pages_too(api, run):
    api.look("passed")
    api.builds = [{"number": number} for number in (5, 7, 3)]
    api.page_size = 1
    done = run()
    assert done.returncode == 0, done.stderr
    assert "build 7, the newest of 3" in done.stdout
    assert len(asked(api, "commit=")) == 3


def test_a_blocked_build_says_that_it_waits_for_somebody(api, run):
    api.look("blocked", {"id": "m", "type": "manual", "label": "release?", "state": "blocked"})
    api.look("passed", {"id": "m", "type": "manual", "label": "release?", "state": "unblocked"})
    done = run()
    assert done.returncode == 0
    assert "release?: blocked" in done.stdout
    assert "waits until somebody unblocks it" in done.stdout


def test_time_over_before_the_end_is_3(api, until_time_is_up):
    api.look("running", script(1))
    done = until_time_is_up(COMMIT)
    assert done.returncode == 3
    assert "the build is still running" in done.stderr


def test_time_over_in_the_middle_of_a_look_says_what_the_last_one_showed(api, until_time_is_up):
    api.look("running", script(1))
    answer, seen, over = api.api.answer, False, threading.Event()

    def slow(path: str, headers: dict[str, str]) -> Answer:
        nonlocal seen
        if path.endswith("/builds/7"):
            if seen:
                over.wait()
            seen = True
        else:
            seen = False
        return answer(path, headers)

    api.api.answer = slow
    try:
        done = until_time_is_up(COMMIT)
    finally:
        over.set()
    assert done.returncode == 3
    assert "the build is still running" in done.stderr


def test_time_over_before_there_is_a_build_is_3(api, until_time_is_up):
    api.builds = []
    done = until_time_is_up(COMMIT)
    assert done.returncode == 3
    assert "is it pushed?" in done.stderr


# --- logs


def test_failed_jobs_show_their_clean_logs_and_no_other_does(api, run):
    bad, soft, good = script(1, "failed", exit_status=2), script(2, "failed", soft_failed=True), script(3, "passed")
    api.look("failed", bad, soft, good, script(4, "broken"), script(5, "timed_out"))
    for job in (soft, good):
        api.logs[job["id"]] = b"not to be shown\n"
    api.logs[bad["id"]] = (
        b"\x1b_bk;t=1732233441000\x07~~~ Running\r\n"
        b"\x1b_bk;t=1732233441001\x07\x1b[90m$\x1b[0m make\x1b[K\r\n"
        b"[2026-11-21T23:57:21Z] \x1b[31;1merror\x1b[0m: it broke\r\n"
        b" 10%\r 50%\r100%\r\n"
        b"\x1b]1338;url=http://evil;content=x\x07link \xff end\n"
        b"\x1b]0;title without end\n"
        b"last, without a line end"
    )
    done = run()
    assert done.returncode == 1
    start = done.stdout.index("===== log of step 1 (failed, exit status 2)")
    shown = done.stdout[start : done.stdout.index("===== end of step 1")].splitlines()[1:]
    assert shown == ["~~~ Running", "$ make", "error: it broke", "100%", "link � end", "", "last, without a line end"]
    assert "not to be shown" not in done.stdout
    assert "no more of the log" in done.stdout.split("log of step 5")[1], "a job without a log is no reason to stop"
    assert "log of step 4" not in done.stdout, "a broken job never ran"
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("plain", "plain"),
        ("\tindented\t", "\tindented\t"),
        ("\x1b[38;5;196mred\x1b[m", "red"),
        ("\x9b31mred", "red"),
        ("\x1b]8;;http://x\x1b\\text\x1b]8;;\x1b\\", "text"),
        ("\x1bP+q\x1b\\after", "after"),
        ("\x1b(Bascii\x1b=", "ascii"),
        ("half\x1b[3", "half"),
        ("half\x1b", "half"),
        ("a\bb\b\b\bc", "c"),
        ("50%\r\x1b[K", "50%"),
        ("bell\x07 nul\x00 del\x7f", "bell nul del"),
        ("naïve — ✓", "naïve — ✓"),
        ("[2026-01-02T03:04:05.678+01:00] x", "x"),
        ("[not a time] x", "[not a time] x"),
    ],
)
def test_cleaning(line, left):
    assert monitor_build.clean(line + "\n") == left


def test_cleaning_a_hostile_line_takes_no_long_time():
    began = time.monotonic()
    for line in ("a\b" * 300_000, "\x1b]" * 300_000, "\x1b[0;" * 200_000, "\r" * 600_000, "\x1b_" + "x" * 600_000):
        monitor_build.clean(line)
    assert time.monotonic() - began < 20


def test_a_log_that_breaks_off_is_read_again_and_shown_once(api, run):
    job = script(1, "failed")
    api.look("failed", job)
    api.logs[job["id"]] = b"one\ntwo\nthree\n"
    api.instead = [("log.txt", (200, {"Content-Length": "14"}, b"one\ntw"))]
    done = run()
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("one", "tw", "two", "three")] == ["one", "two", "three"]


# --- artifacts, and what may not get the token


def test_artifacts_come_from_the_store_without_the_token(api, run, tmp_path):
    with_artifact(api, b"<xml/>")
    done = run()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target/builds/build-7/unit-tests-00000001/report/junit.xml").read_bytes() == b"<xml/>"
    assert len(api.store.requests) == 1
    path, headers = api.store.requests[0]
    assert "X-Signature=secret" in path
    assert not [name for name in headers if "auth" in name or "cookie" in name]
    assert TOKEN not in str(api.store.requests)
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, headers in api.api.requests)
    assert TOKEN not in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr

    run()
    assert len(api.store.requests) == 1, "what is there and whole is not fetched again"


def test_a_log_may_be_elsewhere_too(api, run):
    job = script(1, "failed")
    api.look("failed", job)
    api.files["log"] = b"from the store\n"
    api.instead = [("log.txt", (302, {"Location": f"{api.store.url}/log?sig=1"}, b""))]
    assert "from the store" in run().stdout
    assert "authorization" not in api.store.requests[0][1]


@pytest.mark.parametrize(
    "path",
    ["../out", "a/../../out", "/etc/out", "a//b", "..", ".", "", "a\\..\\..\\out", "nul\0name", "new\nline", "x" * 300],
)
def test_a_path_that_leads_out_is_refused(api, run, tmp_path, path):
    with_artifact(api, b"x", path)
    before = {found for found in tmp_path.rglob("*") if found.is_file()}
    done = run()
    assert done.returncode == 0, "the build has passed all the same"
    assert "leads out of the directory" in done.stderr
    assert {found for found in tmp_path.rglob("*") if found.is_file()} == before
    assert not api.store.requests
    assert "\0" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_link_in_the_way_is_not_followed(api, run, tmp_path):
    with_artifact(api, b"x", "sub/file")
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "target/builds/build-7/unit-tests-00000001"
    folder.mkdir(parents=True)
    (folder / "sub").symlink_to(outside)
    assert "a link or directory is in its place" in run().stderr
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    ("sent", "said_of_it"),
    [(b"other", "its SHA-1 is"), (b"much too long", "longer than")],
)
def test_an_artifact_that_is_not_what_was_listed_is_not_kept(api, run, tmp_path, sent, said_of_it):
    with_artifact(api, b"right")
    api.files[api.artifacts[0]["id"]] = sent
    done = run()
    assert said_of_it in done.stderr
    assert not [found for found in (tmp_path / "target").rglob("*") if found.is_file()]


def test_a_download_that_breaks_off_is_fetched_again(api, run, tmp_path):
    with_artifact(api, b"0123456789")
    api.instead = [("/download$", (200, {"Content-Length": "10"}, b"0123"))]
    done = run()
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "target/builds/build-7/unit-tests-00000001/report/junit.xml").read_bytes() == b"0123456789"


def test_artifacts_over_pages_and_not_finished_ones(api, run, tmp_path):
    with_artifact(api, b"a", "one")
    job = api.looks[0]["jobs"][0]
    api.artifacts += [artifact(n, job, f"file{n}", 1, sha1(b"a")) for n in (2, 3)]
    api.artifacts[2]["state"] = "expired"
    api.files |= {one["id"]: b"a" for one in api.artifacts}
    api.page_size = 1
    done = run()
    assert "2 fetched" in done.stdout
    assert "file3: expired" in done.stderr


def test_no_artifacts(api, run):
    with_artifact(api, b"a")
    run(COMMIT, "--no-artifacts")
    assert not asked(api, "artifacts")


def test_a_next_page_elsewhere_is_not_asked(api, run):
    api.look("passed")
    api.first = [(200, {"Link": f'<{api.store.url}/builds>; rel="next"'}, b"[]")]
    done = run()
    assert done.returncode == 4
    assert "not the API" in done.stderr
    assert not api.store.requests


def test_a_redirect_away_from_the_api_never_carries_the_token(api, run):
    api.look("passed")
    api.files["steal"] = b"[]"
    api.first = [(status, {"Location": f"{api.store.url}/steal"}, b"") for status in (301, 307, 308)]
    assert run().returncode == 0
    assert len(api.store.requests) == 3
    assert not [headers for _, headers in api.store.requests if "authorization" in headers]


def test_redirects_without_end(api, run):
    api.look("passed")
    api.first = [(302, {"Location": f"{api.api.url}{PIPELINE}/builds"}, b"")] * 20
    done = run()
    assert done.returncode == 4
    assert "redirects" in done.stderr


# --- refusals and bad days


@pytest.mark.parametrize(("status", "hint"), [(401, "token is not valid"), (403, "scopes"), (422, "422")])
def test_a_refusal_is_4_at_once(api, run, status, hint):
    api.look("passed")
    api.first = [said(status, {"message": "no"})]
    done = run()
    assert done.returncode == 4
    assert hint in done.stderr
    assert len(api.api.requests) == 1
    assert TOKEN not in done.stderr


def test_a_wrong_token_is_4(api, run):
    api.look("passed")
    done = run(BUILDKITE_API_TOKEN="wrong")
    assert done.returncode == 4


USER_LIMIT = {
    "RateLimit-User-Remaining": "0",
    "RateLimit-User-Reset": "1",
    "RateLimit-Remaining": "9",
    "RateLimit-Reset": "500",
}


@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, USER_LIMIT])
def test_429_is_waited_out_as_long_as_it_says(api, run, headers):
    api.look("passed")
    api.first = [said(429, {}, **headers)]
    began = time.monotonic()
    done = run()
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began >= 1.0


def test_429_beyond_the_time_we_have_is_told_at_once(api, run):
    api.look("passed")
    api.first = [said(429, {}, **{"Retry-After": "3000"})]
    done = run()
    assert done.returncode == 3
    assert "429" in done.stderr and "3000" in done.stderr


def test_a_log_that_is_not_to_be_had_in_time_changes_nothing_of_the_result(api, run, tmp_path):
    first, second = (script(number, "failed", exit_status=1, step_key=f"step-{number}") for number in (1, 2))
    api.look("failed", first, second)
    api.logs = {second["id"]: b"what the second said\n"}
    api.instead = [(r"/log\.txt", said(429, {"message": "slow down"}, **{"Retry-After": "700"}))]
    data = b"<testsuites/>"
    api.artifacts = [artifact(1, second, "junit.xml", len(data), sha1(data))]
    api.files[api.artifacts[0]["id"]] = data
    done = run()
    assert done.returncode == 1, done
    assert "(no more of the log: HTTP 429, to be asked again in 700 s)" in done.stdout
    assert "what the second said" in done.stdout
    assert [path.read_bytes() for path in tmp_path.rglob("junit.xml")] == [data]
    assert "build 7 failed" in done.stdout and "no end within" not in done.stderr


def test_retry_after_as_a_date(api, run):
    api.look("passed")
    began = time.monotonic()
    api.first = [said(503, {}, **{"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))})]
    assert run().returncode == 0
    assert time.monotonic() - began >= 0.9


def test_5xx_and_broken_answers_are_tried_again(api, run):
    api.look("passed")
    api.first = [
        said(500, {}),
        said(502, {}),
        (200, {"Content-Length": "500"}, b'[{"number'),
        said(503, {}),
    ]
    done = run()
    assert done.returncode == 0, done.stderr
    assert len(asked(api, "commit=")) == 5


def test_5xx_for_ever_is_4(api, run):
    api.look("passed")
    api.first = [said(500, {})] * 100
    done = run()
    assert done.returncode == 4
    assert len(api.api.requests) == client_module.TRIES


def test_waits_double(monkeypatch):
    waits: list[float] = []
    fake = Buildkite()
    try:
        fake.first = [said(500, {})] * 100
        client = client_module.Client(fake.api.url, TOKEN, time.monotonic() + 1000)
        monkeypatch.setattr(client, "sleep", lambda seconds, why="": waits.append(seconds))
        with pytest.raises(client_module.ApiError):
            client.get("/v2")
    finally:
        fake.close()
    assert len(waits) == client_module.TRIES - 1
    assert all(0.75 * 2**n <= wait <= 1.25 * 2**n for n, wait in enumerate(waits[:5]))
    assert max(waits) <= client_module.LONGEST_WAIT * 1.25


def test_nobody_listens_is_4(api, run):
    api.close()
    done = run()
    assert done.returncode == 4
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("body", [b"<html>login</html>", b"{}", b"[1, 2]", b"\xff\xfe"])
def test_nonsense_is_told_and_no_traceback(api, run, body):
    api.look("passed")
    api.first = [(200, {}, body)]
    done = run()
    # What is in a list and is no build is passed over.
    assert done.returncode == (0 if body == b"[1, 2]" else 4)
    assert "Traceback" not in done.stderr


# --- usage


@pytest.mark.parametrize(
    ("words", "more", "said_of_it"),
    [
        ((COMMIT,), {"BUILDKITE_API_TOKEN": ""}, "BUILDKITE_API_TOKEN"),
        (("abc",), {}, "no such commit"),
        (("--output=/tmp/x",), {}, "usage"),
        ((COMMIT, "--org", "../x"), {}, "slug"),
        ((COMMIT, "--timeout", "-1"), {}, "seconds"),
    ],
)
def test_wrong_usage_is_2(api, run, words, more, said_of_it):
    done = run(*words, **more)
    assert done.returncode == 2
    assert said_of_it in done.stderr
    assert not api.api.requests


def test_http_to_another_machine_is_refused(api, run):
    done = run(BUILDKITE_API_URL="http://api.example.com")
    assert done.returncode == 4
    assert "unencrypted" in done.stderr


def test_head_is_resolved_by_git(api, until_time_is_up, tmp_path):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    api.builds = []
    done = until_time_is_up("HEAD")
    assert done.returncode == 3
    assert asked(api, f"commit={commit}")
    assert "is it pushed?" in done.stderr


# --- signals and terminals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_it_in_order(api, tmp_path, number, status):
    api.look("running", script(1))
    with subprocess.Popen(command(), stdout=PIPE, stderr=PIPE, text=True, env=environment(api), cwd=tmp_path) as process:
        assert process.stdout and process.stderr
        while "build: running" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == status
        assert "Traceback" not in process.stderr.read()


def test_ctrl_c_in_a_download_keeps_no_half_file(api, tmp_path):
    with_artifact(api, b"x" * 10)
    name = api.artifacts[0]["id"]

    def slow(path: str, headers: dict[str, str]) -> Answer:
        time.sleep(30)
        return 200, {}, api.files[name]

    api.store.answer = slow
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(api), cwd=tmp_path
    ) as process:
        while not api.store.requests:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not [found for found in tmp_path.rglob("*") if found.is_file()]


def test_a_reader_that_leaves_is_no_traceback(api, tmp_path):
    api.look("running", script(1))
    for state in ("waiting", "running") * 50:
        api.look("running", script(1, state))
    with subprocess.Popen(
        command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(api), cwd=tmp_path
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("more", "colored"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colors_only_on_a_terminal_that_wants_them(api, tmp_path, more, colored):
    api.look("passed", script(1, "passed"))
    ours, theirs = pty.openpty()
    env = environment(api, TERM="xterm") | more
    with subprocess.Popen(command(), stdout=theirs, env=env, cwd=tmp_path) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.wait(60) == 0
    os.close(ours)
    assert (b"\x1b[32mpassed" in shown) is colored


def test_names_cannot_steer_the_terminal(api, run):
    api.look("passed", script(1, "passed", name="evil\x1b]0;title\x07\x1b[2Jname\nnew line"))
    done = run()
    assert "\x1b" not in done.stdout
    assert "evilnamenew line: passed" in done.stdout
