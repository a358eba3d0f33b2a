"""The chart as helm renders it: objects to look at, and what the tests ask of them."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "lathe"
SERVICES = ("accounts", "datasets", "gateway", "jobs", "models")
NEWEST = "1.37"

TRYOUT: Mapping[str, Any] = {"tryout": {"enabled": True}}
# Somebody else's PostgreSQL and S3.
EXTERNAL: Mapping[str, Any] = {
    "database": {"existingSecrets": {service: f"db-{service}" for service in SERVICES}},
    "store": {"endpoint": "s3.example.com:443", "bucket": "lathe", "existingSecret": "s3-keys"},
}


class _Loader(yaml.CSafeLoader):
    """YAML with each key once: helm takes the last of several, stricter tools refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key is there twice: {keys}"
        return super().construct_mapping(node, deep)


class Refused(Exception):
    """helm did not render: its words."""


def helm() -> str:
    """helm's path. An AssertionError says how to get it."""
    found = shutil.which("helm") or shutil.which("helm", path=str(ROOT / ".venv" / "bin"))
    assert found is not None, "helm is not here: `make test-charts` installs it, or put it on PATH."
    return found


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values laid over each other, the later ones winning, as helm does it with several files."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                result[key] = merged(old, value)
            else:
                result[key] = copy.deepcopy(value)
    return result


@dataclass(frozen=True, slots=True)
class Rendered:
    """The objects of one release, in helm's order."""

    objects: Sequence[Object]

    def of(self, kind: str) -> list[Object]:
        """Every object of a kind."""
        return [one for one in self.objects if one["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {one["metadata"]["name"] for one in self.of(kind)}

    def one(self, kind: str, name: str) -> Object:
        """The object; its name without the release may be given (`jobs` for `lathe-jobs`)."""
        found = [one for one in self.of(kind) if one["metadata"]["name"] in (name, f"lathe-{name}")]
        assert len(found) == 1, f"{len(found)} {kind} {name}, of {sorted(self.names(kind))}"
        return found[0]

    def pod(self, component: str) -> Object:
        """The pod template of a service, a try-out's part, the migration or (`engine:cpu`) an engine class."""
        return dict(self.pods())[component]

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Every pod template, by component; those of the engine classes as `engine:<class>`."""
        for one in self.objects:
            if one["kind"] in ("Deployment", "StatefulSet", "Job"):
                yield component(one), one["spec"]["template"]
            if one["kind"] == "ConfigMap" and one["metadata"]["name"].endswith("-engines"):
                for file, text in one["data"].items():
                    yield f"engine:{file.removesuffix('.yaml')}", yaml.load(text, Loader=_Loader)

    def env(self, component: str) -> dict[str, str]:
        """The variables of a pod's main container, those of its ConfigMap too; `<secret>/<key>` for secret ones."""
        container = self.pod(component)["spec"]["containers"][0]
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for variable in container.get("env", []):
            found[variable["name"]] = (
                variable["value"] if "value" in variable else _source(variable["valueFrom"])
            )
        return found


def component(one: Object) -> str:
    """The component label of an object or a pod template."""
    return str(one["metadata"]["labels"]["app.kubernetes.io/component"])


def render(
    *values: Mapping[str, Any],
    release: str = "lathe",
    namespace: str = "lathe",
    kube_version: str = NEWEST,
    upgrade: bool = False,
    chart: Path = CHART,
) -> Rendered:
    """The objects for values laid over the try-out's; with EXTERNAL among them the try-out is not there.

    Raises Refused with helm's words.
    """
    text = json.dumps(merged(*values) if EXTERNAL in values else merged(TRYOUT, *values), sort_keys=True)
    arguments = [release, str(chart), "--namespace", namespace, "--kube-version", kube_version]
    return Rendered(copy.deepcopy(_render(text, *arguments, *(["--is-upgrade"] if upgrade else []))))


@functools.cache
def _render(values: str, *arguments: str) -> list[Object]:
    command = [helm(), "template", *arguments, "--values", "-"]
    ended = subprocess.run(command, input=values, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise Refused(ended.stderr.strip())
    return [one for one in yaml.load_all(ended.stdout, Loader=_Loader) if one]


def _source(given: Mapping[str, Any]) -> str:
    if "secretKeyRef" in given:
        return f"{given['secretKeyRef']['name']}/{given['secretKeyRef']['key']}"
    return next(iter(given))
