"""What on this machine bears a server's name, or stands in its state directory.

Each thing is a line "category name". Numbers of slots are left out: which slots are warm changes, how many does not.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path

from .tools import children_of_mount, run

#: What VMs have below a state directory. The rest (database, identity, locks, templates) is the server's own.
#: Half-made files bear names of their own, wherever they are.
STATE_FILES = re.compile(r"^((disks|logs)/|jail/[^/]+/)|(^|/)\.[^/]*\.tmp$")


class Traces:
    """Looks for one server's things."""

    def __init__(self, state_dir: Path, netns: str) -> None:
        self.state_dir = state_dir
        self.netns = netns

    @property
    def instance(self) -> str | None:
        try:
            return (self.state_dir / "instance").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def now(self) -> Counter[str]:
        """Everything there is."""
        found: Counter[str] = Counter()
        if self.instance:
            found.update(f"cgroup {path.name}" for path in self.cgroups())
            found.update(f"netns {self._unnumbered(name)}" for name in self.netns_names())
            found.update(f"link {self._unnumbered(name)}" for name in self.links())
            found.update(f"nft {self._unnumbered(element)}" for element in self.nft_elements())
        found.update(f"process {line}" for _, line in self.processes())
        found.update(f"mount {point}" for point in children_of_mount(self.state_dir))
        found.update(f"loop {line}" for line in self.loops())
        found.update(f"file {name}" for name in self.files())
        found.update(f"socket {name}" for name in self.sockets())
        return found

    def _mine(self, name: str) -> bool:
        return re.search(rf"(?<![a-z0-9])(cp)?{self.instance}(?![a-z0-9])", name) is not None

    def _unnumbered(self, name: str) -> str:
        return re.sub(rf"cp{self.instance}-\d+", f"cp{self.instance}-N", name)

    def cgroups(self) -> list[Path]:
        """In every hierarchy, below the group that holds the instance's machines."""
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        points = [Path(words[1]) for words in mounts if words[2] in ("cgroup", "cgroup2")]
        found = []
        for point in points:
            for directory, names, _ in os.walk(point):
                found += [Path(directory, name) for name in names if self._mine(directory.removeprefix(str(point)))]
        return found

    def netns_names(self) -> list[str]:
        directory = Path("/run/netns")
        return sorted(name for name in os.listdir(directory) if self._mine(name)) if directory.exists() else []

    def links(self) -> list[str]:
        found = json.loads(run("ip", "-n", self.netns, "-j", "link") or "[]")
        return [link["ifname"] for link in found if self._mine(link["ifname"])]

    def nft_elements(self) -> list[str]:
        """Elements that mention a slot of ours: what lets it talk."""
        command = ("nsenter", f"--net=/run/netns/{self.netns}", "--", "nft", "-j", "list", "ruleset")
        rules = json.loads(run(*command))["nftables"]
        found = []
        for entry in rules:
            for kind in ("set", "map"):
                elements = entry.get(kind, {}).get("elem", [])
                found += [text for element in elements if self._mine(text := json.dumps(element))]
        return found

    def processes(self) -> list[tuple[int, str]]:
        """In the instance's cgroups, or with working directory, program or open database below the state directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                groups = (entry / "cgroup").read_text()
                links = [os.readlink(entry / name) for name in ("cwd", "exe", "root")]
                program = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if any(self._inside(link) for link in links) or (self.instance and self._mine(groups)):
                found.append((int(entry.name), program))
        return found

    def _inside(self, path: str) -> bool:
        return path == str(self.state_dir) or path.startswith(f"{self.state_dir}/")

    def loops(self) -> list[str]:
        listed = json.loads(run("losetup", "--json", "--list", check=False) or "{}")
        return [loop["name"] for loop in listed.get("loopdevices", []) if self._inside(str(loop.get("back-file")))]

    def files(self) -> list[str]:
        found = []
        for directory, names, files in os.walk(self.state_dir):
            relative = Path(directory).relative_to(self.state_dir)
            found += [str(relative / name) for name in [*names, *files] if STATE_FILES.match(str(relative / name))]
        return found

    def sockets(self) -> list[str]:
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
        paths = [words[7] for line in lines if len(words := line.split()) > 7]
        return [path for path in paths if self._inside(path)]
