"""How a file becomes rows where its name does not say it all: Lathe's own fields of files, uploads and imports."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from lathe.gateway.http.requests import Model
from lathe.v1 import datasets_pb2 as pb

CONVERSION_FIELDS = (
    ("dataset.import_options.columns", "columns"),
    ("dataset.import_options.file_type", "file_type"),
    ("dataset.import_options", "file_type"),
)
"""For `door_words`."""


class ConversionBody(Model):
    """file_type: jsonl, json, csv or parquet; by the name's ending if not given. columns: key of a training row ->
    column of the file."""

    file_type: str = ""
    columns: dict[str, str] = Field(default_factory=dict)


def new_dataset(filename: str, purpose: str, file_type: str, columns: Mapping[str, str]) -> pb.Dataset:
    """What datasets is asked to make."""
    dataset = pb.Dataset(display_name=filename, purpose=purpose)
    if file_type or columns:
        dataset.import_options.CopyFrom(pb.ImportOptions(file_type=file_type, columns=columns))
    return dataset
