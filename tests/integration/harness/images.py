"""Copies of the image store, to be broken: blobs are hard links, so a copy costs nothing."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any


def copy(store: Path, to: Path) -> Path:
    """What a server reads of a store. Never write into a blob of it: it is the original's too."""
    for name in ("blobs/sha256", "manifests"):
        (to / name).mkdir(parents=True)
        for file in (store / name).iterdir():
            os.link(file, to / name / file.name)
    shutil.copy(store / "boot.json", to / "boot.json")
    return to


def blob(store: Path, data: bytes) -> dict[str, Any]:
    """`data` as a blob of its own, and what a manifest says of it."""
    digest = hashlib.sha256(data).hexdigest()
    path = store / "blobs" / "sha256" / digest
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    path.chmod(0o444)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def add(store: Path, name: str, rootfs: bytes, kernel: bytes | None = None) -> None:
    """An image of this ext4 file system, with this kernel or the host's."""
    config = {"env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "cwd": "/", "user": "root"}
    manifest = {"version": 1, "rootfs": blob(store, rootfs) | {"format": "ext4"}, "config": config}
    if kernel is not None:
        manifest |= {"version": 2, "kernel": blob(store, kernel)}
    encoded = json.dumps(manifest | {"created_at_us": 1, "inputs": "test"}).encode()
    blob(store, encoded)
    (store / "manifests" / f"{name}.json").write_bytes(encoded)


def boot_file(store: Path, what: str) -> Path:
    """`what`: kernel or initramfs."""
    boot = json.loads((store / "boot.json").read_text())
    return store / "blobs" / "sha256" / boot[what]["digest"].removeprefix("sha256:")


def set_boot_file(store: Path, what: str, data: bytes) -> None:
    """Another kernel or initramfs, right in digest and size."""
    boot = json.loads((store / "boot.json").read_text())
    boot[what] |= blob(store, data)
    (store / "boot.json").unlink()
    (store / "boot.json").write_text(json.dumps(boot))


def truncate(store: Path, what: str) -> None:
    """Half of the file under the name of the whole."""
    path = boot_file(store, what)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    path.chmod(0o444)


def damage(store: Path, what: str) -> None:
    """One bit flipped, size and name kept."""
    path = boot_file(store, what)
    data = bytearray(path.read_bytes())
    path.unlink()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    path.chmod(0o444)


def cpio(files: dict[str, bytes]) -> bytes:
    """An initramfs (format "newc") of executable files."""
    out = bytearray()
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], start=1):
        mode = 0o100755 if name != "TRAILER!!!" else 0
        fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def silent_init(says: bytes) -> bytes:
    """A static x86-64 program that writes `says` to the console and then sleeps for ever: a guest without an agent."""
    base = 0x400000
    code_at = 64 + 56
    text_at = base + code_at + 40
    code = b"".join(
        [
            b"\xb8\x01\0\0\0",  # mov eax, 1 (write)
            b"\xbf\x01\0\0\0",  # mov edi, 1
            b"\xbe" + struct.pack("<I", text_at),  # mov esi, text
            b"\xba" + struct.pack("<I", len(says)),  # mov edx, length
            b"\x0f\x05",  # syscall
            b"\xb8\x22\0\0\0",  # mov eax, 34 (pause)
            b"\x0f\x05",  # syscall
            b"\xeb\xf7",  # jmp to the pause
        ]
    ).ljust(40, b"\x90")
    size = code_at + len(code) + len(says)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + code_at, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + segment + code + says
