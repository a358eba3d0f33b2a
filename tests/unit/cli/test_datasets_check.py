"""`lathe datasets check`."""

import pytest
import typer

from lathe.cli.datasets import app
from lathe.cli.datasets_check import columns_of, is_same
from lathe.v1 import datasets_pb2 as pb

CSV = pb.Dataset(
    state=pb.DATASET_STATE_READY,
    sha256="b" * 64,
    source_sha256="a" * 64,
    import_options=pb.ImportOptions(file_type="csv", columns={"prompt": "q"}),
)
PLAIN = pb.Dataset(state=pb.DATASET_STATE_VALIDATING, sha256="a" * 64)


@pytest.mark.parametrize(
    ("dataset", "sha256", "file_type", "columns", "same"),
    [
        (CSV, "a", "", {"prompt": "q"}, True),
        (CSV, "a", "csv", {"prompt": "q"}, True),
        (CSV, "a", "json", {"prompt": "q"}, False),
        (CSV, "a", "", {"prompt": "other"}, False),
        (CSV, "a", "", {}, False),
        # What it was converted to is another file.
        (CSV, "b", "", {"prompt": "q"}, False),
        (PLAIN, "a", "", {}, True),
        (PLAIN, "a", "jsonl", {}, True),
        (PLAIN, "c", "", {}, False),
        (pb.Dataset(state=pb.DATASET_STATE_ERROR, sha256="a" * 64), "a", "", {}, False),
    ],
)
def test_a_file_is_uploaded_once(
    dataset: pb.Dataset, sha256: str, file_type: str, columns: dict[str, str], same: bool
) -> None:
    assert is_same(dataset, sha256 * 64, file_type, columns) is same


def test_columns_are_mapped_by_the_same_option_wherever_a_file_is_sent() -> None:
    commands = typer.main.get_command(app).commands
    for name in ("upload", "import", "check"):
        assert "--column" in {option for one in commands[name].params for option in one.opts}


def test_columns_are_pairs_each_key_once() -> None:
    assert columns_of(["prompt=q", "completion=a=b"], "--map") == {"prompt": "q", "completion": "a=b"}
    for wrong in (["prompt"], ["=q"], ["prompt="], ["prompt=q", "prompt=r"]):
        with pytest.raises(typer.BadParameter):
            columns_of(wrong, "--map")
