"""The alerts, the scrape configuration and the dashboard: each parses, and asks only for metrics that there are."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lathe.common.metrics import Metrics
from tests.charts.chart import render
from tests.fixtures.prometheus import (
    DEPLOY,
    dashboard_queries,
    pod_targets,
    quickened_rules,
    with_file_discovery,
)

RULES = DEPLOY / "prometheus" / "alerts.yaml"
OPERATIONS = DEPLOY.parent / "docs" / "operations.md"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
QUERIES = dashboard_queries()
_SELECTED = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
_LABEL = re.compile(r"(\w+)\s*[!=]~?=?\s*\"")
_TARGET_LABELS = {"job", "namespace", "release", "component", "pod", "node", "instance", "le"}

needs_promtool = pytest.mark.usefixtures("promtool")


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    assert found is not None, (
        "promtool is not here: install Prometheus (Debian's package `prometheus` has it)."
    )
    return found


def check(*arguments: str | Path) -> None:
    ended = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def series() -> dict[str, set[str]]:
    """Every series name that a process of Lathe can show, with its own labels."""
    names: dict[str, set[str]] = {"up": set()}
    for metric in Metrics().declared():
        family = next(iter(metric.describe()))
        labels = set(metric._labelnames)
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + ending: labels for ending in endings}
    return names


def asked() -> dict[str, str]:
    return QUERIES | {f"alert {rule['alert']}": rule["expr"] for rule in ALERTS}


@needs_promtool
def test_the_alerts_do_what_their_unit_tests_say() -> None:
    check("check", "rules", RULES)
    check("test", "rules", DEPLOY / "prometheus" / "tests" / "alerts.yaml")


@needs_promtool
def test_the_configuration_is_valid_but_for_the_discovery_that_debian_leaves_out(tmp_path: Path) -> None:
    config, targets = tmp_path / "prometheus.yaml", tmp_path / "targets.json"
    targets.write_text("[]")
    config.write_text(yaml.safe_dump(with_file_discovery(targets, RULES)))
    check("check", "config", config)
    real = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    assert real["rule_files"] == ["alerts.yaml"] and real["scrape_configs"][0]["kubernetes_sd_configs"]


@needs_promtool
def test_the_rules_of_the_cluster_tests_differ_in_their_times_only(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(quickened_rules())
    check("check", "rules", rules)
    quick = [rule for group in yaml.safe_load(quickened_rules())["groups"] for rule in group["rules"]]
    for rule, fast in zip(ALERTS, quick, strict=True):
        assert fast.get("for", "0s").endswith("s") and "* 60" not in fast["expr"]
        assert rule["alert"] == fast["alert"] and rule["annotations"] == fast["annotations"]


@pytest.mark.parametrize("name", asked())
def test_what_is_asked_for_exists(name: str) -> None:
    known = series()
    expr = asked()[name]
    selectors = _SELECTED.findall(expr)
    assert selectors, f"{name} selects nothing: {expr}"
    for metric, matchers in selectors:
        assert metric in known, f"{name} asks for {metric}, which no process shows"
        labels = set(_LABEL.findall(matchers))
        assert labels <= known[metric] | _TARGET_LABELS, f"{name} filters {metric} by labels that it has not"
    for by in re.findall(r"\bby \(([^)]*)\)", expr):
        labels = set(re.split(r",\s*", by))
        shown = set(itertools.chain.from_iterable(known[metric] for metric, _ in selectors))
        assert labels <= shown | _TARGET_LABELS, f"{name} groups by labels that there are not: {labels}"


@needs_promtool
def test_every_query_of_the_dashboard_parses(tmp_path: Path) -> None:
    # promtool parses expressions in rules only, in the version that Debian has.
    rules = [{"record": f"q:{number}", "expr": expr} for number, expr in enumerate(QUERIES.values())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    check("check", "rules", file)


def test_the_dashboard_shows_every_metric_that_is_ours() -> None:
    text = " ".join(QUERIES.values())
    missing = [
        name for name in series() if not name.endswith(("_sum", "_count", "_bucket")) and name not in text
    ]
    histograms = [name for name in series() if name.endswith("_bucket") and name not in text]
    assert not missing and not histograms


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    name = str(rule["alert"])
    assert name.startswith("Lathe") and rule["labels"]["severity"] in ("warning", "critical")
    for part in ("summary", "description", "runbook"):
        assert rule["annotations"][part].strip()
    assert rule["annotations"]["runbook"].startswith(f"docs/operations.md#{name.lower()}: ")
    assert f"### {name}\n" in OPERATIONS.read_text()
    assert "namespace" in rule["annotations"]["summary"] and "release" in rule["annotations"]["summary"]


def test_the_pod_monitor_gives_the_labels_that_the_alerts_ask_for() -> None:
    job = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    wanted = {
        rule["target_label"]: rule["source_labels"]
        for rule in job["relabel_configs"]
        if rule.get("target_label", "__address__") != "__address__"
    }
    monitor = render({"podMonitor": {"enabled": True}}).one("PodMonitor", "lathe")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    given = {rule["targetLabel"]: rule.get("sourceLabels") for rule in endpoint["relabelings"]}
    # The operator of Prometheus gives these two itself, and a job's name that is none of ours.
    by_itself = {name: wanted[name] for name in ("namespace", "pod")}
    assert given | by_itself == {**wanted, "job": None}
    assert endpoint["relabelings"][0]["replacement"] == job["job_name"] == "lathe"


def test_pods_are_found_as_kubernetes_discovery_finds_them() -> None:
    def pod(name: str, address: str, labels: dict[str, str]) -> dict[str, object]:
        return {
            "metadata": {
                "name": name,
                "namespace": "ns",
                "labels": labels,
                "annotations": {"prometheus.io/port": "9090"},
            },
            "spec": {
                "nodeName": "n1",
                "containers": [{"ports": [{"containerPort": 7460}, {"containerPort": 9090}]}],
            },
            "status": {"podIP": address, "phase": "Running"},
        }

    ours = {"app.kubernetes.io/name": "lathe", "app.kubernetes.io/component": "jobs"}
    found = pod_targets([pod("a", "10.0.0.1", ours), pod("b", "", ours), pod("c", "10.0.0.2", {})])
    assert [group["targets"] for group in found] == [["10.0.0.1:7460", "10.0.0.1:9090"]]
    labels = found[0]["labels"]
    assert labels["__meta_kubernetes_pod_annotation_prometheus_io_port"] == "9090"
    assert labels["__meta_kubernetes_pod_label_app_kubernetes_io_component"] == "jobs"
    assert (
        labels["__meta_kubernetes_namespace"] == "ns" and labels["__meta_kubernetes_pod_phase"] == "Running"
    )
