from __future__ import annotations

import pytest

from lathe.common.errors import PermissionDenied, Unauthenticated, Unavailable
from lathe.common.rpc.principal import Caller, Principal, Role
from lathe.gateway.auth import Authenticator, MetadataAuthenticator, demand_role
from tests.fakes.clock import FakeClock
from tests.fakes.gateway import FakeKeys

ALICE = Principal("acme", "member", "key_1")


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys({"sk-alice": ALICE})


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def auth(keys: FakeKeys, clock: FakeClock) -> Authenticator:
    return Authenticator(keys, clock, cache_s=5, max_cached=3)


async def test_either_header_proves_the_key(auth: Authenticator) -> None:
    assert await auth.authenticate("Bearer sk-alice", None) == ALICE
    assert await auth.authenticate("bearer  sk-alice ", None) == ALICE
    assert await auth.authenticate(None, "sk-alice") == ALICE
    assert await auth.authenticate("Basic abc", "sk-alice") == ALICE


async def test_a_revoked_key_works_for_five_seconds_at_most(
    auth: Authenticator, keys: FakeKeys, clock: FakeClock
) -> None:
    await auth.authenticate("Bearer sk-alice", None)
    del keys.known["sk-alice"]
    clock.tick(4.9)
    assert await auth.authenticate("Bearer sk-alice", None) == ALICE
    assert keys.calls == 1
    clock.tick(0.1)
    with pytest.raises(Unauthenticated):
        await auth.authenticate("Bearer sk-alice", None)


async def test_a_wrong_key_is_remembered_too(auth: Authenticator, keys: FakeKeys, clock: FakeClock) -> None:
    for _ in range(3):
        with pytest.raises(Unauthenticated) as caught:
            await auth.authenticate("Bearer sk-no", None)
        assert caught.value.reason == "INVALID_API_KEY"
    assert keys.calls == 1
    keys.known["sk-no"] = ALICE
    clock.tick(5)
    assert await auth.authenticate("Bearer sk-no", None) == ALICE


async def test_accounts_away(auth: Authenticator, keys: FakeKeys, clock: FakeClock) -> None:
    await auth.authenticate("Bearer sk-alice", None)
    keys.outage = Unavailable("away")
    assert await auth.authenticate("Bearer sk-alice", None) == ALICE
    clock.tick(5)
    for secret in ("sk-alice", "sk-no"):
        with pytest.raises(Unavailable):
            await auth.authenticate(f"Bearer {secret}", None)
    keys.outage = None
    assert await auth.authenticate("Bearer sk-alice", None) == ALICE


async def test_the_cache_is_bounded(auth: Authenticator, keys: FakeKeys) -> None:
    for number in range(4):
        with pytest.raises(Unauthenticated):
            await auth.authenticate(None, f"sk-{number}")
    with pytest.raises(Unauthenticated):
        await auth.authenticate(None, "sk-0")
    assert keys.calls == 5


async def test_no_key(auth: Authenticator, keys: FakeKeys) -> None:
    for header in (None, "", "Bearer ", "Basic x"):
        with pytest.raises(Unauthenticated) as caught:
            await auth.authenticate(header, None)
        assert caught.value.reason == "MISSING_API_KEY"
    assert keys.calls == 0


async def test_metadata_gives_a_caller_without_service(auth: Authenticator) -> None:
    door = MetadataAuthenticator(auth)
    assert await door.authenticate("s", "m", [("api-key", "sk-alice")]) == Caller(None, ALICE)
    with pytest.raises(Unauthenticated):
        await door.authenticate("s", "m", [("authorization", "Bearer sk-alice"), ("authorization", "x")])


def test_roles() -> None:
    demand_role(ALICE, Role.MEMBER)
    with pytest.raises(PermissionDenied):
        demand_role(ALICE, Role.ADMIN)
