"""The same suite as everywhere else, from outside, through the gateway's Service."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cluster.harness.commands import ROOT
from tests.fixtures.platforms import Platform

pytestmark = pytest.mark.fast
LIMIT_S = 900.0


def test_the_e2e_suite_passes(platform: Platform) -> None:
    environment = {**os.environ, "LATHE_API_KEY": platform.api_key, "LATHE_HTTP": platform.http}
    command = [sys.executable, "-m", "pytest", "tests/e2e", f"--target={platform.grpc}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, "the e2e suite failed: see above"
