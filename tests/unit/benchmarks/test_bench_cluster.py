"""What the cluster's benchmark makes of what it reads."""

from __future__ import annotations

from typing import Any

from lathe.jobs.launchers.manifests import ENGINE_LABEL, Frame, rayjob
from lathe.jobs.ports import EngineLaunch
from tests.benchmarks.bench_cluster import (
    ALONE,
    bench_values,
    empty_program,
    limits,
    verdict,
    working_sets_mb,
)

FIGURES = {
    "install_ready_s": 61.0,
    "control_idle_mb": 500.0,
    "control_image_mb": 450.0,
    "engine_image_mb": 1500.0,
    "engine_start_s": 21.0,
    "ray_alone_s": 12.0,
    "node_loss_recovery_s": 30.0,
}


def engine() -> dict[str, Any]:
    labels = {"app.kubernetes.io/instance": "bench", "app.kubernetes.io/component": "engine"}
    container = {"name": "engine", "image": "lathe/engine:1", "lifecycle": {"preStop": {}}}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    launch = EngineLaunch("eng-1", "baseModels/tiny", "d" * 64, "cpu")
    return rayjob(launch, template, Frame("bench", "bench", "jobs:7460", "2.60.0"))


def test_the_empty_program_runs_as_an_engine_does_and_is_none() -> None:
    given = engine()
    made = empty_program(given)
    assert made["metadata"] == {"name": ALONE}
    ours, theirs = made["spec"]["rayClusterSpec"], given["spec"]["rayClusterSpec"]
    labels = ours["headGroupSpec"]["template"]["metadata"]["labels"]
    assert ENGINE_LABEL not in labels
    # The operator reaches it by the same network policy.
    assert labels["app.kubernetes.io/component"] == "engine"
    assert ours["headGroupSpec"]["rayStartParams"] == theirs["headGroupSpec"]["rayStartParams"]
    assert made["spec"]["submissionMode"] == given["spec"]["submissionMode"]
    # The engine's own object is as it was.
    assert given == engine()


def test_memory_is_added_up_over_a_pods_containers() -> None:
    used = [{"memory": {"workingSetBytes": 70_000_000}}, {"memory": {"workingSetBytes": 5_000_000}}, {}]
    pod = {"podRef": {"namespace": "n", "name": "jobs"}, "containers": used}
    starting = {"podRef": {"namespace": "n", "name": "new"}}
    assert working_sets_mb({"pods": [pod, starting]}) == {("n", "jobs"): 75.0, ("n", "new"): 0.0}


def test_a_verdict_names_what_is_over_its_limit() -> None:
    lines = verdict({**FIGURES, "limits": limits(FIGURES), "machine": {"cpus": 2}}).splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    over = [line.split()[0] for line in lines if "OVER" in line]
    assert over == ["install_ready_s"]
    assert "within 22" in next(line for line in lines if line.startswith("engine_start_s"))


def test_engines_go_when_idle() -> None:
    assert bench_values("10.0.0.1")["engines"]["min"] == 0
    assert "classes" in bench_values("10.0.0.1")["engines"]
