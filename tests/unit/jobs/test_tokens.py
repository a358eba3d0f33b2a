"""What datasets is told that unfinished jobs need."""

from dataclasses import replace

import pytest

from lathe.common.errors import Unavailable
from lathe.jobs import transitions
from lathe.jobs.model import Outcome, TokenObject
from lathe.jobs.tokens import TokenKeeper, needed
from lathe.jobs.transitions import Trigger
from tests.fakes.jobs import World


def tokens(letter: str) -> TokenObject:
    return TokenObject(f"blobs/{letter * 64}", letter * 64)


async def test_the_tokens_of_a_job_are_kept_until_it_has_ended_also_while_it_is_paused(world: World) -> None:
    audits, keeper = world.datasets.audits, TokenKeeper(world.store, world.datasets)

    async def kept() -> list[str]:
        await keeper.step()
        return [digest[0] for digest in world.datasets.kept_tokens[-1]]

    # Nothing is needed: that is a word, too.
    assert await kept() == []
    for number, letter in enumerate("cde", 1):
        world.datasets.add(f"file-{number}")
        audits[f"file-{number}"] = replace(audits[f"file-{number}"], tokens=tokens(letter))
    await world.create()
    assert await kept() == []
    await world.steps.run_once()
    assert await kept() == ["c"]
    paused = await world.queued(training="file-2", validation="file-3")
    async with world.store.write() as session:
        await session.save(paused, replace(paused, state=transitions.apply(paused.state, Trigger.PAUSE)))
    assert await kept() == ["c", "d", "e"]
    await world.register()
    lease = await world.workers.lease("eng-a")
    assert lease is not None
    assert await kept() == ["c", "d", "e"]
    await world.complete(lease, Outcome.SUCCEEDED)
    await world.steps.run_once()
    assert await kept() == ["d", "e"]
    await world.service.cancel("acme", paused.id)
    assert await kept() == []


async def test_it_says_nothing_while_it_does_not_know(world: World) -> None:
    world.datasets.down = Unavailable("datasets is away")
    with pytest.raises(Unavailable):
        await TokenKeeper(world.store, world.datasets).step()
    assert world.datasets.kept_tokens == []


async def test_equal_tokens_are_named_once(world: World) -> None:
    jobs = [await world.queued() for _ in range(2)]
    assert needed(jobs) == {"b" * 64}
