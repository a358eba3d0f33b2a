"""How lines are named on the command line, and how an operation is told."""

import pytest
from typer.testing import CliRunner

from lathe.cli import main
from lathe.cli.datasets_rows import parsed_lines, said
from lathe.client.rows import drop_operation, split_operation
from lathe.common.errors import InvalidArgument
from lathe.v1 import datasets_pb2 as pb


def test_lines_and_ranges() -> None:
    assert parsed_lines("3, 17,40-42,41") == [3, 17, 40, 41, 42]
    for wrong in ("", "a", "3-", "-3", "3,,4", "3-x"):
        with pytest.raises(InvalidArgument, match="3,17,40-52"):
            parsed_lines(wrong)
    with pytest.raises(InvalidArgument, match="more than 10000"):
        parsed_lines("1-999999999999")
    with pytest.raises(InvalidArgument, match="the range 9-7 ends before it begins"):
        parsed_lines("3, 9-7")


@pytest.mark.parametrize(
    ("given", "words"), [([], "Say what to drop"), (["--finding", "truncated"], "--finding needs --model")]
)
def test_what_to_drop_has_to_be_said(given: list[str], words: str) -> None:
    result = CliRunner().invoke(main.app, ["datasets", "drop", "file-1", *given])
    assert isinstance(result.exception, InvalidArgument)
    assert words in result.exception.message


def test_an_operation_reads_as_a_line() -> None:
    parents = [pb.DatasetParent(name="projects/p/datasets/file-1")]
    split = split_operation(fraction=0.5, seed=3, stratify_by="answer")
    made = pb.DatasetPreparation(parents=parents, operation=split, part="train")
    assert said(made) == "split of file-1 (train): seed 3, fraction 0.5, stratify_by answer"
    deduped = pb.DatasetOperation(dedupe=pb.DedupeRows())
    assert said(pb.DatasetPreparation(parents=parents, operation=deduped)) == "dedupe of file-1"
    dropped = drop_operation(range(1, 13), ["email"], "tiny", pb.AuditOptions(method="dpo", context_limit=9))
    assert said(pb.DatasetPreparation(parents=parents, operation=dropped)) == (
        "drop of file-1: lines 1+2+3+4+5+6+7+8+9+10+…, codes email, base_model baseModels/tiny, "
        'options method: "dpo" context_limit: 9'
    )
    empty = pb.DatasetOperation(drop=pb.DropRows(codes=["email"], options=pb.AuditOptions()))
    assert said(pb.DatasetPreparation(parents=parents, operation=empty)) == "drop of file-1: codes email"
    assert said(pb.DatasetPreparation()) == ""
