#!/usr/bin/env python3
"""Writes the image store that crates/image reads (format: assets/README.md).

Blobs are named by their content and manifests replaced whole, so nobody ever sees half of anything.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

VERSION = 1


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def blob_path(store: Path, digest: str) -> Path:
    return store / "blobs" / "sha256" / digest.removeprefix("sha256:")


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, data: bytes, mode: int = 0o444) -> None:
    """The new bytes are on the disk before they bear the name."""
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    half.rename(path)
    sync_directory(path.parent)


def put(store: Path, source: Path) -> dict[str, Any]:
    """Moves `source`, a file on the store's file system, in under its digest; root-owned, mode 0444."""
    digest = digest_of(source)
    size = source.stat().st_size
    blob = blob_path(store, digest)
    if blob.exists() and blob.stat().st_size == size and digest_of(blob) == digest:
        source.unlink()
    else:
        os.chown(source, 0, 0)
        source.chmod(0o444)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.rename(blob)
        sync_directory(blob.parent)
    return {"digest": digest, "size": size}


def is_whole(store: Path, entry: dict[str, Any]) -> bool:
    try:
        blob = blob_path(store, entry["digest"])
        return blob.stat().st_size == entry["size"] and digest_of(blob) == entry["digest"]
    except (OSError, KeyError):
        return False


def read(path: Path) -> dict[str, Any]:
    """What a manifest says, or nothing when there is none that this version can use."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and said.get("version") == VERSION else {}


def encode(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def write_boot(store: Path, arguments: argparse.Namespace) -> None:
    boot = read(store / "boot.json")
    kernel = boot.get("kernel", {})
    if arguments.kernel:
        kernel = put(store, arguments.kernel) | {"kernel_version": arguments.kernel_version}
    content = {
        "version": VERSION,
        "kernel": kernel,
        "initramfs": put(store, arguments.initramfs) | {"agent_version": arguments.agent_version},
    }
    if content != boot:
        replace(store / "boot.json", encode(content))
        print("note: new")
    else:
        print("note: unchanged")


def write_image(store: Path, arguments: argparse.Namespace) -> None:
    config = {"env": arguments.env, "cwd": arguments.cwd, "user": arguments.user}
    rootfs = put(store, arguments.rootfs) | {"format": arguments.format}
    before = read(store / "manifests" / f"{arguments.name}.json")
    # The same image built again keeps its digest.
    created = before.get("created_at_us") if (before.get("rootfs"), before.get("config")) == (rootfs, config) else None
    content = {
        "version": VERSION,
        "rootfs": rootfs,
        "config": config,
        "created_at_us": created or time.time_ns() // 1000,
        "inputs": arguments.inputs,
    }
    encoded = encode(content)
    # Under its digest first: a VM is pinned to the manifest's digest, whatever the name means later.
    digest = "sha256:" + hashlib.sha256(encoded).hexdigest()
    if not blob_path(store, digest).exists():
        replace(blob_path(store, digest), encoded)
    if content != before:
        replace(store / "manifests" / f"{arguments.name}.json", encoded)
    print(f"note: {digest[:19]}…, {rootfs['size'] >> 20} MiB")


def command_init(store: Path, _: argparse.Namespace) -> int:
    for directory in (store / "blobs" / "sha256", store / "manifests", store / "cache"):
        directory.mkdir(parents=True, exist_ok=True)
    # One script at a time changes the store (flock).
    (store / "cache" / "lock").touch()
    # Downloads that nobody goes on with.
    for part in store.glob("cache/downloads/*.part"):
        if time.time() - part.stat().st_mtime > 7 * 86400:
            part.unlink()
    # What earlier runs that were killed left half done; an hour is longer than any run.
    for half in [*store.glob("cache/.scratch.*"), *store.glob("manifests/.*.tmp"), *store.glob("blobs/sha256/.*.tmp")]:
        if time.time() - half.stat().st_mtime < 3600:
            continue
        if half.is_dir():
            shutil.rmtree(half)
        else:
            half.unlink()
    return 0


def command_has_kernel(store: Path, _: argparse.Namespace) -> int:
    kernel = read(store / "boot.json").get("kernel", {})
    if not is_whole(store, kernel):
        return 1
    print(kernel["kernel_version"])
    return 0


def command_has_image(store: Path, arguments: argparse.Namespace) -> int:
    image = read(store / "manifests" / f"{arguments.name}.json")
    return 0 if image.get("inputs") == arguments.inputs and is_whole(store, image.get("rootfs", {})) else 1


def command_boot(store: Path, arguments: argparse.Namespace) -> int:
    write_boot(store, arguments)
    return 0


def command_image(store: Path, arguments: argparse.Namespace) -> int:
    write_image(store, arguments)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("init").set_defaults(run=command_init)
    commands.add_parser("has-kernel").set_defaults(run=command_has_kernel)
    has_image = commands.add_parser("has-image")
    has_image.add_argument("name")
    has_image.add_argument("inputs")
    has_image.set_defaults(run=command_has_image)
    boot = commands.add_parser("boot")
    boot.add_argument("--kernel", type=Path, help="left as it is when not given")
    boot.add_argument("--kernel-version")
    boot.add_argument("--initramfs", type=Path, required=True)
    boot.add_argument("--agent-version", required=True)
    boot.set_defaults(run=command_boot)
    image = commands.add_parser("image")
    image.add_argument("name")
    image.add_argument("--rootfs", type=Path, required=True)
    image.add_argument("--format", required=True)
    image.add_argument("--inputs", required=True, help="names all that went into it; the same again means nothing to do")
    image.add_argument("--env", action="append", default=[])
    image.add_argument("--cwd", default="/")
    image.add_argument("--user", default="root")
    image.set_defaults(run=command_image)
    arguments = parser.parse_args()
    return arguments.run(arguments.store, arguments)


if __name__ == "__main__":
    sys.exit(main())
