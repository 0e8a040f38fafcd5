#!/usr/bin/env python3
"""Builds the one initramfs: /init (the agent), /modules/*.ko and /modules/order.

Deterministic: the same agent and modules give the same bytes, so a rebuild that changes nothing changes no digest.
Uncompressed on purpose: at 5 MB, unpacking LZ4 or zstd saved nothing that could be measured under emulation.
"""

import argparse
import gzip
import lzma
import os
import struct
import subprocess
import sys
from pathlib import Path

# What a guest needs on either transport (virtio-mmio under Firecracker, virtio-pci under QEMU); what these need in turn
# is read from the modules themselves.
WANTED = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "overlay",
    "erofs",
]
SIGNATURE_MAGIC = b"~Module signature appended~\n"
# struct module_signature of include/linux/module_signature.h.
SIGNATURE_HEADER = 12


class Bad(Exception):
    """No initramfs can be made of this; the text says why."""


def key(name: str) -> str:
    """`-` and `_` mean the same in a module's name."""
    return name.split(".ko")[0].replace("-", "_")


def read_module(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    elif path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    if not data.startswith(b"\x7fELF"):
        raise Bad(f"{path}: not a kernel module")
    return unsigned(data)


def unsigned(data: bytes) -> bytes:
    """Without its signature: checking 17 of them costs 60 ms of an emulated boot, and nothing here enforces them."""
    if not data.endswith(SIGNATURE_MAGIC):
        return data
    end = len(data) - len(SIGNATURE_MAGIC)
    (length,) = struct.unpack_from(">I", data, end - 4)
    return data[: end - SIGNATURE_HEADER - length]


def depends(data: bytes) -> list[str]:
    """The `depends=` line of the module's .modinfo."""
    start = data.find(b"\0depends=")
    if start < 0:
        return []
    start += len(b"\0depends=")
    listed = data[start : data.index(b"\0", start)].decode()
    return [key(name) for name in listed.split(",") if name]


def collect(tree: Path, wanted: list[str] = WANTED) -> tuple[list[str], dict[str, bytes]]:
    """Modules in the order in which they must be loaded, and their bytes."""
    if not tree.is_dir():
        raise Bad(f"{tree}: no such directory")
    files = {key(path.name): path for path in tree.rglob("*.ko*")}
    builtin = {key(Path(line).name) for listing in tree.rglob("modules.builtin") for line in listing.read_text().split()}
    order: list[str] = []
    data: dict[str, bytes] = {}

    def visit(name: str, wanted_by: str) -> None:
        if name in data or name in builtin:
            return
        if name not in files:
            raise Bad(f"{tree}: no module {name} (wanted by {wanted_by}), and it is not built in")
        data[name] = read_module(files[name])
        for other in depends(data[name]):
            visit(other, name)
        order.append(name)

    for name in wanted:
        visit(name, "the guest")
    return order, data


class Cpio:
    """The "newc" format that the kernel unpacks: 110 bytes of hexadecimal header, name, data, each padded to 4."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self.inode += 1
        encoded = name.encode() + b"\0"
        fields = [self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0]
        self.padded(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        self.padded(data)

    def padded(self, data: bytes) -> None:
        self.parts.append(data + b"\0" * (-len(data) % 4))

    def finish(self) -> bytes:
        self.inode = -1
        self.add("TRAILER!!!", 0)
        return b"".join(self.parts)


def build(agent: bytes, order: list[str], modules: dict[str, bytes]) -> bytes:
    archive = Cpio()
    for directory in ("dev", "proc", "sys", "modules"):
        archive.add(directory, 0o040755)
    # The kernel opens it for /init before any devtmpfs is mounted.
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, agent)
    archive.add("modules/order", 0o100644, "".join(f"{name}.ko\n" for name in order).encode())
    for name in order:
        archive.add(f"modules/{name}.ko", 0o100644, modules[name])
    return archive.finish()


def keep(tree: Path, order: list[str], modules: dict[str, bytes], directory: Path) -> None:
    """The few modules that are used, so that a later agent needs no kernel package again."""
    directory.mkdir()
    for name in order:
        (directory / f"{name}.ko").write_bytes(modules[name])
    builtin = sorted({line for listing in tree.rglob("modules.builtin") for line in listing.read_text().split()})
    (directory / "modules.builtin").write_text("".join(f"{line}\n" for line in builtin))


def note_built_in(directory: Path) -> None:
    """For a kernel that needs no modules, in the words of a kernel package: what is wanted is all built in."""
    (directory / "modules.builtin").write_text("".join(f"{name}.ko\n" for name in WANTED))


def make(arguments: argparse.Namespace) -> None:
    if arguments.all_built_in:
        note_built_in(arguments.modules)
        return
    order, modules = collect(arguments.modules)
    if arguments.keep:
        keep(arguments.modules, order, modules, arguments.keep)
        print(f"note: {len(order)} modules")
        return
    agent = arguments.agent.read_bytes()
    if not agent.startswith(b"\x7fELF"):
        raise Bad(f"{arguments.agent}: not an ELF binary")
    if b"/lib64/ld-linux-x86-64.so.2\0" in agent[:4096]:
        raise Bad(f"{arguments.agent}: dynamically linked, but an initramfs has no loader")
    image = build(agent, order, modules)
    half = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    half.write_bytes(image)
    half.rename(arguments.out)
    print(f"note: {len(order)} modules, agent {len(agent) >> 10} KiB, {len(image) >> 10} KiB in all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agent", type=Path, help="static binary that becomes /init")
    parser.add_argument(
        "--modules", type=Path, required=True, help="a kernel package's lib/modules/VERSION, or what --keep kept"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="write the initramfs")
    what.add_argument("--keep", type=Path, help="only copy the modules that are used, to this new directory")
    what.add_argument("--all-built-in", action="store_true", help="note in --modules that this kernel needs none")
    arguments = parser.parse_args()
    if arguments.out and not arguments.agent:
        parser.error("--out needs --agent")
    try:
        make(arguments)
    except (Bad, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
