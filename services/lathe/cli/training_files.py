"""The files that commands take: a dataset's name, or a path, which is uploaded."""

from pathlib import Path

from lathe.cli.output import note
from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2

_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def dataset_of(client: Client, given: str) -> str:
    """A dataset's name; a path is uploaded and validated first. Raises InvalidArgument for a path to no file."""
    if not Path(given).is_file():
        _check_no_path(given)
        return given
    dataset = upload_file(client, given)
    note(f"Uploaded {given} as {_id(dataset)}.")
    return dataset.name


def _check_no_path(given: str) -> None:
    """Refuse what can only be meant as a path: no dataset has such a name."""
    path = Path(given)
    if path.is_dir():
        raise InvalidArgument(f"{given} is a folder; name one file of examples, or a dataset (file-…).")
    in_folder = "/" in given and not given.startswith("projects/")
    if in_folder or path.suffix.lower() in _ENDINGS:
        raise InvalidArgument(f"There is no file {given}; name one of examples, or a dataset (file-…).")


def upload_file(client: Client, given: str) -> datasets_pb2.Dataset:
    """Upload a file and wait until it is READY. Raises InvalidArgument naming the first finding."""
    dataset = client.datasets.wait(client.datasets.upload(given).name)
    if dataset.state == datasets_pb2.DATASET_STATE_ERROR:
        first = next(iter(dataset.report.findings), datasets_pb2.Finding())
        where = f"line {first.line}: " if first.line else ""
        why = f": {where}{first.message}" if first.message else ""
        raise InvalidArgument(f"{given} cannot be trained on{why} (lathe datasets show {_id(dataset)})")
    return dataset


def _id(dataset: datasets_pb2.Dataset) -> str:
    return dataset.name.rsplit("/", 1)[-1]
