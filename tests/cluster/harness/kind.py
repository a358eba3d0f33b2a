"""The cluster, by kind's command line, and the failures of its nodes.

With the real kind a node is a container: it is stopped and cut off through Docker. A kind that has `kind node …` does
that itself, and its pods are processes of this machine. Which one it is, only this file knows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.cluster.harness.commands import ROOT, CommandFailed, run, works

CONFIG = ROOT / "deploy" / "kind" / "cluster.yaml"
LOAD_S = 600.0


@dataclass(frozen=True)
class Kind:
    """The cluster `name`; its admin's kubeconfig is kept at `kubeconfig`."""

    name: str
    kubeconfig: Path

    @cached_property
    def fails_nodes(self) -> bool:
        """Whether this kind can stop nodes and cut them off by itself."""
        return works("kind", "node", "--help")

    @property
    def exists(self) -> bool:
        return self.name in run("kind", "get", "clusters").split()

    def create(self) -> None:
        """Raises CommandFailed."""
        config = ("--config", CONFIG, "--kubeconfig", self.kubeconfig, "--wait", "3m")
        run("kind", "create", "cluster", "--name", self.name, *config, timeout=600)

    def write_kubeconfig(self) -> None:
        """Of a cluster that is there already."""
        self.kubeconfig.write_text(run("kind", "get", "kubeconfig", "--name", self.name))
        self.kubeconfig.chmod(0o600)

    def delete(self) -> None:
        run("kind", "delete", "cluster", "--name", self.name, "--kubeconfig", self.kubeconfig, timeout=300)

    def nodes(self) -> list[str]:
        return sorted(run("kind", "get", "nodes", "--name", self.name).split())

    def control_plane(self) -> str:
        return next(node for node in self.nodes() if node.endswith("control-plane"))

    def workers(self) -> list[str]:
        return [node for node in self.nodes() if not node.endswith("control-plane")]

    def load(self, images: Iterable[str], nodes: Iterable[str]) -> None:
        """From Docker into nodes."""
        chosen = ",".join(nodes)
        run("kind", "load", "docker-image", *images, "--name", self.name, "--nodes", chosen, timeout=LOAD_S)

    def add_ons(self, *names: str) -> None:
        """KubeRay and metrics, where this kind brings them. Raises AssertionError saying what to install."""
        try:
            run("kind", "addon", *names, "--name", self.name, timeout=300)
        except CommandFailed as error:
            raise AssertionError(
                f"This kind installs no add-ons. Install {' and '.join(names)} with their own charts on the "
                f"kept cluster (--keep), then run again with --reuse.\n{error}"
            ) from error

    # --- failures ----------------------------------------------------------------------------------------

    def stop(self, node: str) -> None:
        """As a power cut would."""
        if self.fails_nodes:
            run("kind", "node", "stop", node, "--name", self.name)
        else:
            run("docker", "kill", node)

    def start(self, node: str) -> None:
        if self.fails_nodes:
            run("kind", "node", "start", node, "--name", self.name)
        else:
            run("docker", "start", node)

    def cut(self, node: str) -> None:
        """Nothing reaches the node, and it reaches nothing."""
        if self.fails_nodes:
            run("kind", "node", "cut", node, "--name", self.name)
        else:
            run("docker", "network", "disconnect", "kind", node)

    def heal(self, node: str) -> None:
        if self.fails_nodes:
            run("kind", "node", "heal", node, "--name", self.name)
        else:
            run("docker", "network", "connect", "kind", node)

    @contextmanager
    def small_disk(self, node: str, size: str) -> Iterator[str]:
        """A folder of the node with little room; its path there. size: such as `256k`."""
        path = f"/mnt/lathe-{size}"
        make = f"mkdir -p {path} && mount -t tmpfs -o size={size},mode=0777 tmpfs {path}"
        run(*self._on(node), "sh", "-c", make)
        try:
            yield path
        finally:
            # Lazily: a pod that is still on its way out may have it.
            run(*self._on(node), "sh", "-c", f"umount -l {path} && rmdir {path}")

    def signal(self, node: str, container_id: str, name: str, command: str) -> int:
        """Send a signal to the container's processes whose command line has `command`; how many there were."""
        script = (
            f"n=0; for f in $(grep -l {container_id} /proc/[0-9]*/cgroup 2>/dev/null); do d=${{f%/cgroup}}; "
            f"if tr '\\0' ' ' <$d/cmdline 2>/dev/null | grep -q -- '{command}'; then "
            f"kill -{name} ${{d#/proc/}} && n=$((n+1)); fi; done; echo $n"
        )
        return int(run(*self._on(node), "sh", "-c", script))

    def _on(self, node: str) -> tuple[str, ...]:
        return () if self.fails_nodes else ("docker", "exec", node)

    def export_logs(self, folder: Path) -> None:
        """Logs of the cluster's own programs."""
        try:
            run("kind", "export", "logs", folder, "--name", self.name, timeout=120)
        except CommandFailed as error:
            (folder / "export-failed.txt").write_text(str(error))


def timed(what: str, started: float) -> None:
    """One line about how long a step took."""
    print(f"   {what}: {time.monotonic() - started:.0f} s", flush=True)
