"""What accounts promises, on a real SQLite file."""

from datetime import timedelta

import pytest

from lathe.accounts.model import Project, Quota
from lathe.accounts.service import AccountsService
from lathe.accounts.store import SqlAccountStore
from lathe.common.db import Database, migrate
from lathe.common.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, Unauthenticated
from lathe.common.ids import RandomIds
from tests.fakes.clock import FakeClock

FIRST = "sk-lathe-" + "a" * 40


@pytest.fixture
async def accounts(tmp_path):
    db = Database(f"sqlite+aiosqlite:///{tmp_path}/accounts.sqlite")
    await migrate(db, "lathe.accounts")
    service = AccountsService(SqlAccountStore(db), FakeClock(), RandomIds())
    await service.bootstrap(FIRST)
    yield service
    await db.close()


async def test_the_bootstrap_key_is_an_admin_of_the_default_project(accounts):
    identity = await accounts.authenticate(FIRST)
    assert (identity.project, identity.role) == ("default", "admin")


async def test_a_later_bootstrap_key_is_ignored_and_a_revoked_one_stays_revoked(accounts):
    await accounts.bootstrap("sk-lathe-" + "b" * 40)
    with pytest.raises(Unauthenticated):
        await accounts.authenticate("sk-lathe-" + "b" * 40)
    identity = await accounts.authenticate(FIRST)
    await accounts.revoke_key("default", identity.key_id)
    await accounts.bootstrap(FIRST)
    with pytest.raises(Unauthenticated):
        await accounts.authenticate(FIRST)


async def test_a_guessable_bootstrap_key_is_refused(accounts):
    with pytest.raises(InvalidArgument, match="32 random characters"):
        await accounts.bootstrap("sk-lathe-short")


async def test_a_key_is_shown_once_and_known_by_its_hash(accounts):
    key, secret = await accounts.create_key("default", "ci", "member", "req-1")
    again, nothing = await accounts.create_key("default", "ci", "member", "req-1")
    assert (again, nothing) == (key, "")
    assert secret.startswith("sk-lathe-") and key.hint == secret[-4:]
    assert (await accounts.authenticate(secret)).role == "member"


async def test_unknown_and_revoked_keys_get_the_same_words(accounts):
    key, secret = await accounts.create_key("default", "ci", "viewer", "")
    await accounts.revoke_key("default", key.id)
    with pytest.raises(Unauthenticated) as revoked:
        await accounts.authenticate(secret)
    with pytest.raises(Unauthenticated) as unknown:
        await accounts.authenticate("sk-lathe-never")
    assert str(revoked.value) == str(unknown.value)


async def test_revoking_twice_keeps_the_first_time(accounts):
    key, _ = await accounts.create_key("default", "ci", "viewer", "")
    first = await accounts.revoke_key("default", key.id)
    await accounts.clock.advance(60)
    assert await accounts.revoke_key("default", key.id) == first
    with pytest.raises(NotFound):
        await accounts.revoke_key("other", key.id)


async def test_projects_are_created_once_and_listed_by_id(accounts):
    made = await accounts.create_project("team-b", "", Quota(max_running_jobs=2), "req")
    assert await accounts.create_project("team-b", "", Quota(), "req") == made
    with pytest.raises(AlreadyExists):
        await accounts.create_project("team-b", "", Quota(), "other")
    assert [p.id for p in await accounts.list_projects(after="", limit=10)] == ["default", "team-b"]
    assert [p.id for p in await accounts.list_projects(after="default", limit=10)] == ["team-b"]


@pytest.mark.parametrize("project_id", ["", "ab", "Team", "9lives", "a" * 33, "a_b", "trailing-"])
async def test_an_id_that_cannot_be_a_project_is_refused(accounts, project_id):
    with pytest.raises(InvalidArgument) as error:
        await accounts.create_project(project_id, "", Quota(), "")
    assert error.value.violations[0].field == "project_id"


async def test_an_update_changes_the_named_paths_and_minds_the_etag(accounts):
    project = await accounts.create_project("team-b", "Team B", Quota(1, 5), "")
    wanted = Project("team-b", "ignored", Quota(7, 9), project.create_time + timedelta(1))
    changed = await accounts.update_project(wanted, ["quota.max_running_jobs"], project.version)
    assert (changed.display_name, changed.quota) == ("Team B", Quota(7, 5))
    with pytest.raises(Aborted):
        await accounts.update_project(wanted, ["quota"], project.version)
    with pytest.raises(InvalidArgument, match="create_time"):
        await accounts.update_project(wanted, ["create_time"], None)
    with pytest.raises(InvalidArgument, match="max_queued_jobs"):
        await accounts.update_project(
            Project("team-b", "", Quota(0, -1), project.create_time), ["quota"], None
        )
