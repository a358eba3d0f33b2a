"""What the platform says of a field, in the words of the command line."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import typer

from lathe.cli import main
from lathe.cli.optionwords import in_options, option_names
from lathe.client.jobsettings import METHODS, messages_of, setting_paths
from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.datasets.model import ImportOptions, check_new, resolve_import
from lathe.datasets.operations import AuditChoice, Drop, Sample, Split, Truncate, check_operation
from lathe.datasets.protos import import_options
from lathe.jobs.requests import JobRequest, check_request
from lathe.text.filekinds import FileType
from lathe.v1 import datasets_pb2, jobs_pb2


def options_of_all_commands() -> set[str]:
    command = typer.main.get_command(main.app)
    found: set[str] = set()

    def collect(one: object) -> None:
        for parameter in getattr(one, "params", ()):
            found.update(parameter.opts)
        for child in getattr(one, "commands", {}).values():
            collect(child)

    collect(command)
    return found


def test_every_option_that_errors_name_is_there() -> None:
    named = {word.split()[0] for _, word in option_names() if word.startswith("--")}
    assert named <= options_of_all_commands()


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_called_as_it_is_given(method: str) -> None:
    for name, path in setting_paths(method).items():
        assert in_options(f"{path} is 0; it must be 1 to 50.") == f"{name} is 0; it must be 1 to 50."
    # The paths are those of the contract.
    chosen, options = messages_of(method, {})
    job = jobs_pb2.Job(method=chosen, training=options)
    for path in setting_paths(method).values():
        message: object = job
        for part in path.split(".")[1:]:
            message = getattr(message, part)


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (Sample(1, 0), "--count: must be 1 or more."),
        (Sample(2**63, 1), "--seed: must fit into 64 bits."),
        (Drop((0,)), "--lines: must be 1 to"),
        (Drop((), ("nosuch",), AuditChoice("baseModels/b")), "--finding: 'nosuch' is no code"),
        (Split(1, 0.5, stratify_by="a["), "--by: 'a[' is no path"),
        (Split(1), "split: give either fraction or count"),
        (Truncate(AuditChoice("baseModels/b"), policy="no"), "--policy: 'no' must be one of"),
    ],
)
def test_what_is_wrong_with_an_operation_names_its_option(operation: Split, words: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check_operation(operation)
    told = main.as_lathe_error(error.value)
    assert told is not None and told.message.startswith(words)


def test_an_operation_is_called_as_its_command() -> None:
    assert in_options("operation.dedupe: 4 rows would be left.") == "dedupe: 4 rows would be left."
    assert in_options("operation.drop.lines: none. operation.drop: 4") == "--lines: none. drop: 4"


@pytest.mark.parametrize(
    ("name", "purpose", "options", "words"),
    [
        ("a.csv", "train", None, "--purpose 'train' must be one of"),
        ("a\nb", "fine-tune", None, "The file's name must be 1 to 255 characters"),
        (
            "a.csv",
            "evals",
            ImportOptions(FileType.CSV),
            "--file-type (or --column) is for the purpose fine-tune",
        ),
        (
            "a.csv",
            "fine-tune",
            ImportOptions(FileType.CSV, {"text": "x" * 256}),
            "--column has at most 50 names",
        ),
    ],
)
def test_what_is_wrong_with_an_upload_names_its_option(
    name: str, purpose: str, options: ImportOptions | None, words: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        check_new(name, purpose, None, datetime(2026, 1, 1, tzinfo=UTC))
        resolve_import(name, purpose, options)
    told = main.as_lathe_error(error.value)
    assert told is not None and told.message.startswith(words)


def test_a_file_type_that_is_none_names_its_option() -> None:
    with pytest.raises(InvalidArgument) as error:
        import_options(datasets_pb2.Dataset(import_options={"file_type": "xls"}))
    told = main.as_lathe_error(error.value)
    assert told is not None and told.message.startswith("--file-type 'xls' must be one of")


def test_what_is_wrong_with_a_job_names_its_option() -> None:
    with pytest.raises(InvalidArgument) as error:
        check_request(JobRequest("p", "m", "file-1", suffix="b@d", seed=-1))
    told = main.as_lathe_error(error.value)
    assert told is not None
    assert told.message == (
        "--suffix must be 1 to 64 letters, digits, hyphens or underscores. "
        "--seed is -1; it must be 0 to 2147483647."
    )
    wrong = FieldViolation("job.training_dataset", "job.training_dataset: it has chat rows.")
    told = main.as_lathe_error(InvalidArgument(wrong.description, violations=[wrong]))
    assert told is not None and told.message == "--train: it has chat rows."
