"""The chart's values in these tests: a small cluster that several releases share."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.harness.commands import run
from tests.cluster.harness.helm import merged
from tests.cluster.harness.kubectl import Kubectl, node_address

CONTROL_PLANE = "node-role.kubernetes.io/control-plane"
SMALL = {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}}


def pinned_try_out() -> dict[str, Any]:
    """The try-out's servers on the node that no test kills."""
    return {
        "tryout": {
            "enabled": True,
            "nodeSelector": {CONTROL_PLANE: ""},
            "tolerations": [{"key": CONTROL_PLANE, "operator": "Exists", "effect": "NoSchedule"}],
            "postgres": {"storage": "1Gi", "resources": SMALL},
            "seaweedfs": {"storage": "5Gi", "resources": SMALL},
        }
    }


def values_for_tests(scraper: str) -> dict[str, Any]:
    """scraper: the address from which this machine reaches pods.

    One thread and a checkpoint each second, so that a killed engine loses little; engines may be there twice.
    """
    services = ("gateway", "accounts", "datasets", "models", "jobs")
    small: dict[str, Any] = {service: {"resources": SMALL} for service in services}
    return merged(
        pinned_try_out(),
        small,
        {
            "migrations": {"resources": SMALL},
            "gateway": {
                "service": {"type": "NodePort"},
                "settings": {"LATHE_GATEWAY_RPC__REFLECTION": "true"},
            },
            "networkPolicy": {"metricsFrom": [{"ipBlock": {"cidr": f"{scraper}/32"}}]},
            "engines": {
                "settings": {"LATHE_ENGINE_THREADS": "1", "LATHE_ENGINE_CHECKPOINT_INTERVAL_S": "1"},
                "classes": {
                    "cpu": {
                        "resources": {
                            "requests": {"cpu": "200m", "memory": "1Gi"},
                            "limits": {"cpu": "2", "memory": "4Gi"},
                        }
                    }
                },
            },
        },
    )


def machine_address(kubectl: Kubectl, node: str) -> str:
    """From where this machine's packets reach nodes and pods."""
    [route] = json.loads(run("ip", "-json", "route", "get", node_address(kubectl, node)))
    return str(route["prefsrc"])
