"""A VM's sizes, as people write them on a command line."""

import argparse
import re


def memory(text: str) -> int:
    """MiB; with G or M as well."""
    found = re.fullmatch(r"(\d+)([MG]?)", text, re.IGNORECASE)
    mib = int(found[1]) << (10 if found[2].upper() == "G" else 0) if found else 0
    if not 512 <= mib <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r}: MiB, at least 512, such as 4096 or 4G")
    return mib


def cpus(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 to 64")
    return int(text)
