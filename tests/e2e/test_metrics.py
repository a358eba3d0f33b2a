"""/metrics of every process of a running platform, by promtool's rules and our own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from lathe.v1 import jobs_pb2
from tests.fixtures.platforms import Platform
from tests.fixtures.until import wait_until

pytestmark = pytest.mark.own_platform

OURS = re.compile(r"(lathe|grpc_server)_[a-z0-9_]+")
# Prometheus's base units, and what the last word of a name may be otherwise.
UNITS = ("seconds", "bytes", "ratio", "info")
COUNTED = {"lathe_jobs", "lathe_engines", "lathe_datasets", "lathe_audits", "lathe_engine_adapters_loaded"}
# 1 or 0, as Prometheus' own `up` is.
TRUE_OR_FALSE = "_up"
WRONG_UNITS = ("milliseconds", "ms", "minutes", "kilobytes", "mb", "mib", "percent")


@pytest.fixture(scope="module")
def texts(platform: Platform, tuned: jobs_pb2.Job) -> dict[str, str]:
    """What each process shows after a job. Gauges follow the database at the next look of jobs' reconciler."""
    return wait_until(
        lambda: {name: httpx.get(url).raise_for_status().text for name, url in platform.metrics.items()},
        lambda texts: values(texts)["lathe_jobs", ("state", "succeeded")] >= 1,
    )


def families(texts: dict[str, str]) -> Iterator[Metric]:
    for text in texts.values():
        yield from text_string_to_metric_families(text)


def test_names_types_and_help(texts: dict[str, str]) -> None:
    for family in families(texts):
        if family.name.startswith(("process_", "python_")):
            continue
        assert OURS.fullmatch(family.name), family.name
        assert family.documentation, family.name
        assert not family.name.endswith(WRONG_UNITS)
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
        elif family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
            assert {sample.name.rpartition("_")[2] for sample in family.samples} <= {"bucket", "sum", "count"}
        else:
            assert family.type == "gauge", family
            assert family.name in COUNTED or family.name.endswith((*UNITS, TRUE_OR_FALSE)), family.name


def values(texts: dict[str, str]) -> dict[tuple[object, ...], float]:
    """By name and labels, 0 for what is not there. Every process declares every metric: the one whose it is has
    counted."""
    found: dict[tuple[object, ...], float] = defaultdict(float)
    for family in families(texts):
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            found[key] = max(sample.value, found[key])
    return found


def test_a_job_has_left_its_numbers(texts: dict[str, str]) -> None:
    found = values(texts)
    assert found["lathe_jobs", ("state", "succeeded")] >= 1
    assert found["lathe_engines", ("state", "ready")] >= 1
    assert found["lathe_job_queue_wait_seconds_count",] >= 1
    assert found["lathe_upload_bytes_total",] > 0
    created = {
        value
        for (name, *labels), value in found.items()
        if name == "grpc_server_handled_total"
        and {("grpc_method", "CreateJob"), ("grpc_code", "OK")} <= set(labels)
    }
    assert max(created) >= 1


def test_promtool_has_nothing_to_say(texts: dict[str, str]) -> None:
    promtool = shutil.which("promtool")
    for text in texts.values() if promtool else ():
        checked = subprocess.run(
            [str(promtool), "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
