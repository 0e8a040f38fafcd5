"""Sees every frame on every link of the network namespace it runs in, and remembers the marked ones.

Arguments: the run's nonce, and the number of its last mark. Says "ready", then "over" when it has seen that one; when its stdin
ends it prints one JSON object: for each mark the places where it was seen, as "link in" or "link out". Frames are seen before
any rule when they come in, after all when they go out.
"""

import json
import re
import select
import socket
import sys

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
PACKET_OUTGOING = 4


def main() -> None:
    mark = re.compile(rb"cpm:" + sys.argv[1].encode() + rb":(\d{4});")
    taps = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    taps.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    print("ready", flush=True)
    seen: dict[int, set[str]] = {}
    while True:
        readable, _, _ = select.select([taps, sys.stdin], [], [])
        if taps in readable:
            frame, (link, _, kind, _, _) = taps.recvfrom(65536)
            for number in map(int, mark.findall(frame)):
                if number == int(sys.argv[2]) and number not in seen:
                    print("over", flush=True)
                seen.setdefault(number, set()).add(f"{link} {'out' if kind == PACKET_OUTGOING else 'in'}")
        elif sys.stdin in readable:
            break
    print(json.dumps({number: sorted(places) for number, places in seen.items()}), flush=True)


main()
