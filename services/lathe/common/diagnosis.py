"""What `lathe doctor` finds: one sentence a finding, and what to do about it.

Each service examines what only it can see (its database, its store, what launches its engines); the gateway joins the
answers. A probe never raises and never outlives its deadline: what it runs into is what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
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
