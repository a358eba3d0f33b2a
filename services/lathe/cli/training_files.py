"""The files that commands take: a dataset's name, or a path, which is uploaded."""

from pathlib import Path
from typing import Any

from lathe.cli.output import note
from lathe.client import Client
from lathe.client.names import last_id
from lathe.common.errors import InvalidArgument, NotFound
from lathe.v1 import datasets_pb2

_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# Stands for a file that has yet to be uploaded; no dataset has this name.
NOT_UPLOADED = "file-not-uploaded-yet"


def dataset_of(client: Client, given: str) -> str:
    """A dataset's name; a path is uploaded and validated first. Raises InvalidArgument for a path to no file."""
    if not Path(given).is_file():
        _check_no_path(given)
        return given
    dataset = upload_file(client, given)
    note(f"Uploaded {given} as {last_id(dataset.name)}.")
    return dataset.name


def job_files(client: Client, model: str, train: str, validation: str = "", **asked: Any) -> tuple[str, str]:
    """The names of a job's datasets, `` for no validation; paths are uploaded.

    Before that all else is looked at: what is wrong with it would be wrong after a long upload as well. asked: the
    other arguments of `client.jobs.estimate`. Raises InvalidArgument for a path to no file, and what `estimate` raises.
    """
    names = [_not_yet(given) for given in (train, validation)]
    if NOT_UPLOADED in names:
        for name in names:
            if name not in ("", NOT_UPLOADED):
                client.datasets.get(name)
        check_job(client, model, *names, **asked)
    return dataset_of(client, train), dataset_of(client, validation) if validation else ""


def check_job(
    client: Client, model: str, train: str = NOT_UPLOADED, validation: str = "", **asked: Any
) -> None:
    """Raise what is wrong with a job before its files are there. The platform looks for a job's files last: where it
    misses one that is NOT_UPLOADED, all else is right."""
    files = {"job.training_dataset": train, "job.validation_dataset": validation}
    try:
        client.jobs.estimate(model, train, validation_dataset=validation, timeout=0, **asked)
    except NotFound as error:
        if not any(files.get(violation.field) == NOT_UPLOADED for violation in error.violations):
            raise


def _not_yet(given: str) -> str:
    if Path(given).is_file():
        return NOT_UPLOADED
    if given:
        _check_no_path(given)
    return given


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
        raise InvalidArgument(
            f"{given} cannot be trained on{why} (lathe datasets show {last_id(dataset.name)})"
        )
    return dataset
