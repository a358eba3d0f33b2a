"""What every launcher tells an engine, and how it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import lathe
from lathe.jobs.ports import EngineLaunch

ENGINE_MODULE = "lathe.engine.main"
_OURS = "LATHE_"
_ENGINES = "LATHE_ENGINE_"


def engine_variables(launch: EngineLaunch, jobs_address: str, given: Mapping[str, str]) -> dict[str, str]:
    """The LATHE_ENGINE_… variables of one engine; what the launcher knows wins over what is given."""
    return {
        **given,
        "LATHE_ENGINE_ENGINE_ID": launch.engine_id,
        "LATHE_ENGINE_BASE_MODEL": launch.base_model,
        "LATHE_ENGINE_BASE_DIGEST": launch.base_digest,
        "LATHE_ENGINE_JOBS_ADDRESS": jobs_address,
        "LATHE_ENGINE_ENGINE_CLASS": launch.engine_class,
        "LATHE_ENGINE_JOB_ID": launch.job_id,
    }


def gang_variables(launch: EngineLaunch, cpus: float, gpus: float) -> dict[str, str]:
    """Of an engine of several workers: how it gets the others from Ray. cpus, gpus: what each of them takes."""
    if launch.workers == 1:
        return {}
    return {
        "LATHE_ENGINE_WORKERS": str(launch.workers),
        "LATHE_ENGINE_RAY_ADDRESS": "auto",
        "LATHE_ENGINE_WORKER_CPUS": f"{cpus:g}",
        "LATHE_ENGINE_WORKER_GPUS": f"{gpus:g}",
    }


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the settings (and keys) of Lathe's other services."""
    kept = {
        key: value for key, value in environ.items() if not key.startswith(_OURS) or key.startswith(_ENGINES)
    }
    # So that a child finds this very code, installed or not.
    root = str(Path(lathe.__file__).parents[1])
    paths = [path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    kept["PYTHONPATH"] = os.pathsep.join([root, *paths])
    return kept
