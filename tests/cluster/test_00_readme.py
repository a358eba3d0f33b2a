"""The README's Kubernetes section, word for word, in one shell: from the images to a tuned model, and away again.

It comes first: the cluster has no KubeRay yet, so that engines run as Deployments and the doctor says so. On a cluster
that was kept KubeRay is there, and the doctor says that.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from tests.cluster.harness.commands import ROOT, until
from tests.cluster.harness.kind import Kind
from tests.cluster.harness.kubectl import Kubectl

LIMIT_S = 1800.0
GONE_S = 90.0
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Made already by whoever runs these tests, by the same commands.
MADE = ("kind create cluster", "make images")
# What the shell started beside it ends with it.
SHELL = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"


def commands() -> list[str]:
    """The lines of the section's shell blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## On Kubernetes\n")[2].partition("\n## ")[0]
    lines = [line for block in BLOCK.findall(section) for line in block.splitlines() if line.strip()]
    assert any(line.startswith("helm install") for line in lines), (
        "the README's Kubernetes section has no blocks"
    )
    return lines


def test_the_section_works(kind: Kind, tmp_path: Path) -> None:
    kubectl = Kubectl(kind.kubeconfig, "lathe")
    engines = "a RayJob" if kubectl.exists("crd", "rayjobs.ray.io") else "a Deployment of one pod"
    lines = [line for line in commands() if not line.startswith(MADE)]
    environment = {**os.environ, "KUBECONFIG": str(kind.kubeconfig), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-xc", SHELL + "\n".join(lines)],
        cwd=ROOT,
        env=environment,
        timeout=LIMIT_S,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, "a command of the README failed: see above"
    assert f"each engine runs as {engines}" in done.stdout
    answer = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    assert answer is not None and json.loads(answer[0])["customer"] == "Greg Haddad"
    # The engine goes with its owner, and helm does not wait for what it has not made.
    until(lambda: not kubectl.items("pods"), GONE_S, "the engine's pod to be gone")
    kubectl.run("delete", "namespace", "lathe", "--wait=false")
