"""The settings of an engine."""

import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from lathe.common.service import ProcessSettings
from lathe.common.settings import RpcSettings, ServiceSettings, StoreSettings

# A slice of this many tokens of a 135M-parameter model takes well under a second on two CPU threads, and on a
# data-centre GPU is large enough to keep it busy.
DEFAULT_SLICE_TOKENS = {"cpu": 320, "cuda": 8192}


class EngineDoor(ServiceSettings, service="engine"):
    """Where an engine answers and how it is called: what `lathe engine` reads of EngineSettings."""

    model_config = SettingsConfigDict(extra="ignore")
    partial: ClassVar[bool] = True

    rpc: RpcSettings = RpcSettings()
    drain_grace_s: float = Field(30.0, ge=0)


class _Keys(BaseModel):
    access_key: str | None = None
    secret_key: SecretStr | None = None


class StoreKeys(ServiceSettings, service="engine"):
    """The object store's keys in this process's environment: what another rank of an engine reads of EngineSettings."""

    model_config = SettingsConfigDict(extra="ignore")
    partial: ClassVar[bool] = True

    store: _Keys = _Keys()


class EngineSettings(ProcessSettings, service="engine"):
    """`LATHE_ENGINE_…`, or `LATHE_…` for what all services share. Launchers set them."""

    engine_id: str = Field(description="eng-…, given by the launcher")
    base_model: str = Field(description="baseModels/…")
    base_digest: str = Field(description="of the base model's files, lower-case hex")
    jobs_address: str = Field(description="host:port of WorkerService")
    engine_class: str = Field("", description="which kind of engine this is; jobs' default if empty")
    job_id: str = Field("", description="ftjob-…: for this job alone")
    advertise_address: str | None = Field(
        None, description="host:port for the gateway; what rpc binds if unset"
    )
    rpc: RpcSettings = RpcSettings()
    store: StoreSettings
    cache_folder: Path = Field(description="base models and adapters by digest; may be shared by engines")

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    base_quantization: Literal["none", "nf4"] = Field(
        "none",
        description="nf4: the base's linears in 4 bits (QLoRA); needs the extra `nf4`, meant for a GPU",
    )
    threads: int | None = Field(
        None, ge=1, description="of the model; all cores the process may use if unset"
    )
    nice: int = Field(0, ge=0, le=19, description="lets other processes on the machine go first")
    train_tokens_per_slice: int | None = Field(None, ge=1, description="320 on a CPU, 8192 on a GPU if unset")
    fused_tokens: int | None = Field(
        None, ge=1, description="of several jobs' slices in one pass; train_tokens_per_slice if unset"
    )
    fused_slowdown: float = Field(
        1.6, gt=1, description="how many times as long as alone the oldest of several jobs may take"
    )
    decode_steps_per_pass: int = Field(
        1,
        ge=1,
        description="sampling's share: its steps between two training passes, while there is both to do",
    )
    checkpoint_interval_s: float = Field(60.0, gt=0, description="how much training a kill may lose")

    workers: int = Field(1, ge=1, le=64, description="ranks that train a job together, this one included")
    ray_address: str = Field(
        "auto", description="of the Ray that starts the other workers; `local` starts one"
    )
    shard_base: Literal["auto", "always", "never"] = Field(
        "auto",
        description="with several workers, each keeps a share of the base only; auto: when it does not fit one",
    )
    worker_cpus: float = Field(1.0, ge=0, description="of each other worker")
    worker_gpus: float = Field(0.0, ge=0, description="of each other worker")
    gang_timeout_s: float = Field(300.0, gt=0, description="until all workers are there with the base loaded")
    rank_timeout_s: float = Field(
        60.0, gt=0, description="until a worker that does not answer counts as lost"
    )

    max_attempts: int = Field(1, ge=1, le=4)
    max_sequences: int = Field(32, ge=1)
    max_waiting: int = Field(64, ge=0)
    max_adapters: int = Field(
        16, ge=1, description="in memory for sampling; a whole model counts for a quarter"
    )
    kv_budget_mb: int = Field(1024, ge=1)

    parent_pid: int | None = Field(None, description="leave when this process has died")
    orphan_timeout_s: float = Field(600.0, gt=0, description="leave when jobs was out of reach for so long")
    drain_grace_s: float = Field(30.0, ge=0, description="for checkpoints and open streams at a stop")

    def slice_tokens(self) -> int:
        """What train_tokens_per_slice means."""
        return self.train_tokens_per_slice or DEFAULT_SLICE_TOKENS[self.device]

    def pass_tokens(self) -> int:
        """What fused_tokens means."""
        return self.fused_tokens or self.slice_tokens()

    def model_threads(self) -> int:
        """What threads means."""
        return threads_here(self.threads)


def threads_here(wanted: int | None) -> int:
    """As many as are wanted, or one for each core that this process may use."""
    return wanted or len(os.sched_getaffinity(0))
