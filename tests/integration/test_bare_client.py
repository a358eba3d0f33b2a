"""Another company's process: only grpcio, protobuf, googleapis-common-protos and the stubs, calling a platform."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.fixtures.platforms import ROOT, embedded

# Refuses every import but the standard library's, the three packages', and Lathe's client and contracts.
GUARD = """
import sys

class Guard:
    allowed = {"grpc", "google", "lathe", "typing_extensions"}

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        ours = name == "lathe" or name.startswith(("lathe.v1", "lathe.client", "lathe.common"))
        if (top == "lathe" and not ours) or (top not in self.allowed and top not in sys.stdlib_module_names):
            raise ImportError(f"{name} is not part of a bare environment")
        return None

sys.meta_path.insert(0, Guard())
"""

SCRIPT = """
import json
from lathe.client import Client
from lathe.common.errors import NotFound, Unauthenticated

address, key, file = sys.argv[1:]
rows = open(file, "rb").read()
with Client(address, key) as client:
    said = {"project": client.project, "models": [model.name for model in client.models.list()]}
    dataset = client.datasets.wait(client.datasets.upload(file).name)
    said["examples"] = dataset.report.example_count
    said["same"] = b"".join(client.datasets.download(dataset.name)) == rows
    said["listed"] = [one.name for one in client.datasets.list()] == [dataset.name]
    secret = client.keys.create("bare", "viewer")[1]
    with Client(address, secret) as viewer:
        said["role"] = viewer.caller().role
    try:
        client.jobs.create("none", dataset.name)
    except NotFound as error:
        said["violation"] = error.violations[0].field
    client.datasets.delete(dataset.name)
    said["left"] = [one.name for one in client.datasets.list()]
try:
    Client(address, "sk-lathe-wrong").caller()
except Unauthenticated as error:
    said["wrong key"] = error.reason
heavy = {"torch", "sqlalchemy", "pydantic", "fastapi", "transformers", "numpy"} & set(sys.modules)
print(json.dumps({**said, "heavy": sorted(heavy)}))
"""


def test_a_bare_environment_calls_a_running_platform(tmp_path: Path) -> None:
    line = json.dumps(
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hello to you."},
            ]
        }
    )
    (tmp_path / "train.jsonl").write_text("".join(f"{line}\n" for _ in range(12)))
    with embedded(tmp_path) as platform:
        done = subprocess.run(
            [
                *(sys.executable, "-c", GUARD + SCRIPT),
                *(platform.grpc, platform.api_key, str(tmp_path / "train.jsonl")),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT / "services")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == {
        "project": "projects/default",
        "models": [],
        "examples": 12,
        "same": True,
        "listed": True,
        "role": 1,
        "violation": "job.model",
        "left": [],
        "wrong key": said["wrong key"],
        "heavy": [],
    }
