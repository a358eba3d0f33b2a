"""Write the tickets as preferences: the right ticket rather than one with a mistake that a model does make.

    python docs/examples/tickets/preferences.py [--out FOLDER]

preferences.jsonl and preferences_heldout.jsonl, in OpenAI's preference format, come from train.jsonl and heldout.jsonl,
row by row; the same files give the same bytes. `--method dpo` and `orpo` train on them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = {"train.jsonl": "preferences.jsonl", "heldout.jsonl": "preferences_heldout.jsonl"}
WANTS = ("advice", "callback", "refund", "replacement")
ISSUES = ("billing", "damaged", "late", "missing_part", "wrong_item")

Ticket = dict[str, Any]


def another(rng: random.Random, values: tuple[str, ...], right: str) -> str:
    return rng.choice([value for value in values if value != right])


# What a field becomes when it is got wrong; a mistake that the ticket leaves no room for answers the same value.
MISTAKES: dict[str, Callable[[random.Random, Ticket], Any]] = {
    "customer": lambda rng, ticket: ticket["customer"].split()[0],
    "order": lambda rng, ticket: ticket["order"] and ticket["order"].removeprefix("FH-"),
    "product": lambda rng, ticket: ticket["product"].split(" ", 1)[-1],
    "issue": lambda rng, ticket: another(rng, ISSUES, ticket["issue"]),
    "wants": lambda rng, ticket: another(rng, WANTS, ticket["wants"]),
    "needed_by": lambda rng, ticket: None if ticket["needed_by"] else "today",
}


def spoil(rng: random.Random, ticket: Ticket) -> Ticket:
    """The ticket with one field got wrong."""
    for field in rng.sample(sorted(MISTAKES), len(MISTAKES)):
        wrong = MISTAKES[field](rng, ticket)
        if wrong != ticket[field]:
            return {**ticket, field: wrong}
    raise AssertionError("issue and wants can always be got wrong")


def preference(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = row["messages"]
    wrong = json.dumps(spoil(rng, json.loads(answer["content"])), ensure_ascii=False)
    return {
        "input": {"messages": prompt},
        "preferred_output": [answer],
        "non_preferred_output": [{"role": "assistant", "content": wrong}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    out: Path = parser.parse_args().out
    for source, target in FILES.items():
        rng = random.Random(source)
        rows = [json.loads(line) for line in (HERE / source).read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(preference(rng, row), ensure_ascii=False) + "\n" for row in rows]
        (out / target).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
