"""Runs as root in a guest: sends the frames it is given and tries the connections it is given.

One JSON object on stdin: {"delay": seconds, "frames": [[MAC of the NIC, frame in hexadecimal] …],
"connects": [[kind, address, port] …], "patience": seconds after which what is dropped in silence is given up,
"open": [[kind, address, port] …] that must answer, "long": however long it takes on a busy host, seconds,
"last": the frame that is sent after all else}.
Says "ready" when it has it, waits, acts, and prints one JSON object: what went wrong, and what came of each connection.
"""

import errno
import json
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Between frames, seconds: no faster than an emulated NIC takes them.
PAUSE = 0.002


def nics() -> dict[str, str]:
    """Names by MAC address."""
    return {(path / "address").read_text().strip(): path.name for path in Path("/sys/class/net").iterdir()}


def send(frames: list[list[str]]) -> list[str]:
    """Everything that the guest's own kernel refused to send."""
    names, sockets, refused = nics(), {}, []
    for number, (mac, frame) in enumerate(frames):
        if mac not in sockets:
            sockets[mac] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            sockets[mac].bind((names[mac], 0))
        try:
            sockets[mac].send(bytes.fromhex(frame))
        except OSError as error:
            refused.append(f"frame {number}: {error}")
        time.sleep(PAUSE)
    return refused


def connect(target: list[str], patience: float) -> str:
    """ "open" if anything answers."""
    kind, address, port = target
    try:
        if kind == "vsock":
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as end:
                end.settimeout(patience)
                end.connect((int(address), int(port)))
            return "open"
        if kind == "tcp":
            socket.create_connection((address, int(port)), timeout=patience).close()
            return "open"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.settimeout(patience)
            end.connect((address, int(port)))
            # A question for a name, which a resolver would answer; to others it is noise.
            end.send(b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01")
            end.recv(512)
        return "open"
    except TimeoutError:
        return "silence"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def main() -> None:
    plan = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    time.sleep(plan["delay"])
    connects = [(target, plan["patience"]) for target in plan["connects"]] + [(target, plan["long"]) for target in plan["open"]]
    with ThreadPoolExecutor(max(1, len(connects))) as pool:
        tries = [pool.submit(connect, *one) for one in connects]
        refused = send(plan["frames"])
        came = {" ".join(map(str, target)): one.result() for (target, _), one in zip(connects, tries, strict=True)}
    refused += send([plan["last"]])
    print(json.dumps({"refused": refused, "connects": came}), flush=True)


main()
