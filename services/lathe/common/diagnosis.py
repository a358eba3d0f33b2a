"""What `lathe doctor` finds: one sentence a finding, and what to do about it.

Each service examines what only it can see (its database, its store, what launches its engines); the gateway joins the
answers. A probe never raises and never outlives its deadline: what it runs into is what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    name: what was examined, in one or two words (`database`, `store`, `kuberay`). ok: whether it works. message: one
    sentence that says what was seen. advice: one sentence that says what to do; empty when there is nothing to do. An
    `ok` finding with advice is a warning: it works, but somebody should act.
    """

    name: str
    ok: bool
    message: str
    advice: str = ""

    @property
    def severity(self) -> Severity:
        """OK, WARNING (it works, with advice) or FAILED."""
        if not self.ok:
            return Severity.FAILED
        return Severity.WARNING if self.advice else Severity.OK


# Leases and tokens are decided by clocks: a second is harmless, a lease term (15 s) is not.
_SKEW_WARNS_S = 1.0
_SKEW_FAILS_S = 5.0
_ROOM_WARNS_BYTES = 5 * 1024**3
_ROOM_FAILS_BYTES = 256 * 1024**2


def clock_skew(theirs: datetime, begun: datetime, ended: datetime) -> float:
    """Seconds that another clock is ahead (behind: negative), read at some instant between `begun` and `ended` of ours.

    0 when its time lies in between: the question itself takes a while.
    """
    if theirs > ended:
        return (theirs - ended).total_seconds()
    if theirs < begun:
        return (theirs - begun).total_seconds()
    return 0.0


def clock_finding(name: str, owner: str, theirs: datetime, begun: datetime, ended: datetime) -> Finding:
    """Whether the clock of `owner` (`database`) agrees with ours; see `clock_skew`."""
    skew = clock_skew(theirs, begun, ended)
    side = "ahead" if skew > 0 else "behind"
    if abs(skew) < _SKEW_WARNS_S:
        return Finding(name, True, f"The clock of {owner} agrees with ours.")
    message = f"The clock of {owner} is {abs(skew):.1f} seconds {side} of ours."
    return Finding(
        name, abs(skew) < _SKEW_FAILS_S, message, "Synchronise the machines' clocks (NTP, chrony)."
    )


def room_finding(name: str, free_bytes: int) -> Finding:
    """Whether a disk has room left."""
    message = f"{size_text(free_bytes)} are free on its disk."
    if free_bytes >= _ROOM_WARNS_BYTES:
        return Finding(name, True, message)
    advice = "Give the volume more room, or delete datasets and models that nobody needs."
    return Finding(name, free_bytes >= _ROOM_FAILS_BYTES, f"Only {message}", advice)


def size_text(count: int) -> str:
    """`12.3 MB`"""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
