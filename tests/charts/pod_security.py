"""Kubernetes' pod security standard `restricted`, as a pure function: what a cluster would refuse is known before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = {
    *(
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    ),
}
_SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start"),
    *("net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    "net.ipv4.tcp_keepalive_probes",
}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def violations(spec: Mapping[str, Any]) -> list[str]:
    """What keeps a pod's spec from being admitted, one phrase each; empty if nothing does."""
    return [*_of_pod(spec), *_of_containers(spec)]


def _of_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield name
    for volume in spec.get("volumes", []):
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {kind}"
    pod = spec.get("securityContext", {})
    for sysctl in pod.get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    yield from _of_context("pod", pod)


def _of_containers(spec: Mapping[str, Any]) -> Iterator[str]:
    pod = spec.get("securityContext", {})
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind, []):
            name, own = container["name"], container.get("securityContext", {})
            yield from _of_context(name, own)
            if own.get("privileged"):
                yield f"{name}: privileged"
            if own.get("allowPrivilegeEscalation") is not False:
                yield f"{name}: allowPrivilegeEscalation"
            capabilities = own.get("capabilities", {})
            if "ALL" not in capabilities.get("drop", []):
                yield f"{name}: capabilities not dropped"
            if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
                yield f"{name}: capabilities added"
            if not own.get("runAsNonRoot", pod.get("runAsNonRoot")):
                yield f"{name}: runAsNonRoot"
            profile = own.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
            if profile not in ("RuntimeDefault", "Localhost"):
                yield f"{name}: seccompProfile"
            if own.get("procMount", "Default") != "Default":
                yield f"{name}: procMount"
            if any(port.get("hostPort") for port in container.get("ports", [])):
                yield f"{name}: hostPort"


def _of_context(where: str, context: Mapping[str, Any]) -> Iterator[str]:
    """What may stand at a pod and at a container alike."""
    if context.get("runAsUser") == 0:
        yield f"{where}: runAsUser 0"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield f"{where}: hostProcess"
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield f"{where}: appArmorProfile"
    linux = context.get("seLinuxOptions", {})
    if linux.get("type", "") not in _SELINUX or linux.get("user") or linux.get("role"):
        yield f"{where}: seLinuxOptions"
