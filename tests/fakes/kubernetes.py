"""Kubernetes' API in memory: the calls that the launcher makes, and hands for a test to play the controllers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lathe.common.clock import Clock
from lathe.common.errors import AlreadyExists, InvalidArgument, LatheError, NotFound
from lathe.jobs.launchers.kube_api import Kind
from lathe.jobs.launchers.manifests import ENGINE_LABEL
from tests.fakes.clock import FakeClock


@dataclass
class FakeKubeApi:
    """kuberay: whether ray.io/v1 is served. `down` makes every call raise it; `refuses` only the calls of its kind."""

    clock: Clock = field(default_factory=FakeClock)
    kuberay: bool = True
    down: LatheError | None = None
    refuses: dict[tuple[str, Kind], LatheError] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, Kind | None]] = field(default_factory=list)
    closed: bool = False
    _objects: dict[tuple[Kind, str], dict[str, Any]] = field(default_factory=dict)
    _made: int = 0

    # --- what the real one does ---

    def list(self, kind: Kind, labels: str = "", fields: str = "") -> Sequence[Mapping[str, Any]]:
        self._called("list", kind)
        found = [thing for (of, _), thing in self._objects.items() if of is kind]
        return copy.deepcopy([one for one in found if _labelled(one, labels) and _fielded(one, fields)])

    def get(self, kind: Kind, name: str) -> Mapping[str, Any] | None:
        self._called("get", kind)
        return copy.deepcopy(self._objects.get((kind, name)))

    def create(self, kind: Kind, body: Mapping[str, Any]) -> None:
        self._called("create", kind)
        name = body["metadata"]["name"]
        if kind is Kind.DEPLOYMENT and not body["spec"].get("selector"):
            raise InvalidArgument(f"{name} is invalid: spec.selector: Required value")
        if (kind, name) in self._objects:
            raise AlreadyExists(f"{name} already exists")
        self.put(kind, body)

    def delete(self, kind: Kind, name: str) -> None:
        self._called("delete", kind)
        gone = self._objects.pop((kind, name), None)
        engine = _labels(gone or {}).get(ENGINE_LABEL)
        if kind is not Kind.POD and engine is not None:
            for pod in self.pods(engine):
                del self._objects[Kind.POD, pod["metadata"]["name"]]

    def log_tail(self, pod: str, container: str, *, previous: bool = False) -> str:
        self._called("log", Kind.POD)
        return self.logs.get(f"{pod} previous" if previous else pod, "")

    def serves(self, group_version: str) -> bool:
        self._called("serves", None)
        return group_version in ("apps/v1", *(("ray.io/v1",) if self.kuberay else ()))

    def close(self) -> None:
        self.closed = True

    # --- what a test does ---

    def put(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """As a controller or an operator writes it, over what was there."""
        thing = copy.deepcopy(dict(body))
        self._made += 1
        thing["metadata"].setdefault("uid", f"uid-{self._made}")
        thing["metadata"].setdefault("creationTimestamp", self.clock.now().isoformat().replace("+00:00", "Z"))
        self._objects[kind, thing["metadata"]["name"]] = thing

    def made(self, kind: Kind, engine_id: str) -> dict[str, Any]:
        """The object of an engine."""
        return next(one for (of, _), one in self._objects.items() if of is kind and _engine(one) == engine_id)

    def pods(self, engine_id: str) -> Sequence[dict[str, Any]]:
        return [one for (of, _), one in self._objects.items() if of is Kind.POD and _engine(one) == engine_id]

    def add_pod(
        self, engine_id: str, status: Mapping[str, Any], name: str = "", node: str = "", **metadata: Any
    ) -> None:
        """A pod from the template of the engine's object, in this state; node: where it was placed."""
        owner = next(
            thing
            for (of, _), thing in self._objects.items()
            if of in (Kind.RAYJOB, Kind.DEPLOYMENT) and _engine(thing) == engine_id
        )
        template = _template(owner)
        names = {"name": name or f"{owner['metadata']['name']}-{len(self.pods(engine_id))}"}
        self.put(
            Kind.POD,
            {
                "metadata": {**template["metadata"], **names, **metadata},
                "spec": {**template["spec"], **({"nodeName": node} if node else {})},
                "status": dict(status),
            },
        )

    def _called(self, verb: str, kind: Kind | None) -> None:
        self.calls.append((verb, kind))
        if self.down is not None:
            raise self.down
        if kind is not None and (verb, kind) in self.refuses:
            raise self.refuses[verb, kind]
        if kind is Kind.RAYJOB and not self.kuberay:
            raise NotFound("the server could not find the requested resource")


def _labels(thing: Mapping[str, Any]) -> Mapping[str, str]:
    return (thing.get("metadata") or {}).get("labels") or {}


def _engine(thing: Mapping[str, Any]) -> str | None:
    return _labels(thing).get(ENGINE_LABEL)


def _template(owner: Mapping[str, Any]) -> Mapping[str, Any]:
    spec: Mapping[str, Any] = owner["spec"]
    found: Mapping[str, Any] = (
        spec["template"] if "template" in spec else spec["rayClusterSpec"]["headGroupSpec"]["template"]
    )
    return found


def _labelled(thing: Mapping[str, Any], selector: str) -> bool:
    for part in filter(None, selector.split(",")):
        name, equals, value = part.partition("=")
        if name not in _labels(thing) or (equals and _labels(thing)[name] != value):
            return False
    return True


def _fielded(thing: Mapping[str, Any], selector: str) -> bool:
    for part in filter(None, selector.split(",")):
        path, _, value = part.partition("=")
        found: Any = thing
        for step in path.split("."):
            found = found.get(step) or {}
        if found != value:
            return False
    return True
