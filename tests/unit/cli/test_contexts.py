"""What `lathe login` stores, and `lathe contexts` on it."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lathe.cli import main
from lathe.cli.contexts import Contexts, PlatformContext, contexts_file, read_contexts, write_contexts
from lathe.common.errors import InvalidArgument, NotFound

ONE = PlatformContext("one:7460", "sk-one", tls=True, ca_file="/ca.pem", http="https://one")
TWO = PlatformContext("two:7460", "sk-two")


def test_what_is_written_is_read_again_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "config.yaml"
    assert read_contexts(path) == Contexts()
    stored = Contexts().with_context("one", ONE).with_context("two", TWO)
    write_contexts(path, stored)
    assert read_contexts(path) == stored
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]


def test_a_file_that_others_could_read_is_closed_at_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    path.chmod(0o644)
    write_contexts(path, Contexts().with_context("one", ONE))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_last_one_stored_is_current_until_another_is_used_or_it_is_deleted() -> None:
    both = Contexts().with_context("one", ONE).with_context("two", TWO)
    assert both.current == "two"
    assert both.using("one").current == "one"
    assert both.using("local").current == ""
    assert both.without("two") == Contexts("", {"one": ONE})
    assert both.without("one").current == "two"
    assert both.at("one:7460") == ONE
    assert both.at("three:1") is None


def test_names_that_cannot_be_and_are_not_there_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="--name"):
        Contexts().with_context("local", ONE)
    with pytest.raises(InvalidArgument, match="--name"):
        Contexts().with_context("a b", ONE)
    with pytest.raises(NotFound, match="lathe login"):
        Contexts().using("one")


@pytest.mark.parametrize(
    "content", ["[", "- a", "contexts: {a: {address: b, api_key: c, colour: d}}", "contexts: {a: 1}"]
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"config\.yaml"):
        read_contexts(path)
    assert path.read_text() == content


def test_the_file_is_where_the_environment_says(tmp_path: Path) -> None:
    assert contexts_file({"LATHE_CONTEXTS_FILE": "/a/b"}) == Path("/a/b")
    assert contexts_file({"XDG_CONFIG_HOME": "/x"}) == Path("/x/lathe/config.yaml")
    assert contexts_file({}) == Path.home() / ".config" / "lathe" / "config.yaml"


def test_the_commands_list_use_show_and_delete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    monkeypatch.setenv("LATHE_CONTEXTS_FILE", str(path))
    monkeypatch.chdir(tmp_path)
    write_contexts(path, Contexts().with_context("one", ONE).with_context("two", TWO))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main.app, ["contexts", *arguments])
        assert result.exit_code == 0, result
        return result.stdout

    listed = json.loads(run("--json"))
    assert [(one["name"], one["current"]) for one in listed] == [
        ("local", False),
        ("one", False),
        ("two", True),
    ]
    run("use", "one")
    shown = run("show")
    assert "one:7460" in shown
    assert "sk-one" not in shown
    run("delete", "one")
    assert read_contexts(path) == Contexts("", {"two": TWO})
    assert json.loads(run("list", "--json"))[0]["current"] is True
