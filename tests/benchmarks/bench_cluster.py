"""How fast an installation on a cluster starts, what it takes when idle, and how fast it gets over a lost node.

    python tests/benchmarks/bench_cluster.py [--reuse] [--keep]

--reuse: take the cluster that is there, without building or loading anything. --keep: leave the one that was made.

The release `bench` is installed into `lathe-bench` and removed again, and engines that are idle go at once, so that
each job here begins without one. What is measured:

install_ready_s       `helm install --wait` with the try-out, images on the nodes
control_idle_mb       working sets (memory in use less the file cache that could go) of the control services' pods,
                      as their kubelets tell them, 20 s after the install; 10^6 bytes, as everywhere here
control_image_mb      as `docker image inspect` counts
engine_image_mb
engine_start_s        CreateJob, with a tiny model and no engine, to the first step that the client sees; median of 3
ray_alone_s           a RayJob like the engine's, made through the same operator, to the moment when its program, which
                      only connects to Ray, prints; median of 3, taken in turn with the engine's
node_loss_recovery_s  the power of an engine's node is cut, to the job's next step on another

The last line is one JSON object with the limits beside. Exit code 0 says that all of it was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lathe.client import Client
from lathe.common.errors import FailedPrecondition
from lathe.jobs.launchers.manifests import DIGEST_LABEL, ENGINE_LABEL
from lathe.v1 import datasets_pb2, jobs_pb2
from tests.cluster.harness.commands import run, until
from tests.cluster.harness.engines import made_for_engines, rayjobs
from tests.cluster.harness.helm import Helm, Values, merged
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, Object, collect
from tests.cluster.harness.nodes import leave_alone_with_the_engine, stopped
from tests.cluster.harness.release import SERVICES, Release
from tests.cluster.harness.values import machine_address, values_for_tests
from tests.cluster.run import CONTROL, ENGINE, LOGS, NAME, STATE, missing_tools, prepare, step
from tests.e2e.survival import start_long, upload_long, wait_for_step, wait_for_success
from tests.fixtures.tiny_chat import write_tiny_chat

NAMESPACE = "lathe-bench"
REPEATS = 3
IDLE_S = 20.0
# An engine that has nothing to do ends so soon.
ENGINE_IDLE_S = 5
START_S = 180.0
GONE_S = 120.0
RECOVERED_S = 300.0
LONG_EPOCHS = 50
ALONE = "ray-alone"
ALONE_LABEL = "lathe.internal/benchmark"
# The pod's log is that of its first process. The moment is told by the program itself: who asks for it asks late.
PROGRAM = "import ray, time; ray.init(); print('ray-alone', time.time(), flush=True)"
ENTRYPOINT = f'bash -c "exec python -c \\"{PROGRAM}\\" > /proc/1/fd/1 2>&1"'
MARGIN_S = 10.0

Result = dict[str, Any]


def main() -> int:
    options = _options()
    if missing := missing_tools():
        print(missing, file=sys.stderr)
        return 2
    STATE.mkdir(parents=True, exist_ok=True)
    kind = Kind(NAME, STATE / "kubeconfig")
    made = not (options.reuse and kind.exists)
    try:
        prepare(kind, options.reuse)
        result = measured(kind)
    finally:
        if made and not options.keep:
            kind.delete()
    print(verdict(result))
    print(json.dumps(result))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def measured(kind: Kind) -> Result:
    """Every figure, the limits and the machine."""
    kubectl = Kubectl(kind.kubeconfig, NAMESPACE)
    if not kubectl.exists("crd", "rayjobs.ray.io"):
        with step("KubeRay"):
            kind.add_ons("kuberay")
    values = bench_values(machine_address(kubectl, kind.control_plane()))
    with installed(Release(kind, Helm(kind.kubeconfig), kubectl, "bench"), values) as (release, install_s):
        print(f"   helm install, everything ready: {install_s:.1f} s", flush=True)
        time.sleep(IDLE_S)
        figures = {
            "install_ready_s": install_s,
            "control_idle_mb": memory_mb(release),
            "control_image_mb": image_mb(CONTROL),
            "engine_image_mb": image_mb(ENGINE),
        }
        with TemporaryDirectory() as folder, release.client(timeout=120) as client:
            bench = Bench.of(release, client, Path(folder))
            figures |= starts(bench)
            figures["node_loss_recovery_s"] = node_loss_s(bench)
    figures = {name: round(value, 1) for name, value in figures.items()}
    return {**figures, "limits": limits(figures), "machine": machine(kubectl)}


def bench_values(scraper: str) -> Values:
    """Those of the tests, and engines that go when they are idle."""
    return merged(values_for_tests(scraper), {"engines": {"min": 0, "idleTimeoutSeconds": ENGINE_IDLE_S}})


@contextmanager
def installed(release: Release, values: Values) -> Iterator[tuple[Release, float]]:
    """The release and how long its install took; in a namespace that is new, and gone afterwards."""
    remove(release.kubectl)
    release.make_namespace()
    try:
        yield release, release.install(values)
        release.helm.uninstall(release.name, release.namespace)
    except BaseException:
        collect(release.kubectl, [NAMESPACE], LOGS / "bench")
        raise
    finally:
        remove(release.kubectl)


def remove(kubectl: Kubectl) -> None:
    """The namespace with all that is in it."""
    kubectl.run("delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=180s", timeout=200)


# --- what it takes -----------------------------------------------------------------------------------------------


def memory_mb(release: Release) -> float:
    """Of all control pods together."""
    pods = {pod["metadata"]["name"] for service in SERVICES for pod in release.pods(service)}
    total = 0.0
    for node in release.kind.nodes():
        path = f"/api/v1/nodes/{node}/proxy/stats/summary"
        for pod, used in working_sets_mb(json.loads(release.kubectl.run("get", "--raw", path))).items():
            if pod[0] == release.namespace and pod[1] in pods:
                print(f"   {pod[1]}: {used:.0f} MB", flush=True)
                total += used
                pods.remove(pod[1])
    assert not pods, f"no kubelet told the memory of {sorted(pods)}"
    return total


def working_sets_mb(summary: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """By a pod's namespace and name, from a kubelet's summary."""
    return {
        (pod["podRef"]["namespace"], pod["podRef"]["name"]): sum(
            one.get("memory", {}).get("workingSetBytes", 0) for one in pod.get("containers", ())
        )
        / 1e6
        for pod in summary["pods"]
    }


def image_mb(image: str) -> float:
    return int(run("docker", "image", "inspect", "--format", "{{.Size}}", image)) / 1e6


# --- starts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bench:
    """A release, a base model and what it is tuned on."""

    release: Release
    client: Client
    base_model: str
    dataset: datasets_pb2.Dataset

    @classmethod
    def of(cls, release: Release, client: Client, folder: Path) -> Bench:
        model = client.models.import_folder(
            write_tiny_chat(folder), "tiny", license="Apache-2.0", source="a benchmark"
        )
        return cls(release, client, model.name.removeprefix("baseModels/"), upload_long(client))

    def job(self, n_epochs: int = 1) -> jobs_pb2.Job:
        return start_long(self.client, self.base_model, self.dataset, n_epochs)

    def wait_for_no_engine(self) -> None:
        until(lambda: not made_for_engines(self.release.kubectl), GONE_S, "every engine to be gone")


def starts(bench: Bench) -> dict[str, float]:
    """Both in turn, so that a change of the machine's load meets both; a first job warms up."""
    job = bench.job()
    wait_for_step(bench.client, job, 1, START_S)
    [engine] = rayjobs(bench.release.kubectl)
    wait_for_success(bench.client, job)
    seconds: dict[str, list[float]] = {"ray_alone_s": [], "engine_start_s": []}
    for _ in range(REPEATS):
        bench.wait_for_no_engine()
        seconds["ray_alone_s"].append(ray_alone_s(bench.release.kubectl, engine))
        bench.wait_for_no_engine()
        seconds["engine_start_s"].append(engine_start_s(bench))
    for name, each in seconds.items():
        print(f"   {name}: {', '.join(f'{one:.1f}' for one in each)}", flush=True)
    return {name: statistics.median(each) for name, each in seconds.items()}


def engine_start_s(bench: Bench) -> float:
    started = time.monotonic()
    job = wait_for_step(bench.client, bench.job(), 1, START_S)
    seconds = time.monotonic() - started
    wait_for_success(bench.client, job)
    return seconds


def ray_alone_s(kubectl: Kubectl, engine: Object) -> float:
    """The clock of the pod is this machine's."""
    started = time.time()
    kubectl.apply(empty_program(engine))

    def told() -> list[str]:
        logs = kubectl.run("logs", f"--selector={ALONE_LABEL}", "--container=engine", "--tail=-1")
        return [line for line in logs.splitlines() if line.startswith(ALONE)]

    def succeeded() -> bool:
        return bool(kubectl.get("rayjob", ALONE).get("status", {}).get("jobStatus") == "SUCCEEDED")

    until(succeeded, START_S, "the empty program to succeed")
    [line] = told()
    kubectl.run("delete", "rayjob", ALONE)
    return float(line.split()[1]) - started


def empty_program(engine: Object) -> Object:
    """An engine's RayJob with another program in it, and nobody who takes it for an engine."""
    spec = copy.deepcopy(engine["spec"])
    spec |= {"entrypoint": ENTRYPOINT, "jobId": ALONE}
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]
    for mark in (ENGINE_LABEL, DIGEST_LABEL):
        pod["metadata"]["labels"].pop(mark, None)
    pod["metadata"]["labels"][ALONE_LABEL] = ALONE
    pod["spec"]["terminationGracePeriodSeconds"] = 5
    for container in pod["spec"]["containers"]:
        # There is nothing to drain.
        container.pop("lifecycle", None)
    return {"apiVersion": engine["apiVersion"], "kind": "RayJob", "metadata": {"name": ALONE}, "spec": spec}


# --- a lost node -------------------------------------------------------------------------------------------------


def node_loss_s(bench: Bench) -> float:
    """The engine alone is on that node, and in the middle of a job."""
    before = wait_for_step(bench.client, bench.job(LONG_EPOCHS), 1, START_S)
    node = bench.release.node_of("engine")
    leave_alone_with_the_engine(bench.release, node)
    job = wait_for_step(bench.client, bench.job(LONG_EPOCHS), 10, START_S)
    with suppress(FailedPrecondition):  # it may have ended by itself
        bench.client.jobs.cancel(before.name)
    assert bench.release.node_of("engine") == node, "another engine was started meanwhile"
    started = time.monotonic()
    with stopped(bench.release, node):
        lost_at = bench.client.jobs.get(job.name).step
        wait_for_step(bench.client, job, lost_at + 1, RECOVERED_S)
        seconds = time.monotonic() - started
        bench.client.jobs.cancel(job.name)
    return seconds


# --- what is told ------------------------------------------------------------------------------------------------


def limits(figures: Mapping[str, float]) -> dict[str, float]:
    """What was promised for each figure that has a promise."""
    return {
        "install_ready_s": 60.0,
        "control_idle_mb": 750.0,
        "control_image_mb": 700.0,
        "engine_image_mb": 2500.0,
        "engine_start_s": round(figures["ray_alone_s"] + MARGIN_S, 1),
        "node_loss_recovery_s": 90.0,
    }


def verdict(result: Result) -> str:
    """A line per figure."""
    lines = []
    for name, value in result.items():
        if isinstance(value, float):
            limit = result["limits"].get(name)
            said = "" if limit is None else f"{'within' if value <= limit else 'OVER'} {limit:g}"
            lines.append(f"{name:22} {value:8.1f}  {said}".rstrip())
    return "\n".join(lines)


def machine(kubectl: Kubectl) -> dict[str, Any]:
    """What the figures were taken on; load: of the last 15 minutes."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "unknown",
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    server = json.loads(kubectl.run("version", "-o", "json"))["serverVersion"]["gitVersion"]
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "kubernetes": server,
        "nodes": len(kubectl.items("nodes")),
        "load": round(os.getloadavg()[2], 1),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    sys.exit(main())
