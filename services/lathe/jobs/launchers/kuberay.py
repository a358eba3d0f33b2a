"""Engines on Kubernetes: a RayJob each where KubeRay is installed, a Deployment each where it is not."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lathe.common.clock import Clock
from lathe.common.diagnosis import Finding
from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from lathe.jobs.launchers import inspection
from lathe.jobs.launchers.kube_api import Kind, KubeApi
from lathe.jobs.launchers.manifests import (
    CONTAINER,
    ENGINE_LABEL,
    RELEASE_LABEL,
    Frame,
    Owner,
    deployment,
    object_name,
    rayjob,
)
from lathe.jobs.launchers.observed import (
    Observed,
    is_deleted,
    observe_deployment,
    observe_rayjob,
    with_events,
    with_log,
    with_nodes,
)
from lathe.jobs.ports import EngineLaunch, LaunchedEngine

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Objects = Sequence[Mapping[str, Any]]

_RAY = "ray.io/v1"
_ONE_WORKER = (
    "engines are Deployments here, of one worker each; more need KubeRay (engines.kind of the chart: rayjob)."
)
_UNSERVED = "Kubernetes does not know RayJobs at the moment. Is KubeRay installed?"


@dataclass(slots=True)
class KubernetesLauncher:
    """One object per engine, found again by its labels: nothing about engines is remembered here.

    frame: what all engines share; its owner is looked up from owner_deployment at the first start. templates: a folder
    with one pod template per engine class, `<class>.yaml`, read at every start. engines: `auto` takes RayJobs if the
    cluster has them at that moment. deadline_s: for one pass, which is a few calls. fresh_s: how long one answer about
    what runs is good for; several callers ask, and each answer costs the API server up to three lists.
    """

    api: KubeApi
    frame: Frame
    templates: Path
    clock: Clock
    owner_deployment: str | None = None
    engines: Literal["auto", "rayjob", "deployment"] = "auto"
    deadline_s: float = 20.0
    fresh_s: float = 1.0
    # How long it is believed that KubeRay is there or not, and what nodes offer.
    believe_s: float = 30.0
    _seen: tuple[float, Sequence[LaunchedEngine]] | None = None
    _ray: tuple[float, bool] | None = None
    # Since when KubeRay, which was there, is not.
    _ray_missed: float | None = None
    _nodes: tuple[float, Objects | None] | None = None
    _words: dict[str, str] = field(default_factory=dict)

    async def start(self, launch: EngineLaunch) -> None:
        await self._run(lambda: self._start(launch))
        self._seen = None

    async def list(self) -> Sequence[LaunchedEngine]:
        now = self.clock.monotonic()
        if self._seen is None or now - self._seen[0] >= self.fresh_s:
            self._seen = (now, await self._run(self._list))
        return self._seen[1]

    async def stop(self, engine_id: str) -> None:
        await self._run(lambda: self._stop(engine_id))
        self._seen = None

    async def why_one_worker(self) -> str:
        return "" if await self._run(self._uses_ray) else _ONE_WORKER

    async def check(self) -> Sequence[Finding]:
        return await self._run(
            lambda: inspection.look(
                self.api, self.templates, self.engines, self._selector(), self.clock.now()
            )
        )

    async def close(self) -> None:
        """The engines outlive this process; only the connection ends."""
        await asyncio.to_thread(self.api.close)

    async def _run(self, work: Callable[[], Answer]) -> Answer:
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), self.deadline_s)
        except TimeoutError as error:
            raise Unavailable(
                f"Kubernetes did not answer within {self.deadline_s:g} s.", reason="KUBERNETES"
            ) from error

    # --- in a thread from here ---

    def _start(self, launch: EngineLaunch) -> None:
        kind = Kind.RAYJOB if self._uses_ray() else Kind.DEPLOYMENT
        if launch.workers > 1 and kind is Kind.DEPLOYMENT:
            raise FailedPrecondition(_ONE_WORKER)
        template = read_template(self.templates, launch.engine_class)
        frame = replace(self.frame, owner=self._owner())
        make = rayjob if kind is Kind.RAYJOB else deployment
        try:
            self.api.create(kind, make(launch, template, frame, self._nodes_of(launch.avoid)))
        except AlreadyExists:
            log.debug("Engine %s was started before.", launch.engine_id)
        except NotFound as error:
            self._look_for_ray_again()
            raise Unavailable(f"{error.message} Is KubeRay installed?", reason="KUBERNETES") from error
        except PermissionDenied as error:
            if "exceeded quota" in error.message:
                raise Unavailable(error.message, reason="KUBERNETES") from error
            raise FailedPrecondition(
                f"{error.message} Let the service account of jobs create it (the chart's Role does)."
            ) from error
        except InvalidArgument as error:
            raise FailedPrecondition(
                f"{error.message} Correct the values of engine class {launch.engine_class!r}."
            ) from error

    def _nodes_of(self, engines: Collection[str]) -> Sequence[str]:
        """Where the pods of these engines are: on a lost node they stay, in Terminating, until it is back."""
        if not engines:
            return []
        placed = (pod for pod in self._listed(Kind.POD) if _engine_of(pod) in engines)
        return sorted({str(node) for pod in placed if (node := (pod.get("spec") or {}).get("nodeName"))})

    def _stop(self, engine_id: str) -> None:
        name = object_name(self.frame.prefix, engine_id)
        if self.engines != "rayjob":
            self.api.delete(Kind.DEPLOYMENT, name)
        if self._uses_ray():
            self.api.delete(Kind.RAYJOB, name)

    def _list(self) -> Sequence[LaunchedEngine]:
        now = self.clock.now()
        pods: dict[str, Objects] = defaultdict(tuple)
        # Objects first: a pod that is made between the two calls belongs to one of them.
        jobs = self._listed(Kind.RAYJOB) if self._uses_ray() else []
        deployments = self._listed(Kind.DEPLOYMENT) if self.engines != "rayjob" else []
        if jobs or deployments:
            for pod in sorted(self._listed(Kind.POD), key=_age):
                pods[_engine_of(pod)] = (*pods[_engine_of(pod)], pod)
        found = [
            *(observe_rayjob(job, pods[_engine_of(job)], now) for job in jobs if not is_deleted(job)),
            *(
                observe_deployment(one, pods[_engine_of(one)], now)
                for one in deployments
                if not is_deleted(one)
            ),
        ]
        self._words = {name: said for name, said in self._words.items() if name in pods}
        return [self._completed(one).engine for one in found]

    def _completed(self, found: Observed) -> Observed:
        """With what else the API has to say. A detail that cannot be had is left out, and asked for again."""
        try:
            if found.log_of:
                return with_log(found, self._last_words(found))
            if found.lacking:
                nodes = self._node_list()
                return with_nodes(found, nodes) if nodes is not None else found
            for name in found.events_of:
                found = with_events(found, self.api.list(Kind.EVENT, fields=f"involvedObject.name={name}"))
        except LatheError as error:
            log.debug("Engine %s: %s", found.engine.engine_id, error)
        return found

    def _last_words(self, found: Observed) -> str:
        engine_id = found.engine.engine_id
        if engine_id not in self._words:
            self._words[engine_id] = self.api.log_tail(found.log_of, CONTAINER, previous=found.of_previous)
        return self._words[engine_id]

    def _listed(self, kind: Kind) -> Objects:
        try:
            return self.api.list(kind, labels=self._selector())
        except NotFound as error:
            # Not that there are none: whoever believed it would give up every engine.
            self._look_for_ray_again()
            raise Unavailable(_UNSERVED, reason="KUBERNETES") from error
        except PermissionDenied as error:
            raise Unavailable(error.message, reason="KUBERNETES") from error

    def _node_list(self) -> Objects | None:
        """None where jobs may not see nodes."""
        now = self.clock.monotonic()
        if self._nodes is None or now - self._nodes[0] > self.believe_s:
            try:
                self._nodes = (now, self.api.list(Kind.NODE))
            except PermissionDenied:
                self._nodes = (now, None)
        return self._nodes[1]

    def _uses_ray(self) -> bool:
        if self.engines != "auto":
            return self.engines == "rayjob"
        now = self.clock.monotonic()
        if self._ray is None or now - self._ray[0] > self.believe_s:
            self._ray = (now, self._serves_ray(now))
        return self._ray[1]

    def _serves_ray(self, now: float) -> bool:
        """An API server that has just started may not know KubeRay yet: that it is gone is believed after a while."""
        served = self.api.serves(_RAY)
        if served or self._ray is None or not self._ray[1]:
            self._ray_missed = None
            return served
        if self._ray_missed is None:
            self._ray_missed = now
        if now - self._ray_missed <= self.believe_s:
            raise Unavailable(_UNSERVED, reason="KUBERNETES")
        return False

    def _look_for_ray_again(self) -> None:
        if self._ray is not None:
            self._ray = (float("-inf"), self._ray[1])

    def _owner(self) -> Owner | None:
        if self.owner_deployment is None or self.frame.owner is not None:
            return self.frame.owner
        found = self.api.get(Kind.DEPLOYMENT, self.owner_deployment)
        if found is None:
            raise FailedPrecondition(
                f"There is no Deployment {self.owner_deployment} to own engines: "
                "correct LATHE_JOBS_LAUNCHER__KUBERNETES__OWNER_DEPLOYMENT."
            )
        self.frame = replace(self.frame, owner=Owner(self.owner_deployment, str(found["metadata"]["uid"])))
        return self.frame.owner

    def _selector(self) -> str:
        return f"{ENGINE_LABEL},{RELEASE_LABEL}={self.frame.release}"


def read_template(folder: Path, engine_class: str) -> Mapping[str, Any]:
    """The pod template of a class. Raises FailedPrecondition that names the classes there are."""
    path = folder / f"{engine_class}.yaml"
    known = inspection.class_names(folder)
    if engine_class not in known:
        raise FailedPrecondition(
            f"There is no engine class {engine_class!r}; there are {', '.join(known) or 'none'}. "
            "Add it under engines.classes of the chart's values."
        )
    try:
        read = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise FailedPrecondition(
            f"The template of engine class {engine_class!r} cannot be read: {error}"
        ) from error
    if not isinstance(read, dict):
        raise FailedPrecondition(f"The template of engine class {engine_class!r} is no pod template.")
    return read


def _engine_of(thing: Mapping[str, Any]) -> str:
    return str(((thing.get("metadata") or {}).get("labels") or {}).get(ENGINE_LABEL) or "")


def _age(thing: Mapping[str, Any]) -> str:
    return str((thing.get("metadata") or {}).get("creationTimestamp") or "")
