"""Files that change while a process runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lathe.common.errors import FailedPrecondition
from lathe.common.follow import Followed
from lathe.common.rpc.auth import ServiceCredentials
from lathe.common.rpc.tokens import ACCEPT_OLD_S, SHOW_OLD_S, TokenFile, Tokens, accepted, replaced, shown
from tests.fakes.clock import FakeClock


def read(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    if not text.endswith("."):
        raise FailedPrecondition(f"The file {path} is not whole.")
    return text


def test_a_change_is_seen_within_a_second(tmp_path: Path) -> None:
    path, clock = tmp_path / "file", FakeClock()
    path.write_text("first.")
    followed = Followed((path,), lambda: read(path), clock)
    path.write_text("second.")
    assert followed.current() == "first."
    clock.tick(1)
    assert followed.current() == "second."


def test_what_is_half_written_is_named_once_and_the_old_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "file", FakeClock()
    path.write_text("first.")
    followed = Followed((path,), lambda: read(path), clock)
    path.write_text("sec")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.tick(1)
            assert followed.current() == "first."
        path.unlink()
        clock.tick(1)
        assert followed.current() == "first."
    assert [record.message.count(str(path)) for record in caplog.records] == [1]
    path.write_text("second.")
    clock.tick(1)
    assert followed.current() == "second."


def test_what_changes_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path, clock = tmp_path / "file", FakeClock()
    path.write_text("first.")
    writes = ["third!!."]

    def slow_read() -> str:
        text = read(path)
        if text == "second." and writes:
            path.write_text(writes.pop())
        return text

    followed = Followed((path,), slow_read, clock)
    path.write_text("second.")
    clock.tick(1)
    assert followed.current() == "first."
    clock.tick(1)
    assert followed.current() == "third!!."


def test_at_the_start_a_wrong_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="not whole"):
        Followed((tmp_path / "missing",), lambda: read(tmp_path / "missing"))
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        TokenFile(tmp_path / "missing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(FailedPrecondition, match="empty"):
        TokenFile(tmp_path / "empty")


def test_a_replaced_token_is_shown_and_accepted_for_a_while() -> None:
    tokens = replaced(Tokens(("old",)), ("new",), 100.0)
    assert [shown(tokens, 100.0 + s) for s in (0, SHOW_OLD_S - 1, SHOW_OLD_S)] == ["old", "old", "new"]
    assert accepted(tokens, 100.0 + ACCEPT_OLD_S - 1) == ("new", "old")
    assert accepted(tokens, 100.0 + ACCEPT_OLD_S) == ("new",)
    assert replaced(tokens, ("new",), 150.0) == tokens
    again = replaced(tokens, ("newest",), 200.0)
    assert set(accepted(again, 201.0)) == {"newest", "new", "old"}
    assert accepted(replaced(tokens, ("newest",), 1000.0), 1001.0) == ("newest", "new")


@pytest.mark.parametrize("late", ["caller", "server"])
def test_no_call_is_refused_while_processes_see_a_new_token_at_different_times(late: str) -> None:
    # kubelet brings a changed Secret to each pod within a minute and a half.
    seen = {"caller": 0.0, "server": 0.0, late: 90.0}

    def at(who: str, time: float) -> Tokens:
        old = Tokens(("old",))
        return replaced(old, ("new",), seen[who]) if time >= seen[who] else old

    for time in range(600):
        assert shown(at("caller", time), time) in accepted(at("server", time), time)


def test_a_second_change_shows_no_token_that_others_may_never_have_seen() -> None:
    """Replaced twice within a minute, or read half-written: a server may see the first and the last alone."""
    caller = replaced(replaced(Tokens(("old",)), ("between",), 100.0), ("new",), 130.0)
    late = replaced(Tokens(("old",)), ("new",), 190.0)
    for time in range(130, 700):
        assert shown(caller, time) in accepted(late if time >= 190 else Tokens(("old",)), time)
    # One that was shown for long enough is known to everybody.
    assert shown(replaced(replaced(Tokens(("old",)), ("known",), 0.0), ("new",), 200.0), 201.0) == "known"


def test_a_file_may_hold_several_tokens(tmp_path: Path) -> None:
    path, clock = tmp_path / "token", FakeClock()
    path.write_text("new\nold\n")
    tokens = TokenFile(path, clock)
    assert (tokens.shown(), tokens.accepted()) == ("new", ("new", "old"))
    path.write_text("newer\n")
    clock.tick(1)
    assert (tokens.shown(), tokens.accepted()) == ("new", ("newer", "new", "old"))
    clock.tick(ACCEPT_OLD_S)
    assert (tokens.shown(), tokens.accepted()) == ("newer", ("newer",))


def test_credentials_follow_their_files(tmp_path: Path) -> None:
    clock = FakeClock()
    path = tmp_path / "token"
    path.write_text("old")
    credentials = ServiceCredentials({"lathe": TokenFile(path, clock).accepted})
    path.write_text("new-one")
    assert credentials.identify("new-one") is None
    clock.tick(1)
    assert credentials.identify("new-one") == credentials.identify("old") == "lathe"
    clock.tick(ACCEPT_OLD_S)
    assert credentials.identify("old") is None
