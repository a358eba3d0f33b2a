"""How a case looks at the rendered objects, and what cases have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.charts.chart import Rendered

Look = Callable[[Rendered], Any]
Case = tuple[Mapping[str, Any], Look, Any]

DIGEST = "sha256:" + "a" * 64
RESOURCES = {
    "requests": {"cpu": "7m", "memory": "7Mi", "ephemeral-storage": "7Mi"},
    "limits": {"cpu": "8", "memory": "8Mi"},
}
TOLERATION = {"key": "mine", "operator": "Exists", "effect": "NoSchedule"}
UNSCRAPED = {"prometheus.io/scrape": "false"}


def at(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def main(name: str) -> Callable[[Rendered], Any]:
    return lambda r: r.pod(name)["spec"]["containers"][0]


def env(name: str, variable: str) -> Look:
    return lambda r: r.env(name).get(variable)


def spec(kind: str, name: str, *path: str | int) -> Look:
    def look(r: Rendered) -> Any:
        found: Any = r.one(kind, name)
        for step in path:
            found = found[step]
        return found

    return look


def pod(name: str, *path: str | int) -> Look:
    def look(r: Rendered) -> Any:
        found: Any = r.pod(name)["spec"]
        for step in path:
            found = found[step]
        return found

    return look


def last_toleration(name: str) -> Look:
    return lambda r: r.pod(name)["spec"]["tolerations"][-1]


def storage(name: str) -> Look:
    return spec("StatefulSet", name, "spec", "volumeClaimTemplates", 0, "spec")


def secret_of(name: str, volume: str) -> Look:
    def look(r: Rendered) -> Any:
        volumes = r.pod(name)["spec"]["volumes"]
        return next((one["secret"]["secretName"] for one in volumes if one["name"] == volume), None)

    return look


def images(r: Rendered) -> set[str]:
    return {
        container["image"]
        for _, template in r.pods()
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]
    }
