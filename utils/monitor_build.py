#!/usr/bin/env python3
"""Follows the Buildkite build of a commit to its end.

Prints each change of a job's state; when the build has failed, the logs of the failed jobs without their escape
sequences; and fetches all artifacts.

exit status:
  0    the build passed
  1    it ended otherwise: failed, canceled, skipped, not run
  2    wrong usage: no such commit, no token
  3    --timeout was over before the build was (or before there was one)
  4    the API refused or cannot be reached
  130  Ctrl-C (143: SIGTERM; 141: nobody reads our output); the build goes on

environment:
  BUILDKITE_API_TOKEN          an API token with read_builds, read_build_logs, read_artifacts
  BUILDKITE_ORGANIZATION_SLUG  default of --org; BUILDKITE_PIPELINE_SLUG that of --pipeline
  BUILDKITE_API_URL            default of --api
  NO_COLOR                     no colours; there are none either where the output is no terminal
"""

import argparse
import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from buildkite import ApiError, Client, TimeIsUp

PASSED, FAILED, USAGE, TIMEOUT, API, NO_READER = 0, 1, 2, 3, 4, 141
ENDED = {"passed", "failed", "canceled", "skipped", "not_run"}
#: A job that ended in one of these took the build with it, unless its failure is soft. Others (broken, waiting_failed)
#: never ran.
JOB_FAILED = {"failed", "timed_out", "canceled", "expired"}
#: For logs and artifacts after the build's end, seconds; --timeout is for the build alone.
AFTERWARDS = 600.0
#: A log's line is cut here, bytes, so that a log without line ends needs no memory.
LINE_LIMIT = 1 << 20
COLORS = {"passed": "32", "failed": "31", "timed_out": "31", "canceled": "33", "running": "36"}


class Usage(Exception):
    pass


class Printer:
    """What goes to people: one line at a time, nothing in it that could steer their terminal."""

    def __init__(self) -> None:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        self.color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}")

    def paint(self, state: str) -> str:
        shown = clean(str(state)) or "?"
        return f"\x1b[{COLORS[shown]}m{shown}\x1b[0m" if self.color and shown in COLORS else shown

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)


# --- logs

#: Strings that end with BEL or ST (OSC, APC with Buildkite's times of lines, DCS, PM, SOS), control sequences, other escapes.
ESCAPES = re.compile(r"\x1b[\]_PX^].*?(?:\x07|\x1b\\|\x9c|$)|(?:\x1b\[|\x9b)[0-?]*[ -/]*(?:[@-~]|$)|\x1b[ -/]*(?:[0-~]|$)")
CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
#: What the agent writes before each line with --timestamp-lines.
LINE_TIME = re.compile(r"^\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)\] ?")


def clean(line: str) -> str:
    """A line as a terminal would leave it: of what a progress display wrote over itself only the last state."""
    line = ESCAPES.sub("", line.rstrip("\r\n"))
    shown = [part for part in line.split("\r") if part]
    line = shown[-1] if shown else ""
    if "\b" in line:
        kept: list[str] = []
        for letter in line:
            if letter != "\b":
                kept.append(letter)
            elif kept:
                kept.pop()
        line = "".join(kept)
    return LINE_TIME.sub("", CONTROLS.sub("", line))


def print_log(printer: Printer, client: Client, where: str, job: dict[str, Any]) -> None:
    print(f"\n===== log of {job_name(job)} ({printer.paint(job['state'])}, exit status {job.get('exit_status')}) =====")
    printed = 0

    def rest(log: http.client.HTTPResponse) -> None:
        """Prints what was not printed yet: a connection that breaks makes no line appear twice."""
        nonlocal printed
        for number, line in enumerate(iter(lambda: log.readline(LINE_LIMIT), b"")):
            if log.length and not line.endswith(b"\n") and len(line) < LINE_LIMIT:
                break
            if number >= printed:
                print(clean(line.decode(errors="replace")))
                printed = number + 1
        if log.length:
            raise http.client.IncompleteRead(b"", log.length)

    try:
        client.download(f"{where}/jobs/{job_id(job)}/log.txt", rest, "text/plain")
    except (ApiError, TimeIsUp) as error:
        # How the build ended is known by now, and its other logs and artifacts may be had.
        print(f"(no more of the log: {str(error) or 'no time left'})")
    print(f"===== end of {job_name(job)} =====\n")


# --- artifacts


def safe_path(said: str) -> Path | None:
    """An artifact's path below the directory it goes to, or nothing when it is one that leads out of it."""
    parts = said.replace("\\", "/").split("/")
    if any(part in ("", ".", "..") or CONTROLS.search(part) or len(part.encode()) > 255 for part in parts):
        return None
    return Path(*parts)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def store(source: BinaryIO, target: Path, artifact: dict[str, Any]) -> None:
    """Under another name until size and digest are what the list says, so what bears the name is whole."""
    half = target.with_name(f".{os.getpid()}.part")
    half.unlink(missing_ok=True)
    size, digest, left = int(artifact["file_size"]), hashlib.sha1(usedforsecurity=False), int(artifact["file_size"])
    try:
        with half.open("xb") as file:
            while piece := source.read(min(1 << 16, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise ApiError(f"longer than the {size} bytes of the list")
                digest.update(piece)
                file.write(piece)
        if left:
            raise http.client.IncompleteRead(b"", left)
        if artifact.get("sha1sum") and digest.hexdigest() != artifact["sha1sum"]:
            raise ApiError(f"its SHA-1 is {digest.hexdigest()}, not {artifact['sha1sum']}")
        half.rename(target)
    finally:
        half.unlink(missing_ok=True)


def fetch_artifact(client: Client, where: str, artifact: dict[str, Any], folder: Path) -> str:
    """Says what became of it: "fetched", "there"; raises what went wrong."""
    path = safe_path(str(artifact.get("path", "")))
    if path is None:
        raise ApiError("its path leads out of the directory; not fetched")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    # A symbolic link that lay there before could lead out too.
    if not target.parent.resolve().is_relative_to(folder.resolve()) or target.is_symlink() or target.is_dir():
        raise ApiError(f"{target}: a link or directory is in its place; not fetched")
    if target.exists() and artifact.get("sha1sum") and digest_of(target) == artifact["sha1sum"]:
        return "there"
    one = f"{where}/jobs/{job_id({'id': artifact.get('job_id')})}/artifacts/{job_id(artifact)}/download"
    client.download(one, lambda source: store(source, target, artifact))
    return "fetched"


def fetch_artifacts(printer: Printer, client: Client, where: str, jobs: list[dict[str, Any]], root: Path) -> None:
    """What cannot be fetched is told and changes nothing of the build's result."""
    folders = {job["id"]: folder_name(job) for job in jobs}
    counts = {"fetched": 0, "there": 0, "failed": 0}
    for artifact in client.list(f"{where}/artifacts"):
        name = clean(str(artifact.get("path")))
        if artifact.get("state") != "finished":
            printer.warn(f"artifact {name}: {clean(str(artifact.get('state')))}; not fetched")
            continue
        try:
            folder = root / folders.get(artifact.get("job_id"), "other-jobs")
            counts[fetch_artifact(client, where, artifact, folder)] += 1
        except (ApiError, OSError, KeyError, TypeError, ValueError) as error:
            counts["failed"] += 1
            printer.warn(f"artifact {name}: {error}")
    if any(counts.values()):
        printer.say(f"artifacts: {', '.join(f'{n} {what}' for what, n in counts.items() if n)}, in {root}")


# --- the build


def job_name(job: dict[str, Any]) -> str:
    name = job.get("name") or job.get("label") or job.get("step_key") or job.get("type")
    group = f" {job['parallel_group_index'] + 1}/{job['parallel_group_total']}" if job.get("parallel_group_total") else ""
    return clean(str(name)) + group


def job_id(job: dict[str, Any]) -> str:
    """It becomes part of a URL, so it is not taken on trust."""
    if not re.fullmatch(r"[0-9A-Za-z-]{1,64}", str(job.get("id"))):
        raise ApiError(f"{job.get('id')!r}: not an id")
    return str(job["id"])


def folder_name(job: dict[str, Any]) -> str:
    """Steps of a matrix share a key, and jobs a file's path; ids differ."""
    word = re.sub(r"[^A-Za-z0-9]+", "-", str(job.get("step_key") or job_name(job))).strip("-")[:60]
    return f"{word or 'job'}-{job_id(job)[:8]}"


def find_build(printer: Printer, client: Client, pipeline: str, commit: str, poll: float) -> dict[str, Any]:
    """The newest build of the commit, once there is one."""
    told, missing = False, ""
    try:
        while True:
            try:
                builds = list(client.list(f"{pipeline}/builds", commit=commit, exclude_jobs="true"))
            except ApiError as error:
                # A pipeline that the push itself makes is not there at once either.
                if error.status != 404:
                    raise
                builds, missing = [], f" ({error})"
            if builds:
                newest = max(builds, key=lambda build: int(build["number"]))
                more = f", the newest of {len(builds)}" if len(builds) > 1 else ""
                printer.say(f"build {newest['number']}{more}: {clean(str(newest.get('web_url')))}")
                return newest
            if not told:
                printer.say(f"no build of {commit[:12]} yet{missing}; waiting")
                told = True
            client.sleep(poll)
    except TimeIsUp as error:
        # It may be up between two looks or in the middle of one; before the first answer nothing is known.
        known = f"there is no build of {commit[:12]}{missing}; is it pushed?" if told else ""
        raise time_is_up(known, error) from None


def follow_build(printer: Printer, client: Client, where: str, poll: float) -> dict[str, Any]:
    """Prints what changes until the build has ended."""
    states: dict[str, str] = {}
    build_state = ""
    try:
        while True:
            build = client.get(where)
            # Without retried jobs, as the API gives them: a job that failed and passed when run again has passed.
            for job in jobs_of(build):
                before, now = states.get(job["id"]), str(job.get("state"))
                if before != now:
                    since = f"{printer.paint(before)} → " if before else ""
                    printer.say(f"  {job_name(job)}: {since}{printer.paint(now)}{soft(job)}")
                    states[job["id"]] = now
            if build.get("state") != build_state:
                build_state = str(build.get("state"))
                wants = "; it waits until somebody unblocks it" if build_state == "blocked" else ""
                printer.say(f"build: {printer.paint(build_state)}{wants}")
            if build_state in ENDED:
                return build
            client.sleep(poll)
    except TimeIsUp as error:
        # It may be up between two looks or in the middle of one.
        raise time_is_up(f"the build is still {build_state}" if build_state else "", error) from None


def time_is_up(known: str, error: TimeIsUp) -> TimeIsUp:
    """With what is known of the build, and why the API was not asked again, where it said so."""
    return TimeIsUp("; ".join(part for part in (known, str(error)) if part))


def soft(job: dict[str, Any]) -> str:
    return " (soft: the build goes on)" if job.get("soft_failed") else ""


def jobs_of(build: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Without the lines between groups of steps, which Buildkite calls jobs too."""
    for job in build.get("jobs") or []:
        if isinstance(job, dict) and job.get("id") and job.get("type") != "waiter":
            yield job


def monitor(arguments: argparse.Namespace, printer: Printer) -> int:
    commit = resolve(arguments.commit, printer)
    client = Client(arguments.api, token(), time.monotonic() + arguments.timeout, arguments.retry_wait)
    pipeline = f"/v2/organizations/{arguments.org}/pipelines/{arguments.pipeline}"
    build = find_build(printer, client, pipeline, commit, arguments.poll_interval)
    where = f"{pipeline}/builds/{int(build['number'])}"
    build = follow_build(printer, client, where, arguments.poll_interval)

    client.deadline = time.monotonic() + AFTERWARDS
    jobs = list(jobs_of(build))
    if build["state"] != "passed":
        for job in jobs:
            if job.get("type") == "script" and job.get("state") in JOB_FAILED and not job.get("soft_failed"):
                print_log(printer, client, where, job)
    if not arguments.no_artifacts:
        try:
            fetch_artifacts(printer, client, where, jobs, arguments.artifacts / f"build-{int(build['number'])}")
        except (ApiError, TimeIsUp) as error:
            printer.warn(f"artifacts: {error or 'no time left'}")
    printer.say(f"build {build['number']} {printer.paint(build['state'])}: {clean(str(build.get('web_url')))}")
    return PASSED if build["state"] == "passed" else FAILED


# --- from the command line


def git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def resolve(said: str, printer: Printer) -> str:
    """The whole name of the commit: the API knows no short ones."""
    commit = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{said}^{{commit}}")
    if commit:
        if git("branch", "--remotes", "--contains", commit) == "":
            printer.warn(f"{commit[:12]} is on no remote branch that this clone knows of; is it pushed?")
        return commit
    if re.fullmatch(r"[0-9a-f]{40}", said):
        return said
    raise Usage(f"{said}: no such commit here; give one that git knows, or all 40 digits")


def token() -> str:
    said = os.environ.get("BUILDKITE_API_TOKEN", "").strip()
    if not said or not said.isprintable() or not said.isascii():
        raise Usage("BUILDKITE_API_TOKEN is not set (or holds what no token holds); make one in Buildkite's settings")
    return said


def seconds(said: str) -> float:
    value = float(said)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError("seconds, more than 0")
    return value


def slug(said: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", said):
        raise argparse.ArgumentTypeError("a slug: letters, digits, - and _")
    return said


def parse(words: list[str] | None) -> argparse.Namespace:
    summary, rest = (__doc__ or "").split("\n\nexit status:")
    parser = argparse.ArgumentParser(
        description=summary, epilog=f"exit status:{rest}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    env = os.environ.get
    parser.add_argument("commit", metavar="COMMIT", help="HEAD, a branch, a commit")
    parser.add_argument("--org", type=slug, default=env("BUILDKITE_ORGANIZATION_SLUG", "clawpot"), help="default: %(default)s")
    parser.add_argument("--pipeline", type=slug, default=env("BUILDKITE_PIPELINE_SLUG", "clawpot"), help="default: %(default)s")
    parser.add_argument("--timeout", type=seconds, default=3600.0, help="seconds until the build must be over (default: 3600)")
    parser.add_argument("--poll-interval", type=seconds, default=10.0, help="seconds between two looks (default: 10)")
    parser.add_argument("--artifacts", type=Path, default=Path("target/builds"), help="directory (default: %(default)s)")
    parser.add_argument("--no-artifacts", action="store_true", help="fetch none")
    parser.add_argument("--api", default=env("BUILDKITE_API_URL", "https://api.buildkite.com"), help="default: %(default)s")
    parser.add_argument("--retry-wait", type=seconds, default=1.0, help="seconds after a first failed request (default: 1)")
    return parser.parse_args(words)


def on_term(*_: object) -> NoReturn:
    raise SystemExit(143)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    signal.signal(signal.SIGTERM, on_term)
    printer = Printer()
    try:
        return monitor(arguments, printer)
    except Usage as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except TimeIsUp as error:
        print(f"error: no end within {arguments.timeout:.0f} s; {str(error) or 'the API was too slow'}", file=sys.stderr)
        return TIMEOUT
    except ApiError as error:
        print(f"error: {error}", file=sys.stderr)
        return API
    except KeyboardInterrupt:
        print("interrupted; the build goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Else Python complains again when it closes what nobody reads.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER


if __name__ == "__main__":
    sys.exit(main())
