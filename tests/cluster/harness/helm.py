"""helm, as the README has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.harness.commands import ROOT, run

CHART = ROOT / "charts" / "lathe"
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Helm:
    """helm against one cluster."""

    kubeconfig: Path

    def install(self, release: str, namespace: str, values: Values, timeout: float = 300.0) -> str:
        """What helm printed, when everything is ready. Raises CommandFailed."""
        return self._change("install", release, namespace, values, timeout)

    def install_without_waiting(self, release: str, namespace: str, values: Values) -> str:
        """What helm printed once the objects are made. Raises CommandFailed."""
        argv = ("helm", "install", release, str(CHART), *self._where(namespace), "--values=-")
        return run(*argv, stdin=json.dumps(values))

    def upgrade(self, release: str, namespace: str, values: Values, timeout: float = 300.0) -> str:
        """The same for other values. Old and new pods are there at once, so it takes longer than an install."""
        return self._change("upgrade", release, namespace, values, timeout)

    def status(self, release: str, namespace: str) -> Any:
        """What helm knows about the release: `info`, `hooks`, `version`. Raises CommandFailed."""
        return json.loads(run("helm", "status", release, *self._where(namespace), "--output=json"))

    def notes(self, release: str, namespace: str) -> str:
        """What the chart told whoever installed it."""
        return run("helm", "get", "notes", release, *self._where(namespace))

    def uninstall(self, release: str, namespace: str, timeout: float = 180.0) -> str:
        """What helm printed, when the chart's own objects are gone. Raises CommandFailed."""
        wait = ("--wait", f"--timeout={timeout:.0f}s")
        return run("helm", "uninstall", release, *self._where(namespace), *wait, timeout=timeout + 20)

    def _where(self, namespace: str) -> tuple[str, str]:
        return f"--namespace={namespace}", f"--kubeconfig={self.kubeconfig}"

    def _change(self, verb: str, release: str, namespace: str, values: Values, timeout: float) -> str:
        wait = ("--wait", "--wait-for-jobs", f"--timeout={timeout:.0f}s")
        return run(
            *("helm", verb, release, str(CHART), *self._where(namespace), *wait, "--values=-"),
            stdin=json.dumps(values),
            timeout=timeout + 30,
        )


def merged(*layers: Values) -> dict[str, Any]:
    """Values laid over each other, the later ones on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            under = result.get(key)
            both = isinstance(value, Mapping) and isinstance(under, Mapping)
            result[key] = merged(under, value) if both else value
    return result
