"""The files that commands take: a dataset's name, or a path, which is uploaded."""

from pathlib import Path

from lathe.cli.output import note
from lathe.client import Client
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2


def dataset_of(client: Client, given: str) -> str:
    """A dataset's name; a path is uploaded and validated first."""
    if not Path(given).is_file():
        return given
    dataset = upload_file(client, given)
    note(f"Uploaded {given} as {dataset.name.rsplit('/', 1)[-1]}.")
    return dataset.name


def upload_file(client: Client, given: str) -> datasets_pb2.Dataset:
    """Upload a file and wait until it is READY. Raises InvalidArgument naming the first finding."""
    dataset = client.datasets.wait(client.datasets.upload(given).name)
    if dataset.state == datasets_pb2.DATASET_STATE_ERROR:
        first = next(iter(dataset.report.findings), None)
        why = f": line {first.line}: {first.message}" if first is not None else ""
        raise InvalidArgument(f"{given} cannot be trained on{why} (lathe datasets show {dataset.name})")
    return dataset
