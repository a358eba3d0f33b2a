"""README.md of an export: what the model is, where it came from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from lathe.engine.export.source import Lineage


def model_card(lineage: Lineage, *, kind: str, usage: str, measured: Mapping[str, str], peft: bool) -> str:
    """Markdown with the front matter that model hubs read. `usage` is a fenced block's content."""
    front = [f"license: {lineage.licence.lower()}"] if lineage.licence not in {"", "unknown"} else []
    front += [f"base_model: {lineage.base_model}"] if lineage.base_model else []
    front += (
        ["library_name: peft"] if peft else ["library_name: transformers"] if kind == "safetensors" else []
    )
    facts = {"base model": lineage.base_model, "licence": lineage.licence, **lineage.facts}
    lines = ["---", *front, "---", "", f"# {lineage.model or lineage.base_model or 'Model'}", ""]
    lines += [f"Exported by Lathe as {kind}.", "", "## Where it came from", ""]
    lines += _table({name: value for name, value in facts.items() if value})
    if measured:
        lines += ["", "## What was measured at the export", "", *_table(measured)]
    return "\n".join([*lines, "", "## Use", "", "```", usage, "```", ""])


def _table(rows: Mapping[str, str]) -> list[str]:
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return ["| | |", "|---|---|", *cells]
