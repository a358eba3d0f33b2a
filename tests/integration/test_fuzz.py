"""What `make fuzz` does for a minute, for a moment: it keeps working, and its corpus is read."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.fixtures.platforms import environment

ROOT = Path(__file__).parents[2]

# Installed where there are wheels of it (pyproject.toml says where).
if find_spec("atheris") is not None:

    def test_bytes_that_a_fuzzer_makes_up_give_reports(tmp_path: Path) -> None:
        command = (sys.executable, "-m", "tests.fuzz.training_files")
        options = ("-runs=1000", "-seed=1", "-print_final_stats=1", f"-artifact_prefix={tmp_path}/")
        ended = subprocess.run(
            [*command, *options],
            env=environment({"PYTHONPATH": f"{ROOT / 'services'}:{ROOT}", "TMPDIR": str(tmp_path)}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert "stat::number_of_executed_units: 1000" in ended.stderr
