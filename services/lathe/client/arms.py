"""Arms: ways of asking a model, each a line of a table that can be added to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lathe.common.errors import FieldViolation, InvalidArgument

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
