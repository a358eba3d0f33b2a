from __future__ import annotations

import pytest

from lathe.common import errors
from lathe.common.errors import FieldViolation, InvalidArgument, LatheError, NotFound, Unavailable
from lathe.gateway.http.errors import door_words, error_answer, invalid, unsupported
from lathe.text.errors import RowError


@pytest.mark.parametrize(
    ("error", "status", "type_", "code"),
    [
        (errors.InvalidArgument("x"), 400, "invalid_request_error", "invalid_value"),
        (errors.FailedPrecondition("x"), 400, "invalid_request_error", "invalid_state"),
        (errors.Aborted("x"), 400, "invalid_request_error", "conflict"),
        (errors.AlreadyExists("x"), 400, "invalid_request_error", "already_exists"),
        (errors.OutOfRange("x"), 400, "invalid_request_error", "invalid_value"),
        (errors.Unimplemented("x"), 400, "invalid_request_error", "unsupported_parameter"),
        (
            errors.Unauthenticated("x", reason="MISSING_API_KEY"),
            401,
            "invalid_request_error",
            "invalid_api_key",
        ),
        (errors.PermissionDenied("x"), 403, "permission_error", "insufficient_permissions"),
        (errors.NotFound("x", reason="MODEL_NOT_FOUND"), 404, "invalid_request_error", "model_not_found"),
        (errors.ResourceExhausted("x"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.Unavailable("x"), 503, "server_error", "service_unavailable"),
        (errors.DeadlineExceeded("x"), 504, "server_error", "timeout"),
        (errors.Cancelled("x"), 503, "server_error", "service_unavailable"),
        (errors.DataLoss("x", reason="DIGEST"), 500, "server_error", "server_error"),
        (errors.Internal("x"), 500, "server_error", "server_error"),
        (errors.Internal("x", reason="MODEL_NOT_FINITE"), 500, "server_error", "model_not_finite"),
        (LatheError("x"), 500, "server_error", "server_error"),
        (
            RowError("messages[0].role", "unrecognized_role", "x"),
            400,
            "invalid_request_error",
            "unrecognized_role",
        ),
    ],
)
def test_the_table(error: LatheError, status: int, type_: str, code: str) -> None:
    answer = error_answer(error)
    body = answer.body["error"]
    assert (answer.status, body["type"], body["code"]) == (status, type_, code)
    assert status != 409 and ("retry-after" in answer.headers) == (status in (429, 503))


def test_a_fault_is_described_only_where_somebody_is_to_read_it() -> None:
    def told(error: LatheError) -> str:
        return str(error_answer(error).body["error"]["message"])

    overflow = errors.Internal("its weights", reason="MODEL_NOT_FINITE")
    assert told(overflow) == "its weights"
    assert error_answer(overflow).headers == {"x-should-retry": "false"}
    for hidden in (errors.Internal("its weights"), errors.DataLoss("its weights", reason="DIGEST")):
        assert "its weights" not in told(hidden)
        assert not error_answer(hidden).headers


def test_every_class_is_in_the_table() -> None:
    from lathe.gateway.http.errors import KINDS

    leaves = set(LatheError.__subclasses__()) | set(errors.RetryableError.__subclasses__())
    assert leaves - {errors.RetryableError} <= set(KINDS)


def test_waits_are_whole_seconds() -> None:
    assert error_answer(Unavailable("x", retry_after=2.1)).headers["retry-after"] == "3"
    assert error_answer(Unavailable("x", retry_after=0.01)).headers["retry-after"] == "1"


def test_faults_and_resource_names_are_not_shown() -> None:
    assert "secret" not in error_answer(errors.Internal("secret path")).body["error"]["message"]
    shown = error_answer(NotFound("projects/acme/jobs/ftjob-1 was not found.")).body["error"]["message"]
    assert shown == "ftjob-1 was not found."


def test_fields_get_the_names_that_clients_used() -> None:
    path = "job.method.supervised.hyperparameters.n_epochs"
    error = InvalidArgument(
        f"{path} is 0; job.model is empty.", violations=[FieldViolation(path, f"{path} is 0.")]
    )
    renames = (("job.method.supervised.hyperparameters", "hyperparameters"), ("job.model", "model"))
    with pytest.raises(InvalidArgument) as caught, door_words(renames):
        raise error
    assert str(caught.value) == "hyperparameters.n_epochs is 0; model is empty."
    assert caught.value.violations == (
        FieldViolation("hyperparameters.n_epochs", "hyperparameters.n_epochs is 0."),
    )
    with pytest.raises(RowError) as row, door_words((("messages", "input"),)):
        raise RowError("messages[1].role", "unrecognized_role", "no such role")
    assert row.value.violations[0].field == "input[1].role" and row.value.code == "unrecognized_role"


def test_refusals_name_their_field() -> None:
    assert error_answer(invalid("limit", "no")).body["error"]["param"] == "limit"
    assert error_answer(unsupported("functions", "no")).status == 400
