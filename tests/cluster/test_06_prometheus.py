"""Prometheus sees every pod, the first dashboard shows data, and the first alerts fire when they should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from urllib.request import Request, urlopen

import pytest

from lathe.client import Client
from lathe.common.errors import LatheError, NotFound
from lathe.common.metrics import Metrics
from tests.cluster.conftest import START_S, Work
from tests.cluster.harness.commands import until
from tests.cluster.harness.prometheus import Prometheus, watching
from tests.cluster.harness.release import SERVICES, Release
from tests.e2e.data import ask
from tests.e2e.survival import wait_for_success
from tests.fixtures.prometheus import dashboard_queries

SCRAPED_S = 60.0
ALERT_S = 120.0


@pytest.fixture(scope="module")
def prometheus(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watching(release.kubectl, tmp_path_factory.mktemp("prometheus")) as running:
        yield running


@pytest.fixture(scope="module")
def engine(release: Release, work: Work) -> str:
    """A pod of an engine that has just trained and answered; something was refused too, whatever ran before."""
    work.finish(work.begin(step=1))
    work.client.chat(work.base_model, ask("Hello"), max_tokens=4)
    with pytest.raises(NotFound):
        work.client.jobs.get("projects/default/jobs/ftjob-none")
    # The HTTP door has metrics of its own, and none before its first request.
    key = {"Authorization": f"Bearer {work.platform.api_key}"}
    with urlopen(Request(f"{work.platform.http}/v1/models", headers=key), timeout=30) as answer:
        assert answer.status == 200
    return str(release.wait_for_engine(START_S)["metadata"]["name"])


def test_every_pod_is_scraped(prometheus: Prometheus, engine: str) -> None:
    wanted = {*SERVICES, "engine"}

    def up() -> set[str]:
        return {sample["metric"]["component"] for sample in prometheus.query('up{job="lathe"} == 1')}

    until(lambda: up() == wanted, SCRAPED_S, f"`up` to be 1 for {sorted(wanted)}")
    assert engine in {sample["metric"]["pod"] for sample in prometheus.query("up == 1")}
    # Nothing else was taken for a target: no migration, no database, and each pod once.
    assert until(lambda: not prometheus.query("up == 0"), SCRAPED_S, "every target to answer")
    assert not prometheus.query("count by (pod) (up) > 1")


def test_each_metric_is_there(prometheus: Prometheus, engine: str) -> None:
    for metric in Metrics().declared():
        family = next(iter(metric.describe()))
        ending = {"counter": "_total", "histogram": "_count"}.get(family.type, "")
        name = family.name + ending
        until(lambda name=name: prometheus.query(name), SCRAPED_S, f"{name} to be scraped")


def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus, engine: str) -> None:
    for name, expr in dashboard_queries().items():
        until(lambda expr=expr: prometheus.query(expr), SCRAPED_S, f"data for {name}: {expr}")


def test_a_service_that_is_gone_is_told(prometheus: Prometheus, release: Release) -> None:
    name = f"{release.full_name}-accounts"
    release.kubectl.run("scale", "deployment", name, "--replicas=0")
    try:
        prometheus.wait_for_alert("LatheServiceDown", ALERT_S)
    finally:
        release.kubectl.run("scale", "deployment", name, "--replicas=1")
    release.wait_ready()
    prometheus.wait_until_quiet("LatheServiceDown", ALERT_S)


def test_a_database_that_is_away_is_told_and_so_are_the_errors(
    prometheus: Prometheus, release: Release
) -> None:
    name = f"{release.full_name}-postgres"
    release.kubectl.run("scale", "statefulset", name, "--replicas=0")

    platform = release.platform()

    def errors() -> bool:
        # Calls that fail are what the alert counts.
        with suppress(LatheError), Client(platform.grpc, platform.api_key, timeout=3) as impatient:
            impatient.jobs.list()
        return "LatheErrors" in prometheus.firing()

    try:
        prometheus.wait_for_alert("LatheDependencyAway", ALERT_S)
        until(errors, ALERT_S, "LatheErrors to fire")
    finally:
        release.kubectl.run("scale", "statefulset", name, "--replicas=1")
    release.wait_ready()
    prometheus.wait_until_quiet("LatheDependencyAway", ALERT_S)


def test_engines_that_keep_ending_are_told(prometheus: Prometheus, release: Release, work: Work) -> None:
    job = work.begin()
    for _ in range(3):
        pod = release.wait_for_engine(START_S)
        release.kubectl.kill(pod["metadata"]["name"])
        until(
            lambda pod=pod: pod["metadata"]["name"] not in release.kubectl.names("pods"),
            ALERT_S,
            "the killed engine to go",
        )
    prometheus.wait_for_alert("LatheEnginesEnding", ALERT_S)
    work.finish(job)


def test_a_job_that_waits_long_is_told(prometheus: Prometheus, release: Release, work: Work) -> None:
    """No node may take another pod, so that the engine of a job of its own finds no place."""
    nodes = [node["metadata"]["name"] for node in release.kubectl.items("nodes")]
    for node in nodes:
        release.kubectl.run("cordon", node)
    job = work.client.jobs.create(work.base_model, work.dataset.name, n_epochs=1, dedicated=True)
    try:
        prometheus.wait_for_alert("LatheJobsWaiting", ALERT_S)
    finally:
        for node in nodes:
            release.kubectl.run("uncordon", node)
    wait_for_success(work.client, job, START_S)
