"""A real registry in the world's host, images of Debian packages for it, and a wire to it that can be cut."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .tokens import ISSUER, SERVICE
from .tools import run, until
from .world import World

TOOLS = ("docker-registry", "skopeo", "umoci", "openssl")
#: "me" with the password "secret", as `htpasswd -B` writes it.
HTPASSWD = "me:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n"
#: What a small Debian is made of, all of it on any Debian host.
PACKAGES = ("base-files", "dash", "coreutils", "libc6", "libacl1", "libattr1", "libgmp10", "libselinux1", "libpcre2-8-0")


def missing() -> list[str]:
    return [tool for tool in TOOLS if not shutil.which(tool)]


class Registry:
    """Debian's docker-registry on a port of the host's loopback; with TLS and a password, or a token service, if asked."""

    def __init__(self, world: World, where: Path, port: int, *, guarded: bool = False, tokens: int = 0) -> None:
        self.world = world
        self.where = where
        self.port = port
        self.address = f"localhost:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        #: The port of its token service.
        self.tokens = tokens
        self._service: subprocess.Popen[bytes] | None = None
        where.mkdir(parents=True)
        http: dict[str, Any] = {"addr": f"127.0.0.1:{port}"}
        config: dict[str, Any] = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(where / "data")}},
            "http": http,
        }
        if guarded:
            certificates(where)
            (where / "htpasswd").write_text(HTPASSWD)
            http["tls"] = {"certificate": str(where / "leaf.pem"), "key": str(where / "leaf.key")}
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(where / "htpasswd")}}
        if tokens:
            certificates(where)
            realm = {"realm": f"http://localhost:{tokens}/token", "service": SERVICE, "issuer": ISSUER}
            config["auth"] = {"token": {**realm, "rootcertbundle": str(where / "ca.pem")}}
        # JSON is YAML.
        (where / "config.yml").write_text(json.dumps(config))

    def start(self) -> "Registry":
        with (self.where / "log").open("ab") as log:
            words = [*self.world.enter(), "docker-registry", "serve", str(self.where / "config.yml")]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: listens(self.world, self.port), what="the registry's port")
        if self.tokens:
            script = [sys.executable, Path(__file__).with_name("tokens.py"), self.tokens]
            words = [*self.world.enter(), *script, self.where / "leaf.pem", self.where / "leaf.key"]
            self._service = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL)
            until(lambda: listens(self.world, self.tokens), what="the token service's port")
        return self

    def stop(self) -> None:
        for process in (self.process, self._service):
            if process is not None:
                process.kill()
                process.wait()
        self.process = self._service = None

    def push(self, source: str, name: str, *more: str) -> None:
        login = ["--dest-creds", "me:secret"] if (self.where / "leaf.pem").exists() else []
        words = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *login, *more]
        self.world.run(*words, source, f"docker://{self.address}/{name}")

    def log(self) -> str:
        return (self.where / "log").read_text(errors="replace")

    def blob(self, digest: str) -> Path:
        digits = digest.removeprefix("sha256:")
        return self.where / "data/docker/registry/v2/blobs/sha256" / digits[:2] / digits / "data"


def listens(world: World, port: int) -> bool:
    return f"127.0.0.1:{port} " in world.run("ss", "-Hltn")


def certificates(where: Path) -> None:
    """`ca.pem`, and `leaf.pem` with `leaf.key` for localhost."""
    quiet = ["-nodes", "-newkey", "rsa:2048", "-days", "2"]
    ca = ["-keyout", where / "ca.key", "-out", where / "ca.pem", "-subj", "/CN=test authority"]
    run("openssl", "req", "-x509", *quiet, *ca)
    leaf = ["-CA", where / "ca.pem", "-CAkey", where / "ca.key", "-keyout", where / "leaf.key", "-out", where / "leaf.pem"]
    names = [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]
    run("openssl", "req", "-x509", *quiet, *leaf, *names)


class Wire:
    """A port that leads to a registry's and cuts each connection after so many bytes from it."""

    SCRIPT = textwrap.dedent("""
        import os, socket, sys, threading
        port, to, limits = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        def pump(a, b, limit):
            left = limit
            try:
                while left > 0 and (data := a.recv(min(left, 65536))):
                    b.sendall(data)
                    left -= len(data)
            except OSError:
                pass
            for end in (a, b):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        listener = socket.create_server(("127.0.0.1", port))
        while True:
            client, _ = listener.accept()
            limit = int(open(limits).read())
            server = socket.create_connection(("127.0.0.1", to))
            threading.Thread(target=pump, args=(client, server, 1 << 60), daemon=True).start()
            threading.Thread(target=pump, args=(server, client, limit), daemon=True).start()
    """)

    def __init__(self, registry: Registry, port: int, where: Path) -> None:
        self.limits = where / f"wire-{port}"
        self.allow(1 << 60)
        self.address = f"localhost:{port}"
        words = [*registry.world.enter(), sys.executable, "-c", self.SCRIPT, str(port), str(registry.port), str(self.limits)]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        until(lambda: listens(registry.world, port), what="the wire's port")

    def allow(self, limit: int) -> None:
        """Bytes of each connection from now on."""
        half = self.limits.with_suffix(".half")
        half.write_text(str(limit))
        half.rename(self.limits)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def debian(to: Path) -> Path:
    """A root directory of files of installed Debian packages, in today's layout."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (to / "usr" / name).mkdir(parents=True, exist_ok=True)
        (to / name).symlink_to(f"usr/{name}")
    for file in map(Path, run("dpkg", "-L", *PACKAGES).splitlines()):
        inside = to / str(file).lstrip("/")
        if file.is_symlink() and not inside.exists() and not inside.is_symlink():
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.symlink_to(os.readlink(file))
        elif file.is_file() and "/share/" not in str(file) and not inside.is_symlink():
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, inside)
    for name in ("etc", "tmp", "srv", "root", "run"):
        (to / name).mkdir(exist_ok=True)
    (to / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/srv:/bin/sh\n")
    (to / "etc/group").write_text("root:x:0:\napp:x:1000:\n")
    (to / "srv/data").write_text("of app\n")
    os.chown(to / "srv/data", 1000, 1000)
    return to


def layout(where: Path, *more: str) -> str:
    """An OCI layout of one image, made by umoci; what skopeo calls it. `more`: words for `umoci config`."""
    image = f"{where}:1"
    bundle = where.with_suffix(".bundle")
    run("umoci", "init", "--layout", where)
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", "--image", image, bundle)
    debian(bundle / "rootfs")
    run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
    # A second layer, with what the first does not have and without some of what it has.
    (bundle / "rootfs/srv/second").write_text("second\n")
    (bundle / "rootfs/usr/bin/yes").unlink()
    (bundle / "rootfs/srv/noise").write_bytes(os.urandom(6 << 20))
    run("umoci", "repack", "--image", image, bundle)
    run("umoci", "config", "--image", image, *more)
    with contextlib.suppress(OSError):
        shutil.rmtree(bundle)
    return f"oci:{image}"


def several(source: Path, to: Path, architectures: list[str]) -> str:
    """A layout whose one name is an index: the same image for several machines, by their word for it."""
    shutil.copytree(source, to)
    blobs = to / "blobs/sha256"
    index = json.loads((to / "index.json").read_text())
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_text())
    config = json.loads((blobs / manifest["config"]["digest"].removeprefix("sha256:")).read_text())
    entries = []
    for architecture in architectures:
        manifest["config"] |= _put(blobs, config | {"architecture": architecture})
        kind = "application/vnd.oci.image.manifest.v1+json"
        platform = {"architecture": architecture, "os": "linux"}
        entries.append({"mediaType": kind, "platform": platform} | _put(blobs, manifest))
    inner = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries}
    outer = {"mediaType": inner["mediaType"], "annotations": {"org.opencontainers.image.ref.name": "1"}} | _put(blobs, inner)
    (to / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [outer]}))
    return f"oci:{to}:1"


def _put(blobs: Path, what: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(what).encode()
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


#: In the world's host nobody else listens, and these are below those that the kernel gives to who connects.
_PORTS = itertools.count(20000)


def free_port() -> int:
    """Of the world's host; each once."""
    return next(_PORTS)
