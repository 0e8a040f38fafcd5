"""The `clawpot` command, run as a person runs it."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .tools import REPO, within


def binaries() -> Path:
    """Where clawpot-server and clawpot are: $CLAWPOT_BIN_DIR, else the newer of the debug and the release build."""
    if named := os.environ.get("CLAWPOT_BIN_DIR"):
        return Path(named)
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
    built = [path for kind in ("debug", "release") if (path := target / kind / "clawpot-server").exists()]
    if not built:
        raise RuntimeError(f"no clawpot-server in {target}: build it first: cargo build -p clawpot-server -p clawpot-cli")
    return max(built, key=lambda path: path.stat().st_mtime).parent


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    words: list[str]
    code: int
    stdout: bytes
    stderr: str
    seconds: float

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)

    @property
    def lines(self) -> list[Any]:
        """One JSON value per line."""
        return [json.loads(line) for line in self.text.splitlines()]

    def ok(self) -> "Result":
        assert self.code == 0, str(self)
        return self

    def fails(self, code: int, *expected: str) -> "Result":
        """Ended with `code`, and stderr has every one of the words."""
        assert self.code == code, str(self)
        missing = [word for word in expected if word.lower() not in self.stderr.lower()]
        assert not missing, f"stderr lacks {missing}: {self}"
        return self

    def __str__(self) -> str:
        out = self.stdout[:2000].decode(errors="replace")
        return f"{' '.join(self.words)[:400]}: exit {self.code} after {self.seconds:.1f} s\n{self.stderr[-4000:]}\n{out}"


class Cli:
    """Bound to one server's socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.binary = binaries() / "clawpot"

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPOT_")}
        return {**kept, "CLAWPOT_SOCKET": str(self.socket), "NO_COLOR": "1"}

    def __call__(
        self, *argv: object, stdin: bytes | IO[bytes] | None = None, timeout: float = 150, env: dict[str, str] | None = None
    ) -> Result:
        words = [str(self.binary), *map(str, argv)]
        given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin or subprocess.DEVNULL}
        began = time.monotonic()
        done = subprocess.run(
            words, capture_output=True, timeout=within(timeout), env={**self.environment(), **(env or {})}, check=False, **given
        )
        spent = time.monotonic() - began
        return Result(words[1:], done.returncode, done.stdout, done.stderr.decode(errors="replace"), spent)

    def start(self, *argv: object, **given: Any) -> subprocess.Popen[bytes]:
        """In the background; the caller waits for it or kills it."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([str(self.binary), *map(str, argv)], env=self.environment(), **{**pipes, **given})

    def inspect(self, vm: str) -> dict[str, Any]:
        return self("inspect", vm, "-o", "json").ok().json

    def ls(self) -> list[dict[str, Any]]:
        return self("ls", "-o", "json").ok().json

    def sh(self, vm: str, script: str, *options: object, timeout: float = 150) -> Result:
        """A shell script in the guest."""
        return self("exec", *options, vm, "--", "sh", "-c", script, timeout=timeout)
