#!/usr/bin/env python3
"""Takes the ELF `vmlinux` out of a bzImage, whatever it was compressed with.

A bzImage's header (boot protocol 2.08 and later) says where the compressed payload lies, and the payload's last four
bytes say how long it is unpacked, so nothing is searched for and the result is checked.
"""

import argparse
import bz2
import gzip
import lzma
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HEADER_MAGIC = b"HdrS"
PROTOCOL_WITH_PAYLOAD = 0x0208
XEN_NOTE_PHYS32_ENTRY = 18


class Bad(Exception):
    """The kernel cannot be used; the text says why."""


def filter_through(*command: str) -> Callable[[bytes], bytes]:
    """Formats that Python's own library lacks go through their Debian tool."""

    def run(payload: bytes) -> bytes:
        try:
            return subprocess.run(command, input=payload, capture_output=True, check=True).stdout
        except FileNotFoundError:
            raise Bad(f"the kernel is packed with {command[0]}, which is not installed") from None
        except subprocess.CalledProcessError as error:
            raise Bad(f"{command[0]} cannot unpack the kernel: {error.stderr.decode(errors='replace').strip()}") from None

    return run


UNPACKERS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"\x02\x21\x4c\x18", filter_through("lz4", "-dc")),
    (b"\x28\xb5\x2f\xfd", filter_through("zstd", "-dc")),
    (b"\x89LZO", filter_through("lzop", "-dc")),
    (b"\x1f\x8b", gzip.decompress),
    (b"\xfd7zXZ", lzma.decompress),
    (b"\x5d\x00\x00", lzma.decompress),
    (b"BZh", bz2.decompress),
]


def payload_of(image: bytes) -> bytes:
    if image.startswith(b"\x7fELF"):
        # Firecracker's own CI hands out what we would unpack.
        return image
    if image[0x202:0x206] != HEADER_MAGIC:
        raise Bad("not a bzImage: no HdrS at 0x202")
    (protocol,) = struct.unpack_from("<H", image, 0x206)
    if protocol < PROTOCOL_WITH_PAYLOAD:
        raise Bad(f"boot protocol {protocol >> 8}.{protocol & 0xFF:02} is too old: 2.08 or later is needed")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    if len(payload) != length:
        raise Bad(f"truncated: the payload ends at byte {start + length}, the file at {len(image)}")
    return payload


def unpack(payload: bytes) -> bytes:
    if payload.startswith(b"\x7fELF"):
        return payload
    for magic, run in UNPACKERS:
        if payload.startswith(magic):
            # The size behind the packed data is gzip's own trailer in gzip, and no part of the data in all others.
            (expected,) = struct.unpack("<I", payload[-4:])
            unpacked = run(payload if magic == b"\x1f\x8b" else payload[:-4])
            if len(unpacked) != expected:
                raise Bad(f"unpacked to {len(unpacked)} bytes where the image says {expected}")
            return unpacked
    raise Bad(f"packed with something unknown: the payload begins {payload[:6].hex()}")


def check(kernel: bytes) -> None:
    if kernel[:6] != b"\x7fELF\x02\x01":
        raise Bad("the payload is not a 64-bit little-endian ELF")
    # QEMU's -kernel and Firecracker both enter through the PVH note.
    if (
        struct.pack("<III", 4, 4, XEN_NOTE_PHYS32_ENTRY) not in kernel
        and struct.pack("<III", 4, 8, XEN_NOTE_PHYS32_ENTRY) not in kernel
    ):
        raise Bad("the kernel has no PVH entry note (CONFIG_PVH)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bzimage", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        kernel = unpack(payload_of(arguments.bzimage.read_bytes()))
        check(kernel)
    except Bad as error:
        print(f"{arguments.bzimage}: {error}", file=sys.stderr)
        return 1
    half = arguments.out.with_name(f".{arguments.out.name}.{os.getpid()}")
    half.write_bytes(kernel)
    half.rename(arguments.out)
    print(f"note: vmlinux {len(kernel) >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
