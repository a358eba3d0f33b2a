"""Makes a cluster with the real images on it and runs tests/cluster there.

    python -m tests.cluster.run [--fast] [--keep] [--reuse] [what pytest takes]

--fast: the install, the e2e suite, one killed pod of each kind, and an engine's lost node; nothing more.
--keep: leave the cluster for looking around; the next run with --reuse goes on with it.
--reuse: take the cluster and the release that are there, without building or loading anything.

KubeRay is added by the first test that needs it: the README's commands run on a cluster without it.

`kind`, `kubectl`, `helm` and `docker` are those on PATH. BASE_IMAGE is what `make images` starts from; where none is
given and no registry answers, a base is made with debootstrap. Logs of a failed run are in build/cluster-logs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from lathe import __version__
from tests.cluster.harness.commands import ROOT, works
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl, collect

STATE = ROOT / "build" / "cluster"
LOGS = ROOT / "build" / "cluster-logs"
NAME = "lathe"
CONTROL, ENGINE, TRYOUT = (f"lathe/{name}:{__version__}" for name in ("control", "engine", "tryout"))
MADE_BASE = "lathe-base:bookworm"
REGISTRY_BASE = "python:3.11-slim-bookworm"
NEEDED = ("kind", "helm", "docker")


def main() -> int:
    options, pytest_args = _options()
    if missing := missing_tools():
        print(missing, file=sys.stderr)
        return 2
    started = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(LOGS, ignore_errors=True)
    kind = Kind(NAME, STATE / "kubeconfig")
    code = 1
    try:
        prepare(kind, options.reuse)
        code = _tests(kind, options.fast, pytest_args)
    finally:
        if code and kind.exists:
            _collect(kind)
        if not options.keep:
            kind.delete()
    print(
        f"test-cluster: {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return code


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--reuse", action="store_true")
    return parser.parse_known_args()


def missing_tools() -> str:
    """What to say when a tool is not there; empty when all are."""
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    return f"Not on PATH: {', '.join(missing)}. A cluster needs kind, helm and docker." if missing else ""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Say what is done and how long it took."""
    started = time.monotonic()
    print(f"-- {title} …", flush=True)
    yield
    print(f"   {time.monotonic() - started:.0f} s", flush=True)


def prepare(kind: Kind, reuse: bool) -> None:
    """A new cluster with the images of today on it; with `reuse` one that is there, as it is."""
    if reuse and kind.exists:
        kind.write_kubeconfig()
        return
    build_images()
    with step(f"cluster {kind.name}"):
        if kind.exists:
            kind.delete()
        kind.create()
    with step("metrics"):
        kind.add_ons("metrics-server")
    with step("images into nodes"):
        load_images(kind)


def build_images() -> None:
    """`make images`, from a base that can be had here. Raises CalledProcessError; make has said why."""
    with step("images"):
        base = os.environ.get("BASE_IMAGE") or _base()
        subprocess.run(["make", "images", f"BASE_IMAGE={base}"], cwd=ROOT, check=True)


def load_images(kind: Kind) -> None:
    """Each node gets what will run there: the try-out's servers are pinned to the control plane."""
    jobs = (
        ([CONTROL], [*kind.workers(), kind.control_plane()]),
        ([TRYOUT], [kind.control_plane()]),
        ([ENGINE], kind.workers()),
    )
    with ThreadPoolExecutor(len(jobs)) as threads:
        for done in [threads.submit(kind.load, images, nodes) for images, nodes in jobs]:
            done.result()


def _base() -> str:
    if works("docker", "image", "inspect", MADE_BASE):
        return MADE_BASE
    if works("docker", "image", "inspect", REGISTRY_BASE) or works(
        "docker", "pull", REGISTRY_BASE, timeout=300
    ):
        return REGISTRY_BASE
    print(f"   no registry has {REGISTRY_BASE}: making {MADE_BASE} with debootstrap", flush=True)
    subprocess.run([ROOT / "docker" / "debian-base.sh", MADE_BASE], cwd=ROOT, check=True)
    return MADE_BASE


def _tests(kind: Kind, fast: bool, extra: list[str]) -> int:
    chosen = ["-m", "fast"] if fast else []
    where = [word for word in extra if not word.startswith("-") and Path(word.partition("::")[0]).exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *([] if where else ["tests/cluster"]),
        "-v",
        "-s",
        "--durations=0",
    ]
    environment = {
        **os.environ,
        "LATHE_CLUSTER_NAME": kind.name,
        "LATHE_CLUSTER_KUBECONFIG": str(kind.kubeconfig),
        "KUBECONFIG": str(kind.kubeconfig),
    }
    return subprocess.run([*command, *chosen, *extra], cwd=ROOT, env=environment, check=False).returncode


def _collect(kind: Kind) -> None:
    kubectl = Kubectl(kind.kubeconfig)
    spaces = [
        name
        for name in kubectl.names("namespaces")
        if not name.startswith(("kube-", "local-path", "default"))
    ]
    collect(kubectl, [*spaces, "kube-system"], LOGS / "at-the-end")
    kind.export_logs(LOGS / "kind")
    print(f"Logs and events are in {LOGS.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
