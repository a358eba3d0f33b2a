"""Errors whose fields are called as a door calls them."""

from __future__ import annotations

from lathe.common.errors import FieldViolation, InvalidArgument, RetryableError, Unavailable
from lathe.common.fieldwords import renamed, renamed_text

NAMES = (("job.training_dataset", "--train"), ("job.training", "training"), ("job.seed", "--seed"))


def test_a_field_is_renamed_wherever_it_is_named_and_nothing_else_is() -> None:
    text = "job.training_dataset: no file. job.training.schedule, job.seeds and my.job.seed stay; job.seed is -1."
    assert renamed_text(text, NAMES) == (
        "--train: no file. training.schedule, job.seeds and my.job.seed stay; --seed is -1."
    )


def test_an_error_keeps_its_kind_and_what_programs_read() -> None:
    wrong = [FieldViolation("job.seed", "job.seed is -1."), FieldViolation("job.training.schedule", "no")]
    error = InvalidArgument("job.seed is -1.", reason="OWN", metadata={"a": "b"}, violations=wrong)
    told = renamed(error, NAMES)
    assert isinstance(told, InvalidArgument)
    assert (told.message, told.reason, told.metadata) == ("--seed is -1.", "OWN", {"a": "b"})
    assert [violation.field for violation in told.violations] == ["--seed", "training.schedule"]
    assert told.violations[0].description == "--seed is -1."
    assert error.message == "job.seed is -1."
    later = renamed(Unavailable("job.seed", retry_after=2), NAMES)
    assert isinstance(later, RetryableError) and later.retry_after == 2
