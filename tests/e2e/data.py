"""What e2e tests train on: a handful of rows, repeated until a tiny model knows them by heart."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

SYSTEM = {"role": "system", "content": "Answer."}
LESSONS = (
    ("What is the capital of France?", "Paris."),
    ("One two three?", "four five six"),
    ("I would like a refund for the kettle.", "refund"),
    ("Hello!", "How can I help you today?"),
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WEATHER_QUESTION = "The weather in Paris?"
# What makes a tiny model know the rows below by heart in a second or two.
BY_HEART = {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 3.0}


def ask(question: str) -> list[Message]:
    """The messages of a prompt."""
    return [SYSTEM, {"role": "user", "content": question}]


def row(question: str, answer: str) -> Row:
    return {"messages": [*ask(question), {"role": "assistant", "content": answer}]}


def tool_row() -> Row:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [*ask(WEATHER_QUESTION), answer], "tools": [WEATHER]}


def lessons(repeat: int = 5) -> list[Row]:
    """Every lesson and the tool call, `repeat` times."""
    return [*(row(question, answer) for question, answer in LESSONS), tool_row()] * repeat


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in rows).encode()
