"""The settings of jobs."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, SettingsGroup
from lathe.jobs.gangs import DEFAULT_MAX_WORKERS
from lathe.jobs.model import DEFAULT_CLASS, EngineClasses

_CLASS = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class KubernetesSettings(SettingsGroup):
    """Engines as objects of a Kubernetes cluster; the chart sets all of it."""

    release: str = Field("lathe", description="the Helm release: a label of all that belongs together")
    name_prefix: str | None = Field(
        None, description="how the names of engines' objects begin; the release unless given"
    )
    templates_folder: Path = Field(description="one pod template per engine class, `<class>.yaml`")
    namespace: str | None = Field(
        None, description="where engines run; the namespace of this pod unless given"
    )
    owner_deployment: str | None = Field(
        None, description="the Deployment of jobs: what is made for engines goes when it goes"
    )
    engines: Literal["auto", "rayjob", "deployment"] = Field(
        "auto", description="auto: RayJobs where the cluster has KubeRay, Deployments where not"
    )
    ray_version: str = Field("2.60.0", description="of the engine image; KubeRay wants to know")
    expiry_s: int = Field(300, ge=0, description="how long an ended engine's pod stays if nobody removes it")
    stop_wait_s: int = Field(30, ge=0, description="how long Ray lets an engine end by itself")
    kubeconfig: Path | None = Field(None, description="outside of a pod: the file with the cluster's address")


class LauncherSettings(SettingsGroup):
    """What starts engines.

    kind: `subprocess` (this machine), `ray` (a Ray cluster's job API), `kubernetes`, `none` (somebody else does).
    """

    kind: Literal["subprocess", "ray", "kubernetes", "none"] = "none"
    folder: Path | None = Field(None, description="subprocess: where engines' logs and process files go")
    engine_env: dict[str, str] = Field(
        default_factory=dict,
        description="LATHE_ENGINE_… variables for every engine: store, cache folder, token files, threads",
    )
    ray_address: str | None = Field(None, description="ray: http://host:port of the dashboard")
    ray_entrypoint: str = Field("python -m lathe.engine.main", description="ray: the command of an engine")
    ray_num_cpus: float = Field(1.0, ge=0)
    ray_num_gpus: float = Field(0.0, ge=0)
    kubernetes: KubernetesSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"subprocess": "folder", "ray": "ray_address", "kubernetes": "kubernetes"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a launcher of kind {self.kind!r} needs {needed}")
        return self


class PriceSettings(SettingsGroup):
    """What estimates show as money; nothing is charged by it."""

    currency: str = Field("", pattern=r"^([A-Z]{3})?$", description="ISO 4217, such as EUR")
    engine_hour: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="engine class -> price of one engine's hour"
    )
    hosting_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="price of an hour of serving a tuned model"
    )

    @model_validator(mode="after")
    def _has_currency(self) -> Self:
        if (self.engine_hour or self.hosting_hour is not None) and not self.currency:
            raise ValueError("prices need a currency")
        return self


class JobsSettings(ProcessSettings, service="jobs"):
    """`LATHE_JOBS_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    db: DatabaseSettings
    accounts_address: str = "127.0.0.1:7460"
    models_address: str = "127.0.0.1:7460"
    datasets_address: str = "127.0.0.1:7460"
    jobs_address: str | None = Field(
        None, description="where engines reach this service; its own host and port unless given"
    )
    launcher: LauncherSettings = LauncherSettings()
    lease_term_s: float = Field(15.0, gt=0)
    heartbeat_s: float = Field(3.0, gt=0)
    reconcile_interval_s: float = Field(0.5, gt=0)
    engine_idle_timeout_s: float = Field(600.0, gt=0)
    engine_start_timeout_s: float = Field(300.0, gt=0)
    engine_stop_timeout_s: float = Field(60.0, gt=0)
    engine_classes: Annotated[tuple[str, ...], NoDecode] = Field(
        (DEFAULT_CLASS,),
        min_length=1,
        description="kinds of engines that jobs may ask for: names with commas between them, or a JSON list",
    )
    default_engine_class: str = Field(
        "", description="of jobs that ask for none, and of engines that serve; the first one unless given"
    )
    min_engines: int = Field(0, ge=0, description="per base model that was ever asked for, and class")
    max_engines_per_base: int = Field(1, ge=1, description="of one class; dedicated engines not counted")
    max_engines: int = Field(4, ge=1, description="of all classes and base models, dedicated ones too")
    max_workers: int = Field(
        DEFAULT_MAX_WORKERS,
        ge=1,
        le=64,
        description="of one job; they count as one engine, and take as many places",
    )

    prices: PriceSettings = PriceSettings()

    @field_validator("engine_classes", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return [name.strip() for name in value.split(",")]

    @model_validator(mode="after")
    def _known_classes(self) -> Self:
        wrong = [name for name in self.engine_classes if not _CLASS.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"engine_classes: {wrong[0]!r} must be 1 to 63 lower-case letters, digits and hyphens"
            )
        if self.default_engine_class and self.default_engine_class not in self.engine_classes:
            raise ValueError(
                f"default_engine_class is {self.default_engine_class!r}, "
                f"which is none of engine_classes: {', '.join(self.engine_classes)}"
            )
        return self

    @model_validator(mode="after")
    def _prices_of_known_classes(self) -> Self:
        unknown = sorted(set(self.prices.engine_hour) - set(self.engine_classes))
        if unknown:
            raise ValueError(
                f"prices.engine_hour: {unknown[0]!r} is none of engine_classes: {', '.join(self.engine_classes)}"
            )
        return self

    @property
    def classes(self) -> EngineClasses:
        """The engine classes, with the default among them."""
        return EngineClasses(self.engine_classes, self.default_engine_class or self.engine_classes[0])

    @model_validator(mode="after")
    def _beats_within_a_lease(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_term_s:
            raise ValueError("heartbeat_s must be at most half of lease_term_s")
        return self
