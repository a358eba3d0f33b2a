"""The settings of jobs."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, SettingsGroup


class LauncherSettings(SettingsGroup):
    """What starts engines.

    kind: `subprocess` (this machine), `ray` (a Ray cluster's job API), `none` (somebody else does).
    """

    kind: Literal["subprocess", "ray", "none"] = "none"
    folder: Path | None = Field(None, description="subprocess: where engines' logs and process files go")
    engine_env: dict[str, str] = Field(
        default_factory=dict,
        description="LATHE_ENGINE_… variables for every engine: store, cache folder, token files, threads",
    )
    ray_address: str | None = Field(None, description="ray: http://host:port of the dashboard")
    ray_entrypoint: str = Field("python -m lathe.engine.main", description="ray: the command of an engine")
    ray_num_cpus: float = Field(1.0, ge=0)
    ray_num_gpus: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {"subprocess": "folder", "ray": "ray_address"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a launcher of kind {self.kind!r} needs {needed}")
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
    engine_hang_timeout_s: float = Field(180.0, gt=0)
    min_engines: int = Field(0, ge=0, description="per base model that was ever asked for")
    max_engines_per_base: int = Field(1, ge=1)
    max_engines: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _beats_within_a_lease(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_term_s:
            raise ValueError("heartbeat_s must be at most half of lease_term_s")
        return self
