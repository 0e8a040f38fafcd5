"""scripts/install-vm-assets.sh and its downloads, against a local server. Nothing is built and nothing is installed."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_buildkite import Answer, Web

REPO = Path(__file__).resolve().parents[2]
FETCH = REPO / "scripts/lib/fetch.py"
DATA = bytes(range(256)) * 4096


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Files:
    """A download server. `behave` may answer a request its own way, once each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file": DATA}
        self.behave: list = []
        self.ranges = True
        self.web = Web(self.answer)
        self.url = f"{self.web.url}/file"

    def answer(self, path: str, headers: dict[str, str]) -> Answer:
        if self.behave:
            return self.behave.pop(0)(headers)
        if path not in self.files:
            return 404, {}, b"no such file"
        data = self.files[path]
        if "range" not in headers or not self.ranges:
            return 200, {}, data
        start = int(headers["range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            return 416, {}, b""
        return 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]

    def asked_for(self) -> list[str]:
        return [headers.get("range", "all") for _, headers in self.web.requests]


@pytest.fixture
def server() -> Iterator[Files]:
    files = Files()
    yield files
    files.web.shutdown()
    files.web.server_close()


def clean_environment() -> dict[str, str]:
    """No proxy between us and loopback."""
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def fetch(url: str, digest: str, target: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(FETCH), url, digest, str(target)]
    return subprocess.run(words, capture_output=True, text=True, env=clean_environment(), check=False)


def breaks_after(count: int):
    return lambda _: (200, {"Content-Length": str(len(DATA))}, DATA[:count])


def test_a_download_is_whole_and_verified_and_done_once(server, tmp_path):
    target = tmp_path / "file"
    done = fetch(server.url, sha256(DATA), target)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["file"]
    assert fetch(server.url, sha256(DATA), target).returncode == 0
    assert len(server.web.requests) == 1


def test_a_connection_that_breaks_is_taken_up_where_it_was(server, tmp_path):
    server.behave = [breaks_after(100_000)]
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.asked_for() == ["all", "bytes=100000-"]


def test_a_run_that_was_killed_is_taken_up_by_the_next(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA[:500_000])
    done = fetch(server.url, sha256(DATA), tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.asked_for() == ["bytes=500000-"]


def test_a_whole_part_needs_only_its_name(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA)
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(DATA[:1000])
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_another_files_beginning_is_given_up(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.asked_for() == ["bytes=1000-", "all"]


def test_a_range_that_begins_elsewhere_is_not_believed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(DATA[:1000])
    server.behave = [lambda _: (206, {"Content-Range": f"bytes 0-{len(DATA) - 1}/{len(DATA)}"}, DATA)]
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_wrong_digest_is_refused_and_not_kept(server, tmp_path):
    done = fetch(server.url, sha256(b"another"), tmp_path / "file")
    assert done.returncode == 1
    assert sha256(DATA) in done.stderr and sha256(b"another") in done.stderr
    assert not os.listdir(tmp_path)


def test_more_than_any_asset_is_refused_and_not_kept(server, tmp_path):
    with (tmp_path / "file.part").open("wb") as part:
        part.truncate(2 << 30)
    server.behave = [lambda _: (206, {"Content-Range": f"bytes {2 << 30}-{(2 << 30) + len(DATA) - 1}/*"}, DATA)]
    done = fetch(server.url, sha256(DATA), tmp_path / "file")
    assert done.returncode == 1 and "more than 2 GiB: refused" in done.stderr, done
    assert not os.listdir(tmp_path)


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    (tmp_path / "file").write_bytes(DATA[:-1] + b"?")
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    assert (tmp_path / "file").read_bytes() == DATA


def test_5xx_is_tried_again_and_404_is_not(server, tmp_path):
    server.behave = [lambda _: (503, {}, b"")]
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0
    before = len(server.web.requests)
    done = fetch(server.url + "x", sha256(DATA), tmp_path / "other")
    assert done.returncode == 1 and "404" in done.stderr
    assert len(server.web.requests) == before + 1


def test_a_redirect_is_followed(server, tmp_path):
    server.behave = [lambda _: (302, {"Location": server.url}, b"")]
    assert fetch(server.url, sha256(DATA), tmp_path / "file").returncode == 0


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://nowhere.invalid/file", "offline"), ("http://127.0.0.1:9/file", "refused"), ("file:///etc/passwd", "http")],
)
def test_out_of_reach_is_told_in_one_line(tmp_path, url, said):
    done = fetch(url, sha256(DATA), tmp_path / "file")
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- the script itself


def kernel() -> bytes:
    """What scripts/lib/kernel.py takes for a kernel: an ELF with a PVH note."""
    return b"\x7fELF\x02\x01\x01" + bytes(57) + struct.pack("<III", 4, 4, 18) + b"Xen\0" + bytes(4096)


def firecracker(version: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in ("firecracker", "jailer"):
            program = f"#!/bin/sh\necho {name.capitalize()} v{version}\n".encode()
            entry = tarfile.TarInfo(f"release-v{version}-x86_64/{name}-v{version}-x86_64")
            entry.size, entry.mode = len(program), 0o755
            archive.addfile(entry, io.BytesIO(program))
    return packed.getvalue()


@pytest.fixture
def install(server: Files, tmp_path: Path):
    if os.geteuid() != 0:
        pytest.skip("writes files that are root's")
    missing = [
        tool for tool in ("gcc", "lz4", "mmdebstrap", "mke2fs") if not shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")
    ]
    if missing:
        pytest.skip(f"the script would install packages here: {missing}")
    agent = tmp_path / "agent"
    agent.write_bytes(b"\x7fELF" + bytes(100))
    server.files["/vmlinux-9.9"] = kernel()
    server.files["/firecracker-v9.9.9-x86_64.tgz"] = firecracker("9.9.9")
    env = clean_environment() | {
        "CLAWPOT_IMAGE_DIR": str(tmp_path / "store"),
        "CI_KERNEL_URL": f"{server.web.url}/vmlinux-9.9",
        "CI_KERNEL_SHA256": sha256(kernel()),
        "FIRECRACKER_URL": f"{server.web.url}/firecracker-v9.9.9-x86_64.tgz",
        "FIRECRACKER_SHA256": sha256(server.files["/firecracker-v9.9.9-x86_64.tgz"]),
    }

    def install(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        script = str(REPO / "scripts/install-vm-assets.sh")
        words = (script, "--agent", str(agent), *words)
        return subprocess.run(words, capture_output=True, text=True, env=env | more, check=False)

    return install


def test_kernel_and_firecracker_are_fetched_once(install, server, tmp_path):
    done = install("--kernel", "ci", "--firecracker", "always")
    assert done.returncode == 0, done.stderr
    store = tmp_path / "store"
    boot = json.loads((store / "boot.json").read_text())
    assert boot["kernel"]["kernel_version"] == "ci-9.9"
    assert boot["kernel"]["digest"] == "sha256:" + sha256(kernel())
    assert (store / "firecracker/v9.9.9/firecracker").stat().st_mode & 0o111
    assert (store / "firecracker/v9.9.9/jailer").exists()
    assert not list((store / "cache/downloads").iterdir())
    assert not list((store / "cache").glob(".scratch.*"))

    asked = len(server.web.requests)
    again = install("--kernel", "ci", "--firecracker", "always")
    assert again.returncode == 0, again.stderr
    assert len(server.web.requests) == asked, "a second run fetches nothing"
    assert json.loads((store / "boot.json").read_text()) == boot
    # What is there stays when nothing else is asked for.
    assert install().returncode == 0
    assert len(server.web.requests) == asked


def test_an_interrupted_run_is_taken_up_by_the_next_one(install, server, tmp_path):
    downloads = tmp_path / "store/cache/downloads"
    downloads.mkdir(parents=True)
    (downloads / "vmlinux-9.9.part").write_bytes(kernel()[:1000])
    done = install("--kernel", "ci", "--firecracker", "never")
    assert done.returncode == 0, done.stderr
    assert server.asked_for() == ["bytes=1000-"]


@pytest.mark.parametrize("what", ["kernel", "firecracker"])
def test_a_wrong_digest_stops_the_script_and_is_not_kept(install, tmp_path, what):
    wrong = {"kernel": "CI_KERNEL_SHA256", "firecracker": "FIRECRACKER_SHA256"}[what]
    done = install("--kernel", "ci", "--firecracker", "always", **{wrong: "0" * 64})
    assert done.returncode != 0
    assert "refused" in done.stderr
    store = tmp_path / "store"
    assert not [found for found in store.rglob("*") if found.is_file() and found.name.startswith(("vmlinux", "firecracker"))]
    assert (store / "boot.json").exists() == (what == "firecracker")


def test_offline_is_told_and_breaks_what_was_there_not(install, server, tmp_path):
    assert install("--kernel", "ci", "--firecracker", "never").returncode == 0
    before = (tmp_path / "store/boot.json").read_text()
    url = "http://nowhere.invalid/firecracker-v9.9.9-x86_64.tgz"
    done = install("--firecracker", "always", FIRECRACKER_URL=url)
    assert done.returncode != 0
    assert "offline" in done.stderr
    # Asked for by nobody, its lack is a line and no failure.
    done = install("--firecracker", "auto", FIRECRACKER_URL=url)
    assert done.returncode == 0, done.stderr
    assert "Firecracker not fetched: " in done.stdout
    assert (tmp_path / "store/boot.json").read_text() == before


def test_a_file_laid_there_by_hand_needs_no_network(install, tmp_path):
    downloads = tmp_path / "store/cache/downloads"
    downloads.mkdir(parents=True)
    (downloads / "vmlinux-9.9").write_bytes(kernel())
    done = install("--kernel", "ci", "--firecracker", "never", CI_KERNEL_URL="http://nowhere.invalid/vmlinux-9.9")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("--kernel", "mine"), ("--firecracker", "perhaps"), ("--what",), ("--agent",)])
def test_wrong_words_are_refused(install, tmp_path, words):
    assert install(*words).returncode != 0
    assert not (tmp_path / "store").exists()


def test_a_url_without_its_digest_is_refused(install):
    done = install(FIRECRACKER_SHA256="")
    assert done.returncode != 0
    assert "FIRECRACKER_SHA256" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scripts/setup-rootfs.sh", "../escape"), "image name"),
        (("scripts/setup-rootfs.sh", "web", "--packages", "a;b"), "packages"),
        (("scripts/setup-rootfs.sh", "--frobnicate"), "--frobnicate"),
        (("scripts/lint.sh", "--frobnicate"), "--frobnicate"),
        (("scripts/fuzz", "--frobnicate"), "--frobnicate"),
        (("packaging/install.sh", "frobnicate"), "install or uninstall"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_done(tmp_path, words, said):
    env = clean_environment() | {"CLAWPOT_IMAGE_DIR": str(tmp_path / "store"), "CARGO_TARGET_DIR": str(tmp_path / "target")}
    done = subprocess.run([REPO / words[0], *words[1:]], capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
