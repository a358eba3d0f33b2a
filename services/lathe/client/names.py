"""Resource names: every method takes the whole name or the last id alone."""

from __future__ import annotations


def full_name(project: str, collection: str, name: str) -> str:
    """`projects/p/datasets/file-1` of either that or `file-1`. project: `projects/{project}`."""
    return name if "/" in name else f"{project}/{collection}/{name}"


def last_id(name: str) -> str:
    """The last segment: what OpenAI's API calls the id."""
    return name.rsplit("/", 1)[-1]
