"""When the silence of an engine means something."""

import pytest

from lathe.common.errors import Unavailable
from lathe.jobs.contact import Contact
from tests.fakes.clock import FakeClock

TERM_S = 15.0


async def contact_of_a_term(clock: FakeClock) -> Contact:
    contact = Contact(clock, TERM_S)
    for _ in range(16):
        contact.seen()
        await clock.advance(1)
    return contact


async def test_silence_counts_after_a_whole_term() -> None:
    clock = FakeClock()
    contact = Contact(clock, TERM_S)
    assert not contact.trusted()
    contact = await contact_of_a_term(clock)
    assert contact.trusted()


async def test_a_process_that_stood_still_trusts_nothing_before_it_looked_again() -> None:
    clock = FakeClock()
    contact = await contact_of_a_term(clock)
    await clock.advance(20)
    # Stopped between its look at the database and its decision.
    assert not contact.trusted()
    contact.seen()
    assert not contact.trusted()


async def test_an_outage_starts_the_term_anew() -> None:
    contact = await contact_of_a_term(FakeClock())
    with pytest.raises(Unavailable):
        async with contact.watched():
            raise Unavailable("away")
    assert not contact.trusted()
