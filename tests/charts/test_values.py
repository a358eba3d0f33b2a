"""What every value does: one case each (or more), and no value without one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.charts.cases_engines import ENGINES
from tests.charts.cases_platform import PLATFORM
from tests.charts.chart import CHART, SERVICES, Rendered, render
from tests.charts.looks import Case, at

LOOKUP = re.compile(r'lookup "apps/v1" "Deployment" \.root\.Release\.Namespace \(include "lathe\.name" \.\)')

CASES: dict[str, Case] = {**PLATFORM, **ENGINES}


@pytest.mark.parametrize("name", CASES)
def test_a_value_does_what_it_says(name: str) -> None:
    values, look, expected = CASES[name]
    assert look(render(values)) == expected


def leaves(schema: Mapping[str, Any], defs: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The paths of all values that are no groups."""
    while "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[1]]
    if not schema.get("properties"):
        yield path
    for name, value in schema.get("properties", {}).items():
        yield from leaves(value, defs, f"{path}.{name}" if path else name)


def test_no_value_is_without_a_case() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    elsewhere = {
        # tests/charts/test_network.py, and what the certificates hold in test_secrets.py.
        *(
            path
            for path in leaves(schema, schema["$defs"])
            if path.startswith(("networkPolicy.", "imports.egress."))
        ),
        "tls.validityDays",
    }
    named = [name.split(":")[0] for name in CASES]
    missing = [
        path
        for path in leaves(schema, schema["$defs"])
        if path not in elsewhere and not any(path == name or path.startswith(name + ".") for name in named)
    ]
    assert not missing


def test_a_change_of_settings_replaces_the_pods_that_read_them() -> None:
    def sums(r: Rendered) -> dict[str, dict[str, str]]:
        return {name: r.pod(name)["metadata"]["annotations"] for name in SERVICES}

    before = sums(render())
    assert sums(render()) == before
    louder = sums(render(at("log.level", "DEBUG")))
    assert all(louder[name]["checksum/config"] != before[name]["checksum/config"] for name in SERVICES)
    bigger = sums(render(at("engines.cache.sizeLimit", "1Gi")))
    assert {name for name in SERVICES if bigger[name] != before[name]} == {"jobs"}
    one = sums(render(at("models.settings", {"LATHE_MODELS_SWEEP_INTERVAL_S": "5"})))
    assert {name for name in SERVICES if one[name] != before[name]} == {"models"}


@pytest.mark.parametrize(("live", "replicas"), [(1, 2), (3, 3), (0, 2)])
def test_an_upgrade_leaves_an_autoscaler_what_it_made_and_nothing_at_zero(
    live: int, replicas: int, tmp_path: Path
) -> None:
    # No autoscaler scales up from the zero to which a restore scales everything. `helm template` finds no Deployment,
    # so that a copy of the chart says what there is.
    chart = tmp_path / "lathe"
    shutil.copytree(CHART, chart)
    file = chart / "templates" / "_component.tpl"
    text, found = LOOKUP.subn(f'(dict "spec" (dict "replicas" {live}.0))', file.read_text())
    assert found == 1
    file.write_text(text)
    values = at("gateway.autoscaling", {"enabled": True, "minReplicas": 2, "maxReplicas": 4})
    assert render(values, chart=chart).one("Deployment", "gateway")["spec"]["replicas"] == replicas
    assert "replicas" not in render(values).one("Deployment", "gateway")["spec"]


def test_a_pod_has_the_time_that_its_end_takes() -> None:
    rendered = render(at("drain", {"delaySeconds": 20, "graceSeconds": 100, "streamGraceSeconds": 300}))
    for name in SERVICES:
        least = 320 if name == "gateway" else 120
        assert least < rendered.pod(name)["spec"]["terminationGracePeriodSeconds"] < least + 60, name
