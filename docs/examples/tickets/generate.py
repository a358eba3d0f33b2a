"""Write train.jsonl and heldout.jsonl: customers' messages to Fernhill, and the ticket each one should become.

    python docs/examples/tickets/generate.py [--out FOLDER]

The same seed and phrases.json give the same bytes. The held-out rows use names, products and complaints
that no training row has, beside some that they share, in combinations that are all new.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEED = 20_260
TRAIN_ROWS = 300
HELDOUT_ROWS = 60
SYSTEM = "Turn the message into a ticket."

# Share of the held-out rows' names, products and complaints that come from the lists training never sees.
NEW_SHARE = 0.4

Phrases = dict[str, Any]


def pick(rng: random.Random, lists: dict[str, list[str]], split: str) -> str:
    """One phrase: training rows from the training list, held-out rows partly from a list of their own."""
    if split == "heldout" and rng.random() < NEW_SHARE:
        return rng.choice(lists["heldout"])
    return rng.choice(lists["train"])


def make_ticket(rng: random.Random, phrases: Phrases, split: str) -> dict[str, Any]:
    """The answer comes first; the message is then written around it, so the two cannot disagree."""
    issue = rng.choice(sorted(phrases["issues"]))
    wants = [want for want in phrases["wants"] if want not in phrases["not_allowed"].get(issue, [])]
    customer = f"{pick(rng, phrases['first_names'], split)} {pick(rng, phrases['last_names'], split)}"
    return {
        "customer": customer,
        "order": None if rng.random() < 0.18 else f"FH-{rng.randint(1_000, 9_999)}",
        "product": f"{pick(rng, phrases['looks'], split)} {pick(rng, phrases['things'], split)}",
        "issue": issue,
        "wants": rng.choice(wants),
        "needed_by": rng.choice(phrases["days"]) if rng.random() < 0.45 else None,
    }


def spoken_order(rng: random.Random, order: str | None) -> str:
    """The order number as people write it; the ticket always has it as FH-1234."""
    if order is None:
        return ""
    digits = order.removeprefix("FH-")
    return rng.choice([order, order, order, order.lower(), f"FH {digits}", f"FH{digits}", f"#{order}"])


def a_date(rng: random.Random, phrases: Phrases) -> str:
    day, month = rng.randint(1, 28), rng.choice(phrases["months"])
    return rng.choice([f"{day} {month}", f"{month} {day}", f"{day} {month[:3]}"])


def details(rng: random.Random, phrases: Phrases, ticket: dict[str, Any]) -> dict[str, str]:
    """Values for the placeholders; those the ticket does not hold are the noise real messages are full of."""

    def price() -> str:
        return (
            rng.choice(["£", "GBP ", "£"]) + f"{rng.randint(6, 140)}.{rng.choice(['00', '50', '95', '99'])}"
        )

    return {
        "n": ticket["customer"],
        "p": ticket["product"],
        "o": spoken_order(rng, ticket["order"]),
        "date": a_date(rng, phrases),
        "date2": a_date(rng, phrases),
        "date3": a_date(rng, phrases),
        "price": price(),
        "price2": price(),
        "phone": f"07700 900{rng.randint(100, 999)}",
        "need": ticket["needed_by"] or "",
        "town": rng.choice(phrases["towns"]),
        "year": str(rng.randint(2011, 2023)),
    }


def typo(rng: random.Random, sentence: str, protected: set[str]) -> str:
    """Swap or drop one inner letter of one plain word; never in what the ticket copies."""
    words = sentence.split(" ")
    plain = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4 and word not in protected]
    if not plain:
        return sentence
    at = rng.choice(plain)
    word, cut = words[at], rng.randint(1, len(words[at]) - 3)
    if rng.random() < 0.5:
        words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    else:
        words[at] = word[:cut] + word[cut + 1 :]
    return " ".join(words)


def write_message(rng: random.Random, phrases: Phrases, ticket: dict[str, Any], split: str) -> str:
    """Opening, complaint, wish, hurry and small talk, in an order and a state that vary."""
    kind = "without_order" if ticket["order"] is None else "with_order"
    opening = rng.choice(phrases["openings"][kind])
    complaint = pick(rng, phrases["issues"][ticket["issue"]], split)
    wish = rng.choice(phrases["wants"][ticket["wants"]])
    body = [complaint, wish]
    if ticket["needed_by"]:
        body.insert(rng.choice([1, 2]), rng.choice(phrases["deadlines"]))
    elif rng.random() < 0.2:
        body.append(rng.choice(phrases["calm"]))
    if rng.random() < (0.15 if ticket["needed_by"] else 0.4):
        body.insert(rng.randint(1, len(body)), rng.choice(phrases["noise"]))
    name_first = rng.random() < 0.2
    if name_first:
        opening = f"{rng.choice(phrases['named_openings'])} {opening}"
    values = details(rng, phrases, ticket)
    protected = {word for key in ("n", "p", "need") for word in values[key].split()}
    sentences = [sentence.format(**values) for sentence in [opening, *body]]
    if rng.random() < 0.45:
        # Never in the complaint: there one letter can change what it says.
        at = rng.choice([i for i, template in enumerate([opening, *body]) if template != complaint])
        sentences[at] = typo(rng, sentences[at], protected)
    if rng.random() < 0.15:
        sentences = [sentence.rstrip(".") for sentence in sentences]
        text = ", ".join(sentences)
    else:
        text = " ".join(sentences)
    if rng.random() < 0.7:
        text = rng.choice(phrases["greetings"]) + rng.choice([", ", ". ", "\n", "! "]) + text
    if not name_first:
        text += rng.choice(["\n", " ", "\n"]) + rng.choice(phrases["signoffs"]).format(**values)
    return text


def make_rows(phrases: Phrases, split: str, count: int, seen: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rows in OpenAI's chat format. `seen` keeps customers and products from meeting twice, in either split."""
    rng = random.Random(f"{SEED}-{split}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        ticket = make_ticket(rng, phrases, split)
        message = write_message(rng, phrases, ticket, split)
        if (key := (ticket["customer"], ticket["product"])) in seen:
            continue
        seen.add(key)
        answer = json.dumps(ticket, ensure_ascii=False)
        turns = (("system", SYSTEM), ("user", message), ("assistant", answer))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    out: Path = parser.parse_args().out
    phrases: Phrases = json.loads((HERE / "phrases.json").read_text(encoding="utf-8"))
    seen: set[tuple[str, str]] = set()
    for split, count in (("train", TRAIN_ROWS), ("heldout", HELDOUT_ROWS)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(phrases, split, count, seen)]
        (out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
