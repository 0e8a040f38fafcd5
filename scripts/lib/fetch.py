#!/usr/bin/env python3
"""fetch.py URL SHA256 FILE: downloads what is pinned by its digest.

FILE has the bytes of that digest, or it is not there. A download that was interrupted goes on where it was the next time
(FILE.part); what has another digest is refused and not kept; what is there already is checked and not fetched again.
Proxies are those of the environment.
"""

import argparse
import hashlib
import http.client
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

#: One connect or read, seconds.
TIMEOUT = 20.0
#: How often a connection may break with nothing gained.
TRIES = 3
#: No asset is nearly so large; a server that never ends is not believed.
LIMIT = 2 << 30
PIECE = 1 << 18


class Refused(Exception):
    """Asking again will not help."""


class TooLong(Refused):
    """What came is no beginning of an asset."""


class Broken(Exception):
    """The network; asking again may help."""


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, wanted: str, target: Path) -> str:
    """What was done, for people."""
    if target.exists():
        if digest_of(target) == wanted:
            return "there already"
        target.unlink()
    part = target.with_name(target.name + ".part")
    resumed = part.stat().st_size if part.exists() else 0
    download(url, part)
    found = digest_of(part)
    if found != wanted and resumed:
        # What lay here may have been another file's beginning.
        part.unlink()
        resumed = 0
        download(url, part)
        found = digest_of(part)
    if found != wanted:
        part.unlink()
        raise Refused(f"{url}: the SHA-256 is {found}, not {wanted}: refused, and not kept")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(target)
    return f"{target.stat().st_size >> 20} MiB, SHA-256 verified" + (f", {resumed >> 20} MiB were there" if resumed else "")


def download(url: str, part: Path) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            read_on(url, part, before)
            return
        except TooLong:
            # Gigabytes, and with them the next run would be refused as well.
            part.unlink()
            raise
        except Broken as error:
            gained = (part.stat().st_size if part.exists() else 0) > before
            failures = 0 if gained else failures + 1
            if failures == TRIES:
                raise
            print(f"{error}; trying again", file=sys.stderr)
            time.sleep(2**failures / 2)


def read_on(url: str, part: Path, have: int) -> None:
    """One connection's worth of the file, behind what is there."""
    request = urllib.request.Request(url, headers={"User-Agent": "clawpot"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, part.open("ab") as file:
            # A server that knows no ranges sends all of it again.
            if have and not goes_on_at(response, have):
                file.truncate(0)
                have = 0
            copy(response, file, have)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:
            # Nothing behind what is there: the digest will tell whether that is all of it.
            return
        if error.code == 429 or error.code >= 500:
            raise Broken(f"{url}: HTTP {error.code}") from None
        raise Refused(f"{url}: HTTP {error.code}") from None
    except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
        raise explained(url, error) from None


def goes_on_at(response: http.client.HTTPResponse, have: int) -> bool:
    if response.status != 206:
        return False
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == have


def copy(response: http.client.HTTPResponse, file, have: int) -> None:
    total = have + response.length if response.length is not None else None
    told = time.monotonic()
    while piece := response.read(PIECE):
        file.write(piece)
        have += len(piece)
        if have > LIMIT:
            raise TooLong(f"more than {LIMIT >> 30} GiB: refused")
        if time.monotonic() - told > 1:
            told = time.monotonic()
            print(f"{have >> 20} MiB" + (f" of {total >> 20}" if total else ""), flush=True)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)


def explained(url: str, error: Exception) -> Exception:
    reason = getattr(error, "reason", error)
    host = urllib.parse.urlsplit(url).hostname
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Refused(f"{host}: {reason.verify_message}: its certificate is not trusted here (package ca-certificates)")
    if isinstance(reason, socket.gaierror):
        return Refused(f"{host}: no such name is found from here; offline, or https_proxy is needed")
    if isinstance(reason, http.client.IncompleteRead):
        return Broken(f"{host}: the connection broke")
    return Broken(f"{host}: {reason or type(reason).__name__}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("sha256")
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if not re.fullmatch(r"[0-9a-f]{64}", arguments.sha256):
        parser.error("a SHA-256 has 64 digits of [0-9a-f]")
    if not arguments.url.startswith(("https://", "http://")):
        parser.error("an http or https URL is needed")
    try:
        print(f"note: {fetch(arguments.url, arguments.sha256, arguments.file)}")
    except (Refused, Broken, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
