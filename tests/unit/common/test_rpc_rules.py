from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common import errors
from lathe.common.errors import FieldViolation, LatheError, RetryableError
from lathe.common.metrics import Metrics, markdown
from lathe.common.rpc.auth import Metadata, ServiceCredentials, decide_caller
from lathe.common.rpc.principal import (
    Caller,
    Principal,
    current_caller,
    decode_principal,
    require_project,
    require_role,
    reset_caller,
    set_caller,
)
from lathe.common.rpc.status import STATUS_CODES, from_rpc_error, status_code, to_rpc_status

CREDENTIALS = ServiceCredentials.from_tokens({"lathe": "service-token", "engine": "engine-token"})
SERVICE = ("authorization", "Bearer service-token")
ENGINE = ("authorization", "Bearer engine-token")
USER = Principal("acme", "member", "key_1")
AS_USER = ("lathe-principal", USER.encode())


def as_rpc_error(error: LatheError) -> grpc.RpcError:
    code, details, metadata = to_rpc_status(error)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)


@pytest.mark.parametrize("cls", sorted(STATUS_CODES, key=str))
def test_every_error_survives_the_wire(cls: type[LatheError]) -> None:
    sent = cls(
        "line 3: say what to do ü",
        reason="BAD_LINE",
        metadata={"line": "3"},
        violations=[FieldViolation("file.line", "is wrong")],
    )
    if isinstance(sent, RetryableError):
        sent.retry_after = 1.5
    received = from_rpc_error(as_rpc_error(sent))
    assert type(received) is cls
    assert (received.message, received.reason) == (sent.message, sent.reason)
    assert (received.metadata, received.violations) == (sent.metadata, sent.violations)
    if isinstance(received, RetryableError):
        assert received.retry_after == 1.5


def test_what_is_away_always_says_when_to_try_again() -> None:
    for error, wait in (
        (errors.Unavailable("away"), 1.0),
        (errors.Unavailable("away", retry_after=7), 7.0),
        (errors.ResourceExhausted("the quota is used up"), None),
    ):
        received = from_rpc_error(as_rpc_error(error))
        assert isinstance(received, RetryableError)
        assert received.retry_after == wait


def test_every_grpc_code_but_ok_and_unknown_has_one_class() -> None:
    assert set(STATUS_CODES.values()) == set(grpc.StatusCode) - {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}
    assert len(set(STATUS_CODES.values())) == len(STATUS_CODES)


def test_a_status_without_details_gives_the_class_of_its_code() -> None:
    plain = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "away"
    )
    assert isinstance(from_rpc_error(plain), errors.Unavailable)
    broken = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    strange = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), broken, None)
    assert isinstance(from_rpc_error(strange), errors.Internal)


def test_a_subclass_has_its_parents_code_and_long_messages_fit_into_metadata() -> None:
    class Stale(errors.Aborted):
        pass

    assert status_code(Stale("x")) is grpc.StatusCode.ABORTED
    many = [FieldViolation(f"lines[{n}]", "x" * 1000) for n in range(500)]
    _, _, metadata = to_rpc_status(errors.InvalidArgument("y" * 100_000, violations=many))
    assert len(metadata[0][1]) < 8000


@pytest.mark.parametrize(
    ("service", "metadata", "caller"),
    [
        ("lathe.v1.JobsService", [SERVICE, AS_USER], Caller("lathe", USER)),
        ("lathe.v1.JobsInternalService", [SERVICE], Caller("lathe")),
        ("lathe.v1.JobsInternalService", [SERVICE, AS_USER], Caller("lathe", USER)),
        ("lathe.v1.EngineService", [SERVICE], Caller("lathe")),
        ("lathe.v1.WorkerService", [SERVICE], Caller("lathe")),
        ("lathe.v1.WorkerService", [ENGINE], Caller("engine")),
    ],
)
def test_who_may_call(service: str, metadata: Metadata, caller: Caller) -> None:
    assert decide_caller(CREDENTIALS, service, metadata) == caller


@pytest.mark.parametrize(
    ("service", "metadata", "error"),
    [
        ("lathe.v1.JobsService", [], errors.Unauthenticated),
        ("lathe.v1.JobsService", [AS_USER], errors.Unauthenticated),
        ("lathe.v1.JobsService", [("authorization", "Bearer wrong"), AS_USER], errors.Unauthenticated),
        ("lathe.v1.JobsService", [("authorization", "Bearer "), AS_USER], errors.Unauthenticated),
        ("lathe.v1.JobsService", [("authorization", "Basic service-token")], errors.Unauthenticated),
        ("lathe.v1.JobsService", [SERVICE, SERVICE, AS_USER], errors.Unauthenticated),
        ("lathe.v1.JobsService", [SERVICE, AS_USER, AS_USER], errors.Unauthenticated),
        ("lathe.v1.JobsService", [SERVICE], errors.PermissionDenied),
        ("lathe.v1.JobsService", [SERVICE, ("lathe-principal", "{}")], errors.Unauthenticated),
        ("lathe.v1.JobsInternalService", [ENGINE], errors.PermissionDenied),
        ("lathe.v1.EngineService", [ENGINE], errors.PermissionDenied),
        ("lathe.v1.WorkerService", [ENGINE, AS_USER], errors.Unauthenticated),
        ("lathe.v1.EvilWorkerService", [ENGINE], errors.PermissionDenied),
    ],
)
def test_who_may_not_call(service: str, metadata: Metadata, error: type[LatheError]) -> None:
    with pytest.raises(error):
        decide_caller(CREDENTIALS, service, metadata)


def test_without_tokens_nobody_may_call() -> None:
    with pytest.raises(errors.Unauthenticated):
        decide_caller(ServiceCredentials({}), "lathe.v1.WorkerService", [SERVICE])


@pytest.mark.parametrize(
    "text", ["project=acme,role=member,key=key_1", "project=acme&role=member&key_id=key_1"]
)
def test_principals_in_both_spellings(text: str) -> None:
    assert decode_principal(text) == decode_principal(USER.encode()) == USER


@given(st.text())
def test_a_strange_principal_is_refused(text: str) -> None:
    with pytest.raises(errors.Unauthenticated):
        decode_principal(text)


@pytest.fixture
def user() -> Iterator[None]:
    token = set_caller(Caller("lathe", USER))
    yield
    reset_caller(token)


def test_a_user_sees_its_own_project_only(user: None) -> None:
    assert require_project("projects/acme/jobs/ftjob-1") == "acme"
    with pytest.raises(errors.NotFound):
        require_project("projects/other/jobs/ftjob-1")
    with pytest.raises(errors.InvalidArgument):
        require_project("jobs/ftjob-1")


def test_roles_are_ordered(user: None) -> None:
    require_role("viewer")
    require_role("member")
    with pytest.raises(errors.PermissionDenied, match="admin"):
        require_role("admin")


def test_a_service_for_itself_may_see_every_project() -> None:
    token = set_caller(Caller("lathe"))
    try:
        assert require_project("projects/other") == "other"
        require_role("admin")
    finally:
        reset_caller(token)
    with pytest.raises(errors.Unauthenticated):
        current_caller()


def test_metrics_have_units_in_their_names_and_a_page() -> None:
    metrics = Metrics(version="1.2.3")
    page = markdown(metrics)
    for metric in metrics.declared():
        family = next(iter(metric.describe()))
        assert family.documentation.endswith(".")
        assert f"`{family.name}" in page
        assert family.name.startswith(("lathe_", "grpc_server_"))
        assert family.type != "histogram" or family.name.endswith("_seconds")
