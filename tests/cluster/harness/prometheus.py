"""A Prometheus on this machine that watches a release with deploy/prometheus's own configuration and alerts."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.harness.commands import until
from tests.cluster.harness.kubectl import Kubectl
from tests.fixtures.prometheus import quickened_rules, with_file_discovery, write_targets
from tests.fixtures.servers import free_ports


@dataclass(frozen=True, slots=True)
class Prometheus:
    """It scrapes every two seconds; alerts wait seconds where they have minutes in the file."""

    address: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        found: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return found

    def value(self, expr: str) -> float | None:
        """The one number of a query; None while there is none."""
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        """The names of the alerts that fire now."""
        return {
            alert["labels"]["alertname"]
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def wait_for_alert(self, name: str, timeout: float) -> None:
        until(lambda: name in self.firing(), timeout, f"{name} to fire")

    def wait_until_quiet(self, name: str, timeout: float) -> None:
        until(lambda: name not in self.firing(), timeout, f"{name} to end")

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, what: str, **query: str) -> Any:
        url = f"{self.address}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


@contextmanager
def watching(kubectl: Kubectl, folder: Path) -> Iterator[Prometheus]:
    """Prometheus while inside, its pods looked up anew every two seconds."""
    program = shutil.which("prometheus")
    assert program is not None, "prometheus is not on PATH (Debian's package `prometheus`)."
    targets, rules, config = folder / "targets.json", folder / "alerts.yaml", folder / "prometheus.yaml"
    rules.write_text(quickened_rules())
    config.write_text(yaml.safe_dump(with_file_discovery(targets, rules, "2s")))
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            write_targets(kubectl.items("pods"), targets)
            stop.wait(2)

    looking = threading.Thread(target=look, name="pods for Prometheus")
    looking.start()
    [port] = free_ports(1)
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            until(prometheus.ready, 30, "Prometheus to be ready")
            yield prometheus
        finally:
            stop.set()
            process.terminate()
            process.wait(20)
            looking.join()
