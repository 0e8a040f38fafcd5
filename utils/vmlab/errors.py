"""The one error that users see."""


class LabError(Exception):
    """Which thing failed and why; `next` says what to do about it."""

    def __init__(self, what: str, next: str = "") -> None:
        super().__init__(what)
        self.next = next

    def __str__(self) -> str:
        return f"{self.args[0]}\n  next: {self.next}" if self.next else str(self.args[0])


class Lacking(LabError):
    """This machine has too little of something: disk, memory, a program. Tests skip on it and say so."""
