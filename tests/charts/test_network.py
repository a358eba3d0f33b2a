"""The NetworkPolicies open the edges of the architecture's "Who may call whom", and no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lathe.jobs.launchers.manifests import GANG_LABEL
from tests.charts.chart import EXTERNAL, Object, Rendered, component, render

Edge = tuple[str, str, int]

# docs/architecture.md, "Who may call whom", in its order.
TABLE: frozenset[Edge] = frozenset(
    {
        *(("gateway", called, 7460) for called in ("accounts", "datasets", "models", "jobs", "engine")),
        *(("jobs", called, 7460) for called in ("accounts", "datasets", "models")),
        ("datasets", "models", 7460),
        ("engine", "jobs", 7460),
        *(
            (caller, "postgres", 5432)
            for caller in ("accounts", "datasets", "gateway", "jobs", "models", "migrate")
        ),
        *((caller, "seaweedfs", 8333) for caller in ("gateway", "datasets", "models", "engine")),
    }
)
COMPONENTS = (
    "accounts",
    "datasets",
    "engine",
    "gateway",
    "jobs",
    "migrate",
    "models",
    "postgres",
    "seaweedfs",
)
# Engine pods that are workers of one job have this besides.
GANG = {"lathe.internal/gang": "true"}
SCRAPED = ("accounts", "datasets", "engine", "gateway", "jobs", "models")


def opened(rendered: Rendered, direction: str, of: str) -> Iterator[tuple[Any, int]]:
    """(peer, port) of every rule of a component; peer is its component, or the peer as it stands, None for anyone."""
    for policy in rendered.of("NetworkPolicy"):
        selector = policy["spec"]["podSelector"]["matchLabels"]
        if selector.get("app.kubernetes.io/component") != of or GANG.items() <= selector.items():
            continue
        assert selector["app.kubernetes.io/instance"] == "lathe"
        for rule in policy["spec"].get(direction) or []:
            peers = rule.get("from" if direction == "ingress" else "to")
            for port in rule["ports"]:
                for peer in peers if peers is not None else [None]:
                    yield _peer(peer), port["port"]


def _peer(peer: Object | None) -> Any:
    own = (peer or {}).get("podSelector", {}).get("matchLabels", {})
    if peer is not None and set(peer) == {"podSelector"}:
        assert own["app.kubernetes.io/name"] == "lathe" and own["app.kubernetes.io/instance"] == "lathe"
        return own["app.kubernetes.io/component"]
    return peer


def between(rendered: Rendered) -> set[Edge]:
    """The edges within the release that both ends have opened."""
    out = {
        (one, peer, port)
        for one in COMPONENTS
        for peer, port in opened(rendered, "egress", one)
        if isinstance(peer, str)
    }
    into = {
        (peer, one, port)
        for one in COMPONENTS
        for peer, port in opened(rendered, "ingress", one)
        if isinstance(peer, str)
    }
    assert out == into, f"open at one end only: {sorted(out ^ into)}"
    return out


def test_the_edges_are_those_of_the_architecture() -> None:
    assert between(render()) == TABLE


def test_without_the_tryout_the_database_and_the_store_are_outside() -> None:
    rendered = render(
        EXTERNAL,
        {
            "networkPolicy": {
                "database": {"cidrs": ["10.1.0.0/24"], "port": 5433},
                "store": {"cidrs": ["10.2.0.0/24"], "port": 9000},
                "kubernetesApi": {"cidrs": ["10.3.0.1/32"], "ports": [6443]},
            }
        },
    )
    inside = {edge for edge in TABLE if edge[1] not in ("postgres", "seaweedfs")}
    assert between(rendered) == inside

    def outside(of: str) -> set[tuple[str, int]]:
        return {
            (peer["ipBlock"]["cidr"], port)
            for peer, port in opened(rendered, "egress", of)
            if isinstance(peer, Mapping) and "ipBlock" in peer
        }

    database, store, api = ("10.1.0.0/24", 5433), ("10.2.0.0/24", 9000), ("10.3.0.1/32", 6443)
    assert {one: outside(one) for one in SCRAPED} == {
        "accounts": {database},
        "datasets": {database, store},
        "engine": {store},
        "gateway": {database, store},
        "jobs": {database, api},
        "models": {database, store},
    }
    assert outside("migrate") == {database}


def test_imports_open_the_way_out_for_datasets_alone() -> None:
    egress = {"cidrs": ["203.0.113.0/24"], "ports": [443]}
    way = ("203.0.113.0/24", 443)
    for enabled in (True, False):
        rendered = render({"imports": {"enabled": enabled, "egress": egress}})
        for one in SCRAPED:
            found = {
                (peer["ipBlock"]["cidr"], port)
                for peer, port in opened(rendered, "egress", one)
                if isinstance(peer, Mapping) and "ipBlock" in peer
            }
            assert (way in found) == (enabled and one == "datasets")


def test_everything_is_closed_first() -> None:
    policy = render().one("NetworkPolicy", "default-deny")["spec"]
    assert policy["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/name": "lathe",
        "app.kubernetes.io/instance": "lathe",
    }
    assert (
        policy["policyTypes"] == ["Ingress", "Egress"]
        and not policy.get("ingress")
        and not policy.get("egress")
    )
    for one in render().of("NetworkPolicy"):
        assert one["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert component(one) in (*COMPONENTS, "default-deny", "gang")


def test_anyone_reaches_the_gateway_and_nothing_else() -> None:
    rendered = render()
    for one in COMPONENTS:
        anyone = {port for peer, port in opened(rendered, "ingress", one) if peer is None}
        assert anyone == ({7460, 8080} if one == "gateway" else set()), one
        # Whoever may be anywhere is asked for by port 53 alone.
        assert {port for peer, port in opened(rendered, "egress", one) if peer is None} <= {53}, one


def test_all_that_call_by_name_may_ask_the_dns() -> None:
    rendered = render()
    for one in (*SCRAPED, "migrate"):
        assert 53 in {port for _, port in opened(rendered, "egress", one)}, one
    dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    rendered = render({"networkPolicy": {"dns": {"to": [dns]}}})
    assert (dns, 53) in list(opened(rendered, "egress", "jobs"))


def test_the_scrape_sources_reach_metrics_and_nothing_else() -> None:
    source = {"ipBlock": {"cidr": "10.250.0.1/32"}}
    rendered = render({"networkPolicy": {"metricsFrom": [source]}})
    for one in COMPONENTS:
        ports = {port for peer, port in opened(rendered, "ingress", one) if peer == source}
        assert ports == ({9090} if one in SCRAPED else set()), one
    closed = render({"networkPolicy": {"metricsFrom": []}})
    for one in COMPONENTS:
        assert 9090 not in {port for _, port in opened(closed, "ingress", one)}, one


def test_the_operator_of_ray_is_looked_for_where_its_own_instructions_put_it() -> None:
    # By its chart, and by the manifests beside it, which name it otherwise.
    by_labels = {
        frozenset(peer["podSelector"]["matchLabels"].items()): peer["namespaceSelector"]["matchExpressions"]
        for peer, port in opened(render(), "ingress", "engine")
        if port == 8265
    }
    part = "app.kubernetes.io"
    assert set(by_labels) == {
        frozenset({(f"{part}/name", "kuberay-operator")}),
        frozenset({(f"{part}/name", "kuberay"), (f"{part}/component", "kuberay-operator")}),
    }
    for (expression,) in by_labels.values():
        assert set(expression["values"]) == {"default", "kuberay-operator", "kuberay-system", "ray-system"}


def test_only_the_operator_of_ray_reaches_ray() -> None:
    rendered = render({"networkPolicy": {"kuberayNamespaces": ["rays"]}})
    ports = {
        (peer["namespaceSelector"]["matchExpressions"][0]["values"][0], port)
        if "matchExpressions" in peer["namespaceSelector"]
        else (peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], port)
        for peer, port in opened(rendered, "ingress", "engine")
        if isinstance(peer, Mapping) and port not in (9090,)
    }
    assert ports == {("rays", 8265)}
    for one in COMPONENTS:
        if one != "engine":
            assert not {8265, 6379, 10001} & {port for _, port in opened(rendered, "ingress", one)}


def test_the_workers_of_a_job_reach_each_other_and_no_other_engine_does() -> None:
    rendered = render()
    policy = rendered.one("NetworkPolicy", "gang")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    peer = {"podSelector": {"matchLabels": selected}}
    assert (policy["ingress"], policy["egress"]) == ([{"from": [peer]}], [{"to": [peer]}])
    # The launcher's label, on engine pods of this release.
    assert selected == GANG | {
        "app.kubernetes.io/name": "lathe",
        "app.kubernetes.io/instance": "lathe",
        "app.kubernetes.io/component": "engine",
    }
    assert set(GANG) == {GANG_LABEL}
    labels = rendered.pod("engine:cpu")["metadata"]["labels"]
    assert GANG_LABEL not in labels and (selected.items() - GANG.items()) <= labels.items()


@pytest.mark.parametrize("upgrade", [False, True])
def test_policies_can_be_left_to_others(upgrade: bool) -> None:
    assert not render({"networkPolicy": {"enabled": False}}, upgrade=upgrade).of("NetworkPolicy")


def test_the_migration_of_an_upgrade_reaches_its_database_before_the_new_policies_are_there() -> None:
    rendered = render(EXTERNAL, upgrade=True)
    hook = rendered.one("NetworkPolicy", "migrate-upgrade")
    job = rendered.one("Job", "migrate-upgrade")
    weight = "helm.sh/hook-weight"
    assert int(hook["metadata"]["annotations"][weight]) < int(job["metadata"]["annotations"][weight])
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert hook["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
