"""What fails for no known reason is tried again, ever more rarely, and keeps nothing else waiting."""

from datetime import timedelta

import pytest

from lathe.common.background import Wakeup
from lathe.common.errors import Unavailable
from lathe.datasets.model import DatasetState, blob_key, index_key
from lathe.datasets.operations import Sample
from lathe.datasets.pauses import Pauses
from lathe.datasets.preparing import Preparing
from tests.fakes.clock import FakeClock
from tests.unit.datasets.conftest import jsonl, row

BAD = jsonl([row(f"Bad {n}") for n in range(12)])


class Broken:
    """Objects of which one cannot be read, and how often that was tried."""

    def __init__(self, objects, is_broken):
        self._objects, self._is_broken, self.tries = objects, is_broken, 0

    def __getattr__(self, name):
        return getattr(self._objects, name)

    def stream(self, key, **options):
        if self._is_broken(key):
            self.tries += 1
            raise OSError("No space left on device")
        return self._objects.stream(key, **options)


class Woken(Wakeup):
    times = 0

    def set(self):
        self.times += 1


async def for_ten_hours(world, step):
    """As the loops do it: every two seconds after a failure, else every ten."""
    end = world.clock.now() + timedelta(hours=10)
    while world.clock.now() < end:
        try:
            await step()
            world.clock.tick(10)
        except Unavailable:
            world.clock.tick(2)


def test_a_pause_doubles_up_to_ten_minutes_and_ends_with_success():
    clock, pauses = FakeClock(), Pauses()
    assert not pauses.waits("a", clock.now())
    taken = [pauses.begin("a", clock.now()).total_seconds() for _ in range(11)]
    assert taken == [2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600]
    assert pauses.waits("a", clock.now()) and not pauses.waits("b", clock.now())
    clock.tick(600)
    assert not pauses.waits("a", clock.now())
    pauses.forget("a")
    assert pauses.begin("a", clock.now()).total_seconds() == 2


async def test_validation_pauses_ever_longer_for_one_file_and_not_for_others(world, service):
    bad = await world.upload(BAD)
    objects = Broken(world.objects, lambda key: key.startswith(bad.staging_key))
    validation = world.validation(objects=objects)
    with pytest.raises(Unavailable, match="could not be validated"):
        await validation.step()
    good = await world.upload()
    await validation.step()
    assert (await service.get("acme", good.id)).state is DatasetState.READY
    await for_ten_hours(world, validation.step)
    assert 60 <= objects.tries <= 80
    objects._is_broken = lambda key: False
    world.clock.tick(600)
    await validation.step()
    assert (await service.get("acme", bad.id)).state is DatasetState.READY


async def test_indexing_pauses_ever_longer_for_one_file_and_not_for_others(world):
    bad, good = await world.ready(BAD), await world.ready()
    objects = Broken(world.objects, lambda key: key == blob_key(bad.sha256))
    service = world.preparation(objects=objects)
    woken = Woken()
    step = Preparing(world.store, objects, service.indexes, service.truncations, indexed=(woken,)).index_all
    await for_ten_hours(world, step)
    # What waits for the bad one asks for it again and again: it is not told to look before there is one index more.
    assert woken.times == 1
    assert 60 <= objects.tries <= 80
    assert await world.objects.head(index_key(good.sha256)) is not None


async def test_a_damaged_index_is_made_anew(world):
    parent = await world.ready()
    await world.prepare()
    await world.objects.put(index_key(parent.sha256), b"damaged")
    made = await world.preparation().prepare("acme", parent.id, Sample(1, 11), "")
    with pytest.raises(Unavailable, match="indexed"):
        await world.prepare()
    await world.prepare()
    await world.validate()
    made = await world.start().get("acme", made[0].dataset.id)
    assert (made.state, made.report.example_count) == (DatasetState.READY, 11)
