"""Images from registries and archives: what comes of them in a VM, and every way in which they may not come."""

import contextlib
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import images, registry
from harness.registry import Registry, Wire
from harness.server import ASSETS, Server
from harness.tools import until, within
from harness.world import World

if registry.missing():
    pytest.skip(f"not installed: {', '.join(registry.missing())}; scripts/test installs them", allow_module_level=True)

SAY = 'echo "$GREETING $(id -u) $(pwd)"; cat data second; ls /usr/bin/yes 2>&1; echo "$@"'


@pytest.fixture(scope="module")
def source(workdir: Path) -> str:
    """An image of Debian packages as a layout."""
    config = [
        "--config.entrypoint",
        "/bin/sh",
        "--config.entrypoint",
        "-c",
        "--config.entrypoint",
        SAY,
        "--config.entrypoint",
        "sh",
    ]
    config += ["--config.cmd", "by", "--config.cmd", "default"]
    config += [
        "--config.env",
        "GREETING=hello",
        "--config.env",
        "PATH=/usr/bin",
        "--config.user",
        "app",
        "--config.workingdir",
        "/srv",
    ]
    return registry.layout(workdir / "layout", *config)


@pytest.fixture(scope="module")
def hub(world: World, workdir: Path, source: str) -> Iterator[Registry]:
    made = Registry(world, workdir / "hub", registry.free_port()).start()
    made.push(source, "demo/app:1")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def guarded(world: World, workdir: Path, source: str) -> Iterator[Registry]:
    made = Registry(world, workdir / "guarded", registry.free_port(), guarded=True).start()
    made.push(source, "secret/app:1")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def wire(hub: Registry, workdir: Path) -> Iterator[Wire]:
    made = Wire(hub, registry.free_port(), workdir)
    yield made
    made.close()


@pytest.fixture(scope="module")
def store(workdir: Path) -> Path:
    return images.copy(ASSETS, workdir / "images-store")


@pytest.fixture(scope="module")
def here(session_server: Callable[..., Server], guarded: Registry, store: Path) -> Server:
    """A server with a store of its own, which trusts the guarded registry's authority."""
    server = session_server("images", image_dir=store)
    os.environ["SSL_CERT_FILE"] = str(guarded.where / "ca.pem")
    try:
        return server.start()
    finally:
        del os.environ["SSL_CERT_FILE"]


def _left(store: Path) -> list[str]:
    """What a pull or an import that failed must not leave."""
    return [
        str(path.relative_to(store))
        for path in [*store.glob("cache/unpack-*"), *store.glob("refs/lease-*"), *store.glob("oci/sha256/*")]
    ]


def _forget(server: Server, *names: str) -> None:
    for name in names:
        server.cli("image", "rm", name)
    server.cli("image", "gc", "--all").ok()


def test_tls_and_passwords(here: Server, guarded: Registry, tmp_path: Path) -> None:
    name = f"{guarded.address}/secret/app:1"
    here.cli("image", "pull", name).fails(1, "--credentials")
    here.cli("image", "pull", name, "--credentials", "-", stdin=b"me:wrong-guess\n").fails(1, "--credentials")
    password = tmp_path / "password"
    password.write_text("me:secret\n")
    password.chmod(0o600)
    here.cli("image", "pull", name, "--credentials", password).ok()
    assert "wrong-guess" not in here.log.read_text()
    _forget(here, name)


def test_a_registry_that_wants_tokens(here: Server, world: World, workdir: Path, source: str, tmp_path: Path) -> None:
    hub = Registry(world, workdir / "tokens", registry.free_port(), tokens=registry.free_port()).start()
    try:
        hub.push(source, "public/app:1")
        hub.push(source, "secret/app:1")
        public, secret = f"{hub.address}/public/app:1", f"{hub.address}/secret/app:1"
        here.cli("image", "pull", public).ok()
        here.cli("image", "pull", secret).fails(1, "--credentials")
        here.cli("image", "pull", secret, "--credentials", "-", stdin=b"me:wrong-guess\n").fails(1, "--credentials")
        here.cli("image", "pull", secret, "--credentials", "-", stdin=b"me:secret\n").ok()
        assert "me:secret" not in here.log.read_text() and "wrong-guess" not in here.log.read_text()
        _forget(here, public, secret)
    finally:
        hub.stop()


def test_a_certificate_that_nobody_here_knows(make_server: Callable[..., Server], guarded: Registry, workdir: Path) -> None:
    store = images.copy(ASSETS, workdir / "images-distrust")
    server = make_server("images-distrust", image_dir=store).start()
    server.cli("image", "pull", f"{guarded.address}/secret/app:1").fails(1, "certificate", "SSL_CERT_FILE")
    assert not _left(store) and not _partial(store)


def test_a_pull_goes_on_where_it_broke_off(here: Server, wire: Wire, hub: Registry, store: Path) -> None:
    name = f"{wire.address}/demo/app:1"
    _forget(here)
    # 2 MiB of each connection, and then it is cut: within one pull.
    wire.allow(2 << 20)
    here.cli("image", "pull", name).ok()
    until(lambda: "206" in hub.log(), what="something asked for in part")
    _forget(here, name)
    # The registry goes, for longer than a pull waits; what came is kept. In pieces so small that the pull, which pauses between
    # them, is not over before that.
    wire.allow(256 << 10)
    words = [here.cli.binary, "image", "pull", name]
    pulling = subprocess.Popen(words, env=here.cli.environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until(lambda: _partial(store) > 0, what="the first bytes")
    wire.allow(0)
    _, said = pulling.communicate(timeout=within(240))
    assert pulling.returncode == 1 and b"goes on from there" in said, said
    kept = _partial(store)
    assert kept > 0
    wire.allow(1 << 60)
    here.cli("image", "pull", name).ok()
    assert _partial(store) == 0
    _forget(here, name)


def test_what_an_earlier_download_left_is_not_believed(here: Server, hub: Registry, store: Path) -> None:
    """Of another registry, which may say of anything that it is this layer; or of a host whose power failed."""
    name = f"{hub.address}/demo/app:1"
    layers = here.cli("image", "pull", name, "-o", "json").ok().json["source"]["layers"]
    _forget(here, name)
    for layer in layers:
        (store / "oci/partial" / layer["digest"].removeprefix("sha256:")).write_bytes(b"the beginning of something else")
    here.cli("image", "pull", name).ok()
    assert _partial(store) == 0
    _forget(here, name)


def test_a_layer_that_rotted_on_the_disk_is_fetched_again(
    here: Server, hub: Registry, workdir: Path, source: str, store: Path
) -> None:
    first, second = f"{hub.address}/demo/app:1", f"{hub.address}/demo/again:1"
    layers = here.cli("image", "pull", first, "-o", "json").ok().json["source"]["layers"]
    blob = store / "oci/sha256" / layers[1]["digest"].removeprefix("sha256:")
    bad = bytearray(blob.read_bytes())
    bad[len(bad) // 2] ^= 1
    blob.unlink()
    blob.write_bytes(bad)
    # Another image of the same layers, which are believed to be there.
    layout = Path(source.removeprefix("oci:").removesuffix(":1"))
    hub.push(registry.several(layout, workdir / "again", ["amd64"]), "demo/again:1", "--all")
    here.cli("image", "pull", second).ok()
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    _forget(here, first, second)
    assert not _left(store)


def test_an_image_that_cannot_be_read_is_shown(here: Server, store: Path) -> None:
    torn = store / "manifests/torn.json"
    torn.write_text("{")
    try:
        shown = {image["name"]: image for image in here.cli("image", "ls", "-o", "json").ok().json}
        assert shown["torn"]["format"] == "unreadable" and "torn.json" in shown["torn"]["problem"]
        assert shown["debian"]["problem"] is None
        # This is why it is shown: nobody knows what it needs.
        here.cli("image", "gc").fails(1, "torn", "cannot be read")
    finally:
        torn.unlink()


def _partial(store: Path) -> int:
    found = 0
    for path in store.glob("oci/partial/*"):
        # One that is whole bears another name a moment later.
        with contextlib.suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def test_an_interrupt_leaves_only_what_helps_the_next_pull(here: Server, wire: Wire, store: Path) -> None:
    name = f"{wire.address}/demo/app:1"
    # In pieces so small that it is not over before the interrupt.
    wire.allow(256 << 10)
    words = [here.cli.binary, "image", "pull", name]
    pulling = subprocess.Popen(words, env=here.cli.environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until(lambda: _partial(store) > 0, what="the first bytes")
    pulling.send_signal(signal.SIGINT)
    _, said = pulling.communicate(timeout=within(60))
    assert pulling.returncode == 130 and b"cancelled" in said, said
    until(lambda: not [*store.glob("cache/unpack-*"), *store.glob("refs/lease-*")], what="the helper's end")
    assert name not in here.cli("image", "ls").ok().text
    wire.allow(1 << 60)
    here.cli("image", "pull", name).ok()
    _forget(here, name)


def test_what_a_registry_has_wrong_is_refused(here: Server, hub: Registry, store: Path, source: str) -> None:
    hub.push(source, "demo/broken:1")
    layers = here.cli("image", "pull", f"{hub.address}/demo/broken:1", "-o", "json").ok().json["source"]["layers"]
    _forget(here, f"{hub.address}/demo/broken:1")
    blob = hub.blob(layers[1]["digest"])
    good = blob.read_bytes()
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        here.cli("image", "pull", f"{hub.address}/demo/broken:1").fails(1, layers[1]["digest"], "what came has the digest")
        until(lambda: not _left(store), what="nothing to be left")
        assert _partial(store) == 0
    finally:
        blob.write_bytes(good)


def test_another_machines_image_is_refused_and_ours_is_found(
    here: Server, hub: Registry, workdir: Path, source: str, store: Path
) -> None:
    layout = Path(source.removeprefix("oci:").removesuffix(":1"))
    hub.push(registry.several(layout, workdir / "both", ["arm64", "amd64"]), "demo/both:1", "--all")
    hub.push(registry.several(layout, workdir / "arm", ["arm64", "riscv64"]), "demo/arm:1", "--all")
    both = here.cli("image", "pull", f"{hub.address}/demo/both:1", "-o", "json").ok().json
    assert both["source"]["architecture"] == "amd64"
    here.cli("image", "pull", f"{hub.address}/demo/arm:1").fails(1, "no image for linux/amd64", "linux/riscv64")
    _forget(here, f"{hub.address}/demo/both:1")
    assert not _left(store)


@pytest.mark.firecracker
def test_archives(here: Server, world: World, workdir: Path, source: str, store: Path) -> None:
    layout = Path(source.removeprefix("oci:").removesuffix(":1"))
    here.cli("image", "import", layout).fails(1, "--name")
    first = here.cli("image", "import", layout, "--name", "from-layout", "-o", "json").ok().json
    saved = workdir / "saved.tar"
    world.run("skopeo", "--insecure-policy", "copy", "-q", source, f"docker-archive:{saved}:team/app:2")
    second = here.cli("image", "import", saved, "-o", "json").ok().json
    assert second["name"].endswith("team/app:2") and second["entrypoint"] == first["entrypoint"]
    # A name that is taken is not taken over, unless that is said.
    here.cli("image", "import", saved, "--name", "from-layout").fails(1, "means", "--replace")
    here.cli("image", "import", saved, "--name", "from-layout", "--replace").ok()
    assert here.cli("run", "--rm", "from-layout").ok().text.startswith("hello 1000 /srv\nof app\nsecond\n")
    exported = workdir / "exported.tar"
    here.cli("image", "export", "from-layout", exported).ok()
    digest = here.cli("image", "inspect", "from-layout", "-o", "json").ok().json["digest"]
    _forget(here, "from-layout", second["name"])
    assert not _left(store)
    back = here.cli("image", "import", exported, "-o", "json").ok().json
    assert (back["digest"], back["name"]) == (digest, "from-layout")
    assert here.cli("run", "--rm", "from-layout").ok().text.startswith("hello 1000 /srv\n")
    _forget(here, "from-layout")


def test_who_did_what_to_images_is_told(here: Server) -> None:
    digest = here.cli("image", "tag", "debian", "mine", "-o", "json").ok().json["digest"]
    here.cli("image", "rm", "mine").ok()
    told = [event for event in here.cli("events", "-o", "json").ok().lines if event["image_name"] == "mine"]
    assert [(event["kind"], event["actor"]) for event in told] == [("image.tag", "uid=0"), ("image.rm", "uid=0")], told
    assert {event["image_digest"] for event in told} == {digest} and not any(event["vm_id"] for event in told), told


# --- last, since what a VM was lately made of stays for a while, also after `gc --all`


@pytest.mark.firecracker
def test_an_image_from_a_registry_runs_as_it_says(here: Server, hub: Registry) -> None:
    name = f"{hub.address}/demo/app:1"
    pulled = here.cli("image", "pull", name, "-o", "json").ok().json
    assert pulled["name"] == name and pulled["entrypoint"][0] == "/bin/sh" and pulled["user"] == "app"
    told = [event for event in here.cli("events", "-o", "json").ok().lines if event["image_name"] == name]
    assert "image.pull" in {event["kind"] for event in told if event["image_digest"] == pulled["digest"]}, told
    assert pulled["source"]["kind"] == "registry" and len(pulled["source"]["layers"]) >= 2
    # Its entrypoint and its command; then the typed one in the place of its command.
    said = here.cli("run", "--rm", name).ok().text
    assert said.splitlines()[:3] == ["hello 1000 /srv", "of app", "second"], said
    assert "No such file" in said and said.endswith("by default\n"), "a whiteout hides nothing"
    said = here.cli("run", "--rm", "-e", "GREETING=bye", "-u", "0", name, "--", "and", "mine").ok().text
    assert said.startswith("bye 0 /srv\n") and said.endswith("and mine\n")
    assert (
        here.cli("run", "--rm", "--entrypoint", "/usr/bin/stat", name, "--", "-c", "%u:%g", "/srv/data").ok().text
        == "1000:1000\n"
    )
    # Everything is there: nothing is asked for but the manifest.
    before = len(hub.log())
    here.cli("image", "pull", name).ok()
    # The registry writes it down when it has answered.
    until(lambda: "/manifests/" in hub.log()[before:], what="the registry's word")
    asked = hub.log()[before:]
    assert "/blobs/" not in asked, asked
    # A name that somebody chose is not taken over by a pull either, unless that is said.
    here.cli("image", "pull", name, "--name", "debian").fails(1, "means", "--replace")
    by_digest = f"{hub.address}/demo/app@{pulled['source']['digest']}"
    here.cli("image", "pull", by_digest).fails(1, "needs a name")
    same = here.cli("image", "pull", by_digest, "--name", "app", "-o", "json").ok().json
    assert same["digest"] == pulled["digest"] and sorted(same["names"]) == ["app", name]
    here.cli("image", "pull", f"{hub.address}/demo/none:1").fails(1, "not in the registry")
    here.cli("image", "pull", "UPPER case").fails(1, "image reference")


@pytest.mark.firecracker
def test_what_a_vm_is_made_of_stays(here: Server, hub: Registry) -> None:
    name = f"{hub.address}/demo/app:1"
    here.cli("image", "pull", name).ok()
    here.cli("create", "--wait", "--name", "keeper", name).ok()
    here.cli("stop", "keeper").ok()
    _forget(here, name, "app")
    assert name not in here.cli("image", "ls").ok().text
    here.cli("create", name).fails(1, "not in")
    here.cli("start", "keeper").ok()
    assert here.cli("exec", "keeper", "--", "cat", "/srv/second").ok().text == "second\n"
    here.cli("rm", "keeper").ok()
