"""docker/images.sh and push.sh with a docker client that only writes down what it is asked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.charts.chart import CHART, ROOT, render

VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
CLIENT = """#!/bin/sh
echo "$*" >>"$ASKED"
case "$*" in
*nothere*) exit 1 ;;
"push -q closed."*) echo "connection refused" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    client = tmp_path / "docker"
    client.write_text(CLIENT)
    client.chmod(0o755)
    return tmp_path / "asked"


def script(name: str, asked: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{asked.parent}:{os.environ['PATH']}", "ASKED": str(asked), **variables}
    return subprocess.run([ROOT / "docker" / name], env=env, capture_output=True, text=True, check=False)


def push(asked: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return script("push.sh", asked, variables)


@pytest.mark.parametrize(
    "variables",
    [{}, {"TAG": "0.2.0-rc1"}, {"PREFIX": "tuning/lathe"}, {"PREFIX": "t", "TAG": "x"}],
    ids=["as built", "tag", "prefix", "both"],
)
def test_the_chart_finds_what_was_published(variables: dict[str, str], asked: Path) -> None:
    done = push(asked, REGISTRY="registry.example.com/team/", **variables)
    assert done.returncode == 0, done.stderr
    pushed = set(re.findall(r"^push -q (\S+)$", asked.read_text(), re.MULTILINE))
    assert len(pushed) == 3
    values: dict[str, dict[str, object]] = {"images": {}, "global": {}}
    for path, value in re.findall(r"--set (\S+)=(\S+)", done.stdout):
        group, *names = path.split(".")
        if group == "global":
            values["global"][names[0]] = value
        else:
            values["images"].setdefault(names[0], {})[names[1]] = value  # type: ignore[index]
    images = {
        container["image"] for _, pod in render(values).pods() for container in pod["spec"]["containers"]
    }
    assert images == pushed


def test_as_built_the_registry_is_enough(asked: Path) -> None:
    done = push(asked, REGISTRY="registry.example.com", IMAGES="control")
    assert f"push -q registry.example.com/lathe/control:{VERSION}" in asked.read_text().splitlines()
    assert done.stdout.endswith("--set global.imageRegistry=registry.example.com\n")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "REGISTRY="),
        ({"REGISTRY": "https://registry.example.com"}, "without https://"),
        ({"REGISTRY": "registry.example.com", "IMAGES": "control nothere"}, "make images"),
        ({"REGISTRY": "closed.example.com/team"}, "docker login closed.example.com"),
    ],
    ids=["no registry", "an address", "not built", "not reachable"],
)
def test_what_is_missing_is_said(variables: dict[str, str], words: str, asked: Path) -> None:
    done = push(asked, **variables)
    assert done.returncode == 1 and words in done.stderr
    assert "Published" not in done.stdout
    if "closed" not in variables.get("REGISTRY", ""):
        assert not asked.exists() or "push" not in asked.read_text()


def test_an_index_with_a_password_is_kept_out_of_an_image(asked: Path) -> None:
    index = "https://me:hidden@wheels.example.com/cu126"
    done = script("images.sh", asked, {"IMAGES": "engine", "TORCH_FROM": index})
    assert done.returncode == 1 and "PIP_CONF" in done.stderr
    assert "hidden" not in done.stdout + done.stderr
    assert not asked.exists() or "--target engine" not in asked.read_text()
