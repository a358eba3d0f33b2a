"""Prints the table of the chart's values, from values.schema.json (what they mean) and values.yaml (the defaults)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[1] / "charts" / "lathe"
_LONGEST_DEFAULT = 60
# One row says more than one for each of their fields.
_WHOLE = frozenset({"resources"})

Schema = Mapping[str, Any]


def resolved(part: Schema, root: Schema) -> tuple[str, Schema]:
    """What a $ref means, and its name; the part itself and no name if it is none."""
    if "$ref" not in part:
        return "", part
    name = str(part["$ref"]).removeprefix("#/$defs/")
    return name, root["$defs"][name]


def rows(path: str, part: Schema, defaults: Any, root: Schema) -> Iterator[tuple[str, str, str]]:
    """A value's path, default and meaning; its fields' where it has named ones."""
    name, part = resolved(part, root)
    fields = part.get("properties") if name not in _WHOLE else None
    if fields:
        for field, inner in fields.items():
            value = defaults.get(field) if isinstance(defaults, dict) else None
            yield from rows(f"{path}.{field}" if path else field, inner, value, root)
        return
    yield path, shown(defaults), meaning(part)
    named = part.get("additionalProperties")
    if isinstance(named, dict) and "$ref" in named:
        yield from rows(f"{path}.<name>", named, None, root)


def meaning(part: Schema) -> str:
    """The description, and what may be chosen."""
    choice = part.get("enum")
    words = str(part["description"])
    return f"{words} One of {', '.join(f'`{one}`' for one in choice)}." if choice else words


def shown(default: Any) -> str:
    """A default as one writes it; nothing for none, and a reference for one that is long."""
    if default is None or default in ("", [], {}):
        return ""
    text = default if isinstance(default, str) else json.dumps(default)
    return f"`{text}`" if len(text) <= _LONGEST_DEFAULT else "see values.yaml"


def sections(schema: Schema) -> Iterator[Sequence[str]]:
    """The top-level values; those that are of one kind (the plain services) together."""
    seen: dict[str, list[str]] = {}
    for name, part in schema["properties"].items():
        seen.setdefault(part.get("$ref", name), []).append(name)
    yield from seen.values()


def table(names: Sequence[str], schema: Schema, defaults: Mapping[str, Any]) -> str:
    """The rows of values that share a section; `<service>` stands for several."""
    prefix = names[0] if len(names) == 1 else "<service>"
    lines = ["| Value | Default | Meaning |", "|---|---|---|"]
    first = [defaults.get(name) for name in names]
    agreed = first[0] if len(names) == 1 else _common(first)
    for path, default, words in rows(prefix, schema["properties"][names[0]], agreed, schema):
        lines.append(f"| `{path}` | {default} | {words} |")
    return "\n".join(lines)


def _common(several: Sequence[Any]) -> dict[str, Any]:
    """The defaults that all have alike; what differs is a text too long to show."""
    return {
        key: value if all(one[key] == value for one in several) else "-" * (_LONGEST_DEFAULT + 1)
        for key, value in several[0].items()
    }


def page(schema: Schema, defaults: Mapping[str, Any]) -> str:
    """Every section, one after the other."""
    parts, alone = [], [names[0] for names in sections(schema) if _is_plain(names, schema)]
    if alone:
        lines = ["| Value | Default | Meaning |", "|---|---|---|"]
        for name in alone:
            part = schema["properties"][name]
            lines += [f"| `{p}` | {d} | {m} |" for p, d, m in rows(name, part, defaults.get(name), schema)]
        parts.append("### Names\n\n" + "\n".join(lines))
    for names in sections(schema):
        if _is_plain(names, schema):
            continue
        title = ", ".join(names)
        words = resolved(schema["properties"][names[0]], schema)[1]["description"]
        parts.append(f"### {title}\n\n{words}\n\n{table(names, schema, defaults)}")
    return "\n\n".join(parts)


def _is_plain(names: Sequence[str], schema: Schema) -> bool:
    return "properties" not in resolved(schema["properties"][names[0]], schema)[1]


def main() -> None:
    """Print the tables."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    print(page(schema, yaml.safe_load((CHART / "values.yaml").read_text())))


if __name__ == "__main__":
    main()
