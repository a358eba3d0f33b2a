"""Arms, scorers and the maths of `lathe compare`, on a client that answers from a table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.client.arms import ArmInputs, Example, make_arms, read_examples
from lathe.client.compare import ArmResult, Measure, json_match, request_digest, text_match, wilson
from lathe.common.errors import InvalidArgument
from lathe.v1 import inference_pb2 as pb

SYSTEM = {"role": "system", "content": "Make a ticket."}


def example(question: str, answer: str) -> Example:
    return Example((SYSTEM, {"role": "user", "content": question}), answer)


class AnsweringClient:
    """Answers with the last message in upper case; notes what was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Mapping[str, Any]]]] = []

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> pb.ChatCompletion:
        self.asked.append((model, list(messages)))
        text = messages[-1]["content"].upper()
        choice = pb.ChatChoice(message=pb.ChatMessage(role="assistant", content=text))
        return pb.ChatCompletion(choices=[choice], usage=pb.Usage(prompt_tokens=10, completion_tokens=2))


# --- scorers ---


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"a": 1, "b": null}', True),
        ('{"b":null,"a":1}', True),
        ('{"a": 1}', False),
        ('{"a": true, "b": null}', False),
        ('{"a": "1", "b": null}', False),
        ("no JSON", False),
        ("", False),
    ],
)
def test_json_is_right_when_the_objects_are_equal(answer: str, right: bool) -> None:
    assert json_match('{"a": 1, "b": null}', answer) is right


def test_text_is_right_when_it_is_the_same_but_for_blanks_around_it() -> None:
    assert text_match("yes", " yes\n")
    assert not text_match("yes", "Yes")


# --- Wilson's interval ---


def test_wilson_gives_the_published_numbers() -> None:
    # Newcombe (1998), table I: 81 of 263 and 15 of 148.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_holds_the_share_and_stays_within_0_and_1(pair: tuple[int, int]) -> None:
    right, count = pair
    low, high = wilson(right, count)
    assert 0.0 <= low <= right / count <= high <= 1.0
    mirrored = wilson(count - right, count)
    assert math.isclose(low, 1 - mirrored[1], abs_tol=1e-12)


# --- arms ---


def test_arms_ask_in_their_own_way() -> None:
    shots = (example("one", "1"), example("two", "2"), example("three", "3"))
    inputs = ArmInputs("base", "ft:x", "Do it well.", shots, shots=2)
    base, instruction, few, tuned = make_arms(["base", "instruction", "few-shot", "tuned"], inputs)
    question = example("four", "4")
    assert base.messages(question) == [SYSTEM, {"role": "user", "content": "four"}]
    assert instruction.messages(question)[0] == {"role": "system", "content": "Do it well."}
    assert [message["content"] for message in few.messages(question)] == [
        "Make a ticket.",
        *("one", "1", "two", "2"),
        "four",
    ]
    assert (tuned.model, tuned.messages(question)) == ("ft:x", base.messages(question))


@pytest.mark.parametrize(
    ("arm", "missing"), [("tuned", "--tuned"), ("instruction", "--instruction"), ("few-shot", "--train")]
)
def test_an_arm_says_what_it_needs(arm: str, missing: str) -> None:
    with pytest.raises(InvalidArgument, match=missing):
        make_arms([arm], ArmInputs("base"))


def test_an_unknown_arm_names_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="base, instruction, few-shot, tuned"):
        make_arms(["magic"], ArmInputs("base"))


def test_examples_that_cannot_be_read_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    path.write_text(f"{good}\n\n{good.replace('assistant', 'user')}\n")
    with pytest.raises(InvalidArgument, match="line 3"):
        read_examples(path)
    path.write_text(good)
    assert read_examples(path) == [Example(({"role": "user", "content": "a"},), "b")]


# --- measuring ---


def test_an_arm_is_measured_on_every_example_the_first_alone() -> None:
    client = AnsweringClient()
    examples = [example(f"q{index}", f"Q{index}" if index % 2 else "other") for index in range(20)]
    seen: list[int] = []
    [arm] = make_arms(["base"], ArmInputs("base"))
    result = Measure(scorers=("text",)).run(client, arm, examples, lambda done, total: seen.append(done))  # type: ignore[arg-type]
    assert (result.count, result.scores) == (20, {"text": 10})
    assert result.answers == tuple(f"Q{index}" for index in range(20))
    assert (result.prompt_tokens, result.completion_tokens) == (10, 2)
    # The warm-up, then the first example, then the rest in any order.
    assert client.asked[1][1][-1]["content"] == "q0"
    assert len(client.asked) == 21
    assert sorted(seen) == list(range(1, 21))


def test_the_digest_of_requests_changes_with_whatever_is_asked_or_counted() -> None:
    examples = [example("q", "a")]
    [base] = make_arms(["base"], ArmInputs("base"))
    [told] = make_arms(["instruction"], ArmInputs("base", instruction="Be short."))
    digests = {
        request_digest(base, examples, Measure()),
        request_digest(told, examples, Measure()),
        request_digest(base, [example("q", "b")], Measure()),
        request_digest(base, examples, Measure(max_tokens=5)),
        request_digest(base, examples, Measure(scorers=("text",))),
    }
    assert len(digests) == 5
    assert request_digest(base, examples, Measure()) in digests


def test_the_interval_of_a_result_is_of_its_score() -> None:
    result = ArmResult("base", "m", 148, {"json": 15}, 1, 0, 1, 1, 1)
    assert result.interval("json") == wilson(15, 148)
