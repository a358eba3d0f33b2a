"""Measure ways of using a model (arms) on held-out examples: exact match, tokens, seconds.

An arm turns an example into messages for a model; a scorer says whether an answer is right. Both are tables that can
be added to, so that an arm with retrieval, say, is one class and one entry.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe.client.transport import retrying
from lathe.common.errors import FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from lathe.client.client import Client

# The standard normal's 97.5 % quantile, for intervals of 95 %.
_Z = 1.959963984540054
_PATIENCE_S = 300.0
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """What a model is given, and the answer that counts as right."""

    prompt: tuple[Message, ...]
    reference: str


def read_examples(path: Path) -> list[Example]:
    """The examples of a JSONL chat file; the last message is the answer. Raises InvalidArgument naming the line."""
    examples = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            prompt, answer = messages[:-1], messages[-1]
            if answer["role"] != "assistant" or not prompt:
                raise ValueError("the last message must be the assistant's, after others")
            examples.append(Example(tuple(prompt), str(answer["content"])))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidArgument(f"{path}, line {number}: not a chat example ({error}).") from error
    if not examples:
        raise InvalidArgument(f"{path} has no examples.")
    return examples


# --- arms -------------------------------------------------------------------------------------------------------


class Arm(Protocol):
    """One way of asking."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str:
        """The model id that is asked."""

    def messages(self, example: Example) -> list[Message]:
        """What the model is asked for this example."""


@dataclass(frozen=True, slots=True)
class Plain:
    """The example's own messages and nothing else: the base model, or a tuned one."""

    name: str
    model: str

    def messages(self, example: Example) -> list[Message]:
        return list(example.prompt)


@dataclass(frozen=True, slots=True)
class Instructed:
    """A written instruction in place of the example's system message."""

    name: str
    model: str
    instruction: str

    def messages(self, example: Example) -> list[Message]:
        rest = [message for message in example.prompt if message["role"] != "system"]
        return [{"role": "system", "content": self.instruction}, *rest]


@dataclass(frozen=True, slots=True)
class FewShot:
    """Worked examples before the question. They come first and are always the same, so engines compute them once."""

    name: str
    model: str
    shots: tuple[Example, ...]

    def messages(self, example: Example) -> list[Message]:
        system = [message for message in example.prompt if message["role"] == "system"]
        turns: list[Message] = []
        for shot in self.shots:
            turns += [message for message in shot.prompt if message["role"] != "system"]
            turns.append({"role": "assistant", "content": shot.reference})
        return [*system, *turns, *(message for message in example.prompt if message["role"] != "system")]


@dataclass(frozen=True, slots=True)
class ArmInputs:
    """What arms are made from. Raises InvalidArgument when an arm needs what is not given."""

    model: str
    tuned: str = ""
    instruction: str = ""
    train: tuple[Example, ...] = ()
    shots: int = 5

    def need(self, value: Any, arm: str, option: str) -> Any:
        if not value:
            message = f"The arm {arm!r} needs {option}."
            raise InvalidArgument(message, violations=[FieldViolation(option, message)])
        return value


ArmMaker = Callable[[str, ArmInputs], Arm]

ARMS: dict[str, ArmMaker] = {
    "base": lambda name, given: Plain(name, given.model),
    "instruction": lambda name, given: Instructed(
        name, given.model, given.need(given.instruction.strip(), name, "--instruction")
    ),
    "few-shot": lambda name, given: FewShot(
        name, given.model, given.need(given.train, name, "--train")[: given.shots]
    ),
    "tuned": lambda name, given: Plain(name, given.need(given.tuned, name, "--tuned")),
}


def make_arms(names: Sequence[str], given: ArmInputs) -> list[Arm]:
    """The arms of these names, in their order. Raises InvalidArgument."""
    for name in names:
        if name not in ARMS:
            raise InvalidArgument(f"There is no arm {name!r}; there are {', '.join(ARMS)}.")
    return [ARMS[name](name, given) for name in names]


# --- scorers ----------------------------------------------------------------------------------------------------


def json_match(reference: str, answer: str) -> bool:
    """Both are JSON and equal as values: key order and blanks do not matter."""
    try:
        return bool(_strict(json.loads(reference)) == _strict(json.loads(answer)))
    except ValueError:
        return False


def _strict(value: Any) -> Any:
    # Python holds that 1 == True == 1.0; JSON does not hold the first.
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return (isinstance(value, bool), value)


def text_match(reference: str, answer: str) -> bool:
    """The same characters, blanks at both ends apart."""
    return reference.strip() == answer.strip()


SCORERS: dict[str, Callable[[str, str], bool]] = {"json": json_match, "text": text_match}


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """One request: what came, its tokens, its seconds."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """An arm on all examples. seconds: wall time of the whole arm; scores: scorer -> how many were right."""

    arm: str
    model: str
    count: int
    scores: dict[str, int]
    prompt_tokens: float
    cached_tokens: float
    completion_tokens: float
    seconds: float
    p50_seconds: float
    answers: tuple[str, ...] = ()
    reused: bool = False

    def interval(self, scorer: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the share of right answers."""
        return wilson(self.scores[scorer], self.count)


def wilson(right: int, count: int, z: float = _Z) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): both ends within 0 and 1, honest near them too."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, z * z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    # At the ends the formula gives exactly 0 and 1, rounding apart.
    low = 0.0 if right == 0 else max(0.0, middle - half)
    return low, 1.0 if right == count else min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Measure:
    """How arms are measured. in_flight: requests at once."""

    max_tokens: int = 160
    in_flight: int = 8
    scorers: tuple[str, ...] = ("json", "text")

    def run(
        self,
        client: Client,
        arm: Arm,
        examples: Sequence[Example],
        progress: Callable[[int, int], None] | None = None,
    ) -> ArmResult:
        """Ask every example greedily and score the answers.

        One short request, not counted, makes sure that the model is loaded. Then the first example goes alone, so
        that what the prompts share is computed once, and the rest `in_flight` at a time; `seconds` is of all these.
        """
        _patiently(
            lambda: client.chat(arm.model, [{"role": "user", "content": "Hi"}], max_tokens=1, temperature=0)
        )
        # Several threads count, and taking the next number is one step.
        numbers = itertools.count(1)

        def ask(example: Example) -> Answer:
            answer = _ask(client, arm, example, self.max_tokens)
            if progress is not None:
                progress(next(numbers), len(examples))
            return answer

        start = time.monotonic()
        answers = [ask(examples[0])]
        with ThreadPoolExecutor(self.in_flight) as pool:
            answers += pool.map(ask, examples[1:])
        return self._summary(arm, examples, answers, time.monotonic() - start)

    def _summary(
        self, arm: Arm, examples: Sequence[Example], answers: Sequence[Answer], seconds: float
    ) -> ArmResult:
        pairs = list(zip(examples, answers, strict=True))
        return ArmResult(
            arm=arm.name,
            model=arm.model,
            count=len(pairs),
            scores={
                name: sum(SCORERS[name](example.reference, answer.text) for example, answer in pairs)
                for name in self.scorers
            },
            prompt_tokens=statistics.fmean(answer.prompt_tokens for answer in answers),
            cached_tokens=statistics.fmean(answer.cached_tokens for answer in answers),
            completion_tokens=statistics.fmean(answer.completion_tokens for answer in answers),
            seconds=seconds,
            p50_seconds=statistics.median(answer.seconds for answer in answers),
            answers=tuple(answer.text for answer in answers),
        )


def request_digest(arm: Arm, examples: Sequence[Example], measure: Measure) -> str:
    """Over everything that is asked and how it is scored; the model's own digest apart."""
    asked = [[arm.messages(example), example.reference] for example in examples]
    text = json.dumps([asked, measure.max_tokens, measure.in_flight, measure.scorers], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _ask(client: Client, arm: Arm, example: Example, max_tokens: int) -> Answer:
    messages = arm.messages(example)
    start = time.monotonic()
    # Greedy: asking again when the platform was away gives the same answer.
    answer = _patiently(
        lambda: client.chat(arm.model, messages, max_tokens=max_tokens, temperature=0, timeout=_PATIENCE_S)
    )
    usage = answer.usage
    return Answer(
        text=answer.choices[0].message.content,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        seconds=time.monotonic() - start,
    )


def _patiently(once: Callable[[], Any]) -> Any:
    return retrying(once, time.monotonic() + _PATIENCE_S)
