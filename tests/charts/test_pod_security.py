"""Every pod of ours is admitted where the namespace enforces `restricted`, and the check itself sees what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.chart import EXTERNAL, render
from tests.charts.pod_security import violations

GOOD: dict[str, Any] = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "volumes": [{"name": "tmp", "emptyDir": {}}],
    "containers": [
        {
            "name": "main",
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "ports": [{"containerPort": 1}],
        }
    ],
}

BAD: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "hostNetwork": lambda pod, _: pod.update(hostNetwork=True),
    "hostPID": lambda pod, _: pod.update(hostPID=True),
    "volume tmp: hostPath": lambda pod, _: pod.update(volumes=[{"name": "tmp", "hostPath": {"path": "/"}}]),
    "pod: runAsUser 0": lambda pod, _: pod["securityContext"].update(runAsUser=0),
    "sysctl kernel.msgmax": lambda pod, _: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
    "main: runAsNonRoot": lambda pod, _: pod["securityContext"].pop("runAsNonRoot"),
    "main: seccompProfile": lambda pod, _: pod["securityContext"].pop("seccompProfile"),
    "main: privileged": lambda _, main: main["securityContext"].update(privileged=True),
    "main: allowPrivilegeEscalation": lambda _, main: main["securityContext"].pop("allowPrivilegeEscalation"),
    "main: capabilities not dropped": lambda _, main: main["securityContext"].pop("capabilities"),
    "main: capabilities added": lambda _, main: main["securityContext"]["capabilities"].update(
        add=["NET_RAW"]
    ),
    "main: hostPort": lambda _, main: main.update(ports=[{"containerPort": 1, "hostPort": 1}]),
    "main: procMount": lambda _, main: main["securityContext"].update(procMount="Unmasked"),
    "main: seLinuxOptions": lambda _, main: main["securityContext"].update(seLinuxOptions={"type": "spc_t"}),
    "main: appArmorProfile": lambda _, main: main["securityContext"].update(
        appArmorProfile={"type": "Unconfined"}
    ),
}


def test_a_good_pod_is_admitted() -> None:
    assert violations(GOOD) == []


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pod_is_not(what: str) -> None:
    pod = copy.deepcopy(GOOD)
    BAD[what](pod, pod["containers"][0])
    assert violations(pod) == [what]
    # The same in an init container.
    if what.startswith("main: ") and "runAs" not in what and "seccomp" not in what:
        pod["initContainers"], pod["containers"] = pod["containers"], copy.deepcopy(GOOD["containers"])
        assert violations(pod) == [what]


GPU = {
    "engines": {"classes": {"gpu": {"device": "cuda", "gpus": 1, "resources": {"limits": {"memory": "8Gi"}}}}}
}


@pytest.mark.parametrize("values", [{}, EXTERNAL, GPU], ids=["tryout", "external", "gpu"])
@pytest.mark.parametrize("upgrade", [False, True])
def test_every_pod_is_restricted(values: dict[str, Any], upgrade: bool) -> None:
    for name, template in render(values, upgrade=upgrade).pods():
        assert not violations(template["spec"]), name


def test_every_container_writes_to_mounts_only_and_has_its_share() -> None:
    rendered = render(GPU)
    assert len(list(rendered.pods())) == 10
    for name, template in rendered.pods():
        spec = template["spec"]
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001, name
        assert spec["automountServiceAccountToken"] is (name == "jobs"), name
        assert spec["enableServiceLinks"] is False, name
        for container in spec.get("initContainers", []) + spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name
            assert "memory" in container["resources"]["limits"], name
            if name != "engine:gpu":
                assert set(container["resources"]["requests"]) >= {"cpu", "memory"}, name
            mounted = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert mounted <= {"/tmp", "/var/cache/lathe", "/var/lib/lathe"}, name
            names = {volume["name"] for volume in spec.get("volumes", [])} | {"data"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= names, name


def test_lost_nodes_give_their_pods_up_soon() -> None:
    for name, template in render(GPU).pods():
        soon = {
            toleration["key"]: toleration["tolerationSeconds"]
            for toleration in template["spec"]["tolerations"]
            if toleration.get("effect") == "NoExecute"
        }
        assert soon == {"node.kubernetes.io/not-ready": 10, "node.kubernetes.io/unreachable": 10}, name
