"""How many processes an audit has, and what threads do with the work."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lathe.datasets.workers import Threads, Work, usual_count


@pytest.mark.parametrize(
    ("limit", "count"),
    [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("", 4)],
)
def test_there_is_one_process_a_core_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert usual_count(tmp_path) == 4
    (tmp_path / "cpu.max").write_text(limit)
    assert usual_count(tmp_path) == count
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    assert usual_count(tmp_path) == 1


async def test_threads_give_the_results_in_order() -> None:
    async def works():
        for number in range(3):
            yield Work(partial(str, number), f"number {number}")

    assert [result async for result in Threads().results(works())] == ["0", "1", "2"]
    with pytest.raises(ZeroDivisionError):
        await Threads().result(Work(partial(divmod, 1, 0), "a division"))
