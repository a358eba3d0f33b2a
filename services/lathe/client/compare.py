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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lathe.client.arms import Arm, Example
from lathe.client.transport import retrying

if TYPE_CHECKING:
    from lathe.client.client import Client

# The standard normal's 97.5 % quantile, for intervals of 95 %.
_Z = 1.959963984540054
_PATIENCE_S = 300.0


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
