"""What a user writes into values: explained, and refused before anything is made if it is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.chart import CHART, EXTERNAL, ROOT, SERVICES, TRYOUT, Refused, helm, merged, render

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())


def at(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return dict(value)


def groups(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema of a value or a group of values, with its path."""
    own = {**SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]], **schema} if "$ref" in schema else schema
    yield path, own
    for name, value in own.get("properties", {}).items():
        yield from groups(value, f"{path}.{name}" if path else name)


@pytest.mark.parametrize("values", [TRYOUT, EXTERNAL], ids=["tryout", "external"])
def test_helm_finds_nothing_to_say_against_it(values: Mapping[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))
    command = [helm(), "lint", "--strict", str(CHART), "--values", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_value_has_a_description() -> None:
    assert not [path for path, schema in groups(SCHEMA) if path and len(schema.get("description", "")) < 4]
    named = [schema for path, schema in groups(SCHEMA) if schema.get("properties")]
    assert all(schema.get("additionalProperties") is False for schema in named)


def test_the_defaults_are_the_schemas() -> None:
    def paths(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
        for name, value in values.items():
            yield (here := f"{path}.{name}" if path else name)
            if isinstance(value, Mapping):
                yield from paths(value, here)

    defaults = set(paths(yaml.safe_load((CHART / "values.yaml").read_text())))
    assert {path for path, _ in groups(SCHEMA) if path} - defaults == set()


MISSPELT = [path for path, schema in groups(SCHEMA) if schema.get("properties")]


@pytest.mark.parametrize("group", MISSPELT, ids=lambda path: path or "top")
def test_a_misspelt_value_is_refused_by_its_name(group: str) -> None:
    with pytest.raises(Refused, match=r"mispelt.* not allowed|not allowed.*mispelt"):
        render(at(f"{group}.mispelt" if group else "mispelt", 1))


WRONG = {
    "gateway.replicas": "three",
    "jobs.replicas": 0,
    "tryout.enabled": "yes",
    "tryout.postgres.storage": 5,
    "images.pullPolicy": "Sometimes",
    "images.control.digest": "sha256:12",
    "store.secure": "no",
    "store.endpoint": "https://s3.example.com",
    "engines.classes.cpu.resources.limits": None,
    "database.poolSize": 0,
    "networkPolicy.database.port": 70000,
    "networkPolicy.store.cidrs": ["here"],
    "engines.kind": "pods",
    "engines.min": -1,
    "log.level": "LOUD",
    "gateway.service.type": "Port",
    "gateway.nodeSelector": "gpu",
    "models.settings": {"log_level": "DEBUG"},
    "fullnameOverride": "Ends-",
}


@pytest.mark.parametrize("path", WRONG)
def test_a_value_of_the_wrong_type_is_refused_by_its_name(path: str) -> None:
    with pytest.raises(Refused) as caught:
        render(at(path, WRONG[path]))
    assert "values don't meet the specifications of the schema" in str(caught.value)
    assert path.rsplit(".", 1)[-1] in str(caught.value)


IMPOSSIBLE: dict[str, tuple[Mapping[str, Any], str]] = {
    "no database": (at("tryout.enabled", False), r"database\.existingSecrets\.\w+ .*tryout\.enabled=true"),
    "one database": (at("database.existingSecrets.jobs", "db"), r"database\.existingSecrets\.\w+"),
    "no store": (merged(EXTERNAL, at("store.endpoint", "")), r"store\.endpoint.*tryout\.enabled=true"),
    "no bucket": (merged(EXTERNAL, at("store.bucket", "")), r"store\.bucket"),
    "no keys": (merged(EXTERNAL, at("store.existingSecret", "")), r"store\.existingSecret"),
    "one certificate": (at("tls.existingSecrets.jobs", "cert"), r"tls\.existingSecrets\.\w+"),
    "unknown class": (at("engines.defaultClass", "gpu"), r"engines\.defaultClass.*gpu.*cpu"),
    "too few engines": (at("engines", {"min": 3, "max": 2}), r"engines\.min \(3\).*engines\.max \(2\)"),
    "more kept than there may be": (
        at("engines", {"min": 3, "max": 5, "maxPerBase": 2}),
        r"engines\.min \(3\).*engines\.maxPerBase \(2\)",
    ),
    "two ingresses in one place": (
        at("ingress", {kind: {"enabled": True, "host": "x.example.com"} for kind in ("http", "grpc")}),
        r"ingress\.http\.host.*ingress\.grpc\.host",
    ),
    "two routes in one place": (
        at(
            "gatewayApi",
            {kind: {"enabled": True, "parentRefs": [{"name": "door"}]} for kind in ("http", "grpc")},
        ),
        r"gatewayApi\.http.*gatewayApi\.grpc",
    ),
    "scaled backwards": (
        at("gateway.autoscaling", {"enabled": True, "minReplicas": 5, "maxReplicas": 2}),
        r"gateway\.autoscaling\.minReplicas",
    ),
    "an ingress to nowhere": (at("ingress.grpc.enabled", True), r"ingress\.grpc\.host"),
    "a route from nowhere": (at("gatewayApi.http.enabled", True), r"gatewayApi\.http\.parentRefs"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_what_to_change(what: str) -> None:
    values, words = IMPOSSIBLE[what]
    given = merged(values) if what in ("no store", "no bucket", "no keys") else values
    with pytest.raises(Refused, match=words):
        render(EXTERNAL, given) if given is not values else render(given)


def test_a_name_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(Refused, match="fullnameOverride"):
        render(release="a-release-with-a-rather-long-name")


@pytest.mark.parametrize(("release", "override"), [("1lathe", ""), ("lathe.two", ""), ("demo", "Tuner")])
def test_a_name_that_no_service_may_have_is_refused(release: str, override: str) -> None:
    with pytest.raises(Refused, match="fullnameOverride"):
        render({"nameOverride": override}, release=release)


def test_a_class_without_a_share_is_refused() -> None:
    with pytest.raises(Refused, match="resources"):
        render(at("engines.classes.big", {"device": "cuda", "gpus": 1}))


def test_the_readme_lists_every_value() -> None:
    text = (CHART / "README.md").read_text()
    leaves = [path for path, schema in groups(SCHEMA) if path and not schema.get("properties")]
    # Requests and limits stand in their group's row; the services that are alike stand together.
    named = {path.removesuffix(".requests").removesuffix(".limits") for path in leaves}
    alike = re.compile(
        rf"^({'|'.join(SERVICES)})\.(replicas|resources|nodeSelector|tolerations|podAnnotations|settings)$"
    )
    missing = [path for path in sorted(named) if not alike.match(path) and f"`{path}`" not in text]
    assert not missing, "run `make docs`"
    for field in ("replicas", "resources", "nodeSelector", "tolerations", "podAnnotations", "settings"):
        assert f".{field}`" in text


def notes(folder: Path) -> str:
    """NOTES.txt as release `demo` in namespace `there` would print it.

    `helm template` leaves the notes out and `helm install --dry-run` asks a cluster, so that the text is rendered as a
    string in a copy of the chart.
    """
    chart = folder / "lathe"
    shutil.copytree(CHART, chart)
    text = (chart / "templates" / "NOTES.txt").read_text()
    (chart / "templates" / "NOTES.txt").unlink()
    (chart / "templates" / "_notes.tpl").write_text('{{- define "notes" -}}' + text + "{{- end -}}")
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}\n')
    values = folder / "values.json"
    values.write_text(json.dumps(TRYOUT))
    command = [helm(), "template", "demo", str(chart), "-n", "there", "--values", str(values)]
    ended = subprocess.run(
        [*command, "--show-only", "templates/notes.yaml"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return str(yaml.safe_load(ended.stdout)["notes"])


def test_the_notes_say_how_to_go_on(tmp_path: Path) -> None:
    told = notes(tmp_path)
    for words in (
        "port-forward service/demo-lathe-gateway",
        "secret demo-lathe-bootstrap",
        "lathe login",
        "lathe doctor",
    ):
        assert words in told
    # What an uninstall leaves is told: every Secret with the policy, and the volumes.
    kept = set(re.findall(r"^  (secret/\S+|persistentvolumeclaim/\S+)$", told, re.MULTILINE))
    rendered = render(release="demo", namespace="there")
    policy = "helm.sh/resource-policy"
    secrets = {
        f"secret/{one['metadata']['name']}"
        for one in rendered.of("Secret")
        if one["metadata"].get("annotations", {}).get(policy) == "keep"
    }
    claims = {f"persistentvolumeclaim/data-{one}-0" for one in rendered.names("StatefulSet")}
    assert kept == secrets | claims
    assert not [one for one in rendered.objects if one["kind"] != "Secret" and policy in str(one["metadata"])]


def test_the_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None and chart["version"] == chart["appVersion"] == project[1]
    assert {
        template["spec"]["containers"][0]["image"].rpartition(":")[2] for _, template in render().pods()
    } == {project[1]}
    assert len(SERVICES) == 5
