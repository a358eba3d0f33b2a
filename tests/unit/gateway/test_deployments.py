from __future__ import annotations

import pytest

from lathe.common.errors import (
    Aborted,
    AlreadyExists,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from lathe.common.rpc.principal import Principal
from lathe.gateway.model import BaseModelRef, ServedModel
from lathe.gateway.service import DeploymentService
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeDeployments, FakeModels

ALICE = Principal("acme", "member", "key_1")
TUNED = "ft:tiny:acme::1"
NAME = "projects/acme/deployments/support"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def service(clock: FakeClock) -> DeploymentService:
    model = ServedModel(BaseModelRef("baseModels/tiny", "d1", 100))
    return DeploymentService(
        FakeDeployments(), FakeModels({("", "tiny"): model, ("acme", TUNED): model}), clock
    )


async def test_create_get_and_repeat(service: DeploymentService) -> None:
    made = await service.create(ALICE, "support", TUNED, "req-1")
    assert made.name == NAME and made.model_id == TUNED
    assert await service.create(ALICE, "support", TUNED, "req-1") == made
    assert await service.get(ALICE, NAME) == made
    with pytest.raises(AlreadyExists):
        await service.create(ALICE, "support", TUNED, "req-2")


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "x" * 64, ".hidden", "tiny"])
async def test_ids_that_cannot_be(service: DeploymentService, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await service.create(ALICE, name, TUNED)
    assert caught.value.violations[0].field == "deployment_id"


async def test_the_model_must_exist(service: DeploymentService) -> None:
    with pytest.raises(NotFound):
        await service.create(ALICE, "support", "ft:tiny:other::1")
    with pytest.raises(InvalidArgument):
        await service.create(ALICE, "support", "")


async def test_update_with_etag_and_mask(service: DeploymentService, clock: FakeClock) -> None:
    made = await service.create(ALICE, "support", TUNED)
    clock.tick(60)
    changed = await service.update(ALICE, NAME, "tiny", ("model_id",), etag=made.etag)
    assert changed.model_id == "tiny" and changed.etag != made.etag
    assert changed.update_time > changed.create_time
    with pytest.raises(Aborted):
        await service.update(ALICE, NAME, TUNED, ("model_id",), etag=made.etag)
    with pytest.raises(InvalidArgument):
        await service.update(ALICE, NAME, TUNED, ("name",))


async def test_delete(service: DeploymentService) -> None:
    made = await service.create(ALICE, "support", TUNED)
    with pytest.raises(Aborted):
        await service.delete(ALICE, NAME, "stale")
    await service.delete(ALICE, NAME, made.etag)
    with pytest.raises(NotFound):
        await service.delete(ALICE, NAME)


async def test_pages(service: DeploymentService) -> None:
    for letter in "cab":
        await service.create(ALICE, letter, TUNED)
    first, token = await service.list(ALICE, "projects/acme", 2)
    rest, end = await service.list(ALICE, "projects/acme", 2, token)
    assert [row.name[-1] for row in (*first, *rest)] == ["a", "b", "c"] and end == ""


async def test_other_projects_are_not_there(service: DeploymentService) -> None:
    await service.create(ALICE, "support", TUNED)
    eve = Principal("other", "admin", "k")
    for call in (
        service.get(eve, NAME),
        service.update(eve, NAME, "tiny"),
        service.delete(eve, NAME),
        service.list(eve, "projects/acme"),
    ):
        with pytest.raises(NotFound):
            await call
    with pytest.raises(PermissionDenied):
        await service.create(Principal("acme", "viewer", "k"), "b", TUNED)
