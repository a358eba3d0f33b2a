import threading

import pytest

from lathe.engine.apart import apart


async def test_the_thread_ends_with_its_work() -> None:
    thread = await apart(threading.current_thread)
    thread.join(10)
    assert not thread.is_alive()
    assert thread is not threading.main_thread()


async def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await apart(work)
