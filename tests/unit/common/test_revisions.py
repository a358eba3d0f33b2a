"""What a service compares its database with: the numbers of its migrations, known without Alembic."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from lathe.common.db import revisions

SERVICES = ("accounts", "datasets", "gateway", "jobs", "models")


@pytest.mark.parametrize("service", SERVICES)
def test_files_begin_with_their_revision_and_follow_each_other(service: str) -> None:
    config = Config()
    config.set_main_option("script_location", f"lathe.{service}:migrations")
    scripts = ScriptDirectory.from_config(config)
    newest_first = [script.revision for script in scripts.walk_revisions()]
    assert revisions(f"lathe.{service}") == newest_first[::-1]
    assert scripts.get_heads() == newest_first[:1]


def test_a_service_starts_without_alembic() -> None:
    mains = ", ".join(f"lathe.{service}.main" for service in SERVICES)
    script = f"import sys, {mains}\nprint('alembic' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stdout
