"""What the chart renders is valid for the oldest and the newest Kubernetes, and its parts find each other."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
import referencing
import yaml
from kubernetes_validate.utils import all_versions, schema_contents

from tests.charts.chart import CHART, EXTERNAL, NEWEST, SERVICES, Object, component, render

OLDEST = str(re.search(r"(\d+\.\d+)", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])[0])  # type: ignore[index]
# No Kubernetes has these: their own projects' CRDs define them.
CUSTOM = {"HTTPRoute", "GRPCRoute", "PodMonitor"}

LIMITS = {"limits": {"cpu": "4", "memory": "8Gi"}}
EVERYTHING: Mapping[str, Any] = {
    "gateway": {"replicas": 3, "autoscaling": {"enabled": True}, "tls": {"existingSecret": "public"}},
    "jobs": {"replicas": 3, "nodeSelector": {"a": "b"}, "tolerations": [{"key": "k", "operator": "Exists"}]},
    "global": {"imageRegistry": "registry.example.com", "imagePullSecrets": ["pull"]},
    "engines": {
        "cache": {"existingClaim": "weights"},
        "classes": {
            "gpu": {"device": "cuda", "gpus": 2, "nodeSelector": {"gpu": "yes"}, "resources": LIMITS}
        },
    },
    "ingress": {
        kind: {"enabled": True, "host": f"{kind}.example.com", "className": "nginx", "tlsSecret": "t"}
        for kind in ("http", "grpc")
    },
    "gatewayApi": {
        kind: {"enabled": True, "parentRefs": [{"name": "door"}], "hostnames": [f"{kind}.example.com"]}
        for kind in ("http", "grpc")
    },
    "podMonitor": {"enabled": True},
}
KINDS = {
    "tryout": {},
    "external": EXTERNAL,
    "everything": EVERYTHING,
    "no policies": {"networkPolicy": {"enabled": False}, "engines": {"readNodes": False}},
}


@functools.cache
def _definitions(version: str) -> Any:
    contents = schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> Any:
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    file = f"kubernetes-json-schema/v{version}-local-strict/{kind.lower()}-{name}.json"
    schema = schema_contents(file, version)
    registry = referencing.Resource.from_contents(schema) @ _definitions(version)
    return jsonschema.Draft202012Validator(schema, registry=registry)


def faults(one: Object, minor: str) -> list[str]:
    """Where an object differs from what Kubernetes of that version takes; unknown fields are faults too."""
    version = next(known for known in all_versions() if known.startswith(minor + "."))
    validator = _validator(version, one["kind"], one["apiVersion"])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(one)]


def as_pod_template(spec: Object) -> Object:
    """An engine's template as an object that Kubernetes has a schema for."""
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "engine"}, "template": spec}


def test_the_check_sees_faults() -> None:
    service = render().one("Service", "gateway")
    assert faults(service, NEWEST) == []
    service["spec"]["ports"][0]["prot"] = "TCP"
    service["spec"]["type"] = 3
    assert len(faults(service, NEWEST)) == 2


@pytest.mark.parametrize("minor", [OLDEST, NEWEST])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upgrade", [False, True], ids=["install", "upgrade"])
def test_every_object_is_valid(minor: str, kind: str, upgrade: bool) -> None:
    rendered = render(KINDS[kind], kube_version=minor, upgrade=upgrade)
    for one in rendered.objects:
        if one["kind"] not in CUSTOM:
            assert faults(one, minor) == [], f"{one['kind']} {one['metadata']['name']}"
    for name, template in rendered.pods():
        assert faults(as_pod_template(template), minor) == [], name


def test_an_older_kubernetes_is_refused_with_its_version() -> None:
    older = f"1.{int(OLDEST.split('.')[1]) - 1}"
    with pytest.raises(Exception, match=re.escape(older)):
        render(kube_version=older)


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_is_in_the_release(kind: str) -> None:
    seen = set()
    for one in render(KINDS[kind], release="demo", namespace="there").objects:
        meta = one["metadata"]
        cluster_wide = one["kind"].startswith("ClusterRole")
        assert meta["name"].startswith("there-demo-lathe-" if cluster_wide else "demo-lathe"), meta["name"]
        assert meta.get("namespace") == (None if cluster_wide else "there"), meta["name"]
        labels = meta["labels"]
        assert labels["app.kubernetes.io/name"] == "lathe" and labels["app.kubernetes.io/instance"] == "demo"
        assert labels["helm.sh/chart"] == "lathe-0.1.0" and labels["app.kubernetes.io/managed-by"] == "Helm"
        key = (one["kind"], meta["name"])
        assert key not in seen, f"{key} is there twice"
        seen.add(key)


def test_the_name_of_a_release_is_not_doubled() -> None:
    assert "lathe-two-gateway" in render(release="lathe-two").names("Deployment")
    assert "short-gateway" in render({"fullnameOverride": "short"}).names("Deployment")
    assert "demo-tuner-gateway" in render({"nameOverride": "tuner"}, release="demo").names("Deployment")


@pytest.mark.parametrize("kind", KINDS)
def test_selectors_select_exactly_their_own_pods(kind: str) -> None:
    rendered = render(KINDS[kind])
    labels = {name: template["metadata"]["labels"] for name, template in rendered.pods()}

    def selected(selector: Mapping[str, str]) -> set[str]:
        return {name for name, own in labels.items() if selector.items() <= own.items()}

    for one in (*rendered.of("Deployment"), *rendered.of("StatefulSet"), *rendered.of("PodDisruptionBudget")):
        assert selected(one["spec"]["selector"]["matchLabels"]) == {component(one)}
    for service in rendered.of("Service"):
        assert selected(service["spec"]["selector"]) == {component(service)}
        ports = rendered.pod(component(service))["spec"]["containers"][0]["ports"]
        known = {port["name"]: port["containerPort"] for port in ports}
        for port in service["spec"]["ports"]:
            assert known[port["targetPort"]] == port["port"]
    for name, template in rendered.pods():
        for spread in template["spec"].get("topologySpreadConstraints", []):
            assert selected(spread["labelSelector"]["matchLabels"]) == {name}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pod_asks_for_is_made_or_named_by_the_operator(kind: str) -> None:
    rendered = render(KINDS[kind])
    given = {*(f"db-{service}" for service in SERVICES), "s3-keys", "public", "pull"}
    secrets = {one["metadata"]["name"]: set(one["data"]) for one in rendered.of("Secret")}
    for name, template in rendered.pods():
        spec = template["spec"]
        assert spec["serviceAccountName"] in rendered.names("ServiceAccount"), name
        for volume in spec.get("volumes", []):
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets.keys() | given, name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in rendered.names("ConfigMap"), name
        for container in spec.get("initContainers", []) + spec["containers"]:
            for variable in container.get("env", []):
                wanted = variable.get("valueFrom", {}).get("secretKeyRef")
                if wanted and wanted["name"] not in given:
                    assert wanted["key"] in secrets[wanted["name"]], f"{name}: {variable['name']}"


def test_one_account_for_each_and_only_jobs_may_do_anything() -> None:
    rendered = render()
    accounts = [
        template["spec"]["serviceAccountName"] for name, template in rendered.pods() if name != "engine:cpu"
    ]
    assert len(set(accounts)) == len(accounts) == 8
    bound = {
        subject["name"]
        for one in (*rendered.of("RoleBinding"), *rendered.of("ClusterRoleBinding"))
        for subject in one["subjects"]
    }
    assert bound == {"lathe-jobs"}
    rules = {
        (group, resource): set(rule["verbs"])
        for rule in rendered.one("Role", "jobs")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert rules == {
        ("ray.io", "rayjobs"): {"create", "list", "delete"},
        ("apps", "deployments"): {"create", "get", "list", "delete"},
        ("", "pods"): {"list"},
        ("", "pods/log"): {"get"},
        ("", "events"): {"list"},
    }
    nodes = rendered.of("ClusterRole")
    assert [one["rules"] for one in nodes] == [
        [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]
    ]
    assert not render({"engines": {"readNodes": False}}).of("ClusterRole")
