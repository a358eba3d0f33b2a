"""`lathe models export`: take a model away, as PEFT's folder, merged safetensors or GGUF."""

import hashlib
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lathe.cli.connection import client_of
from lathe.cli.models import bar
from lathe.cli.output import JSON, note, print_json, size
from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.v1 import models_pb2 as pb

if TYPE_CHECKING:
    from lathe.engine.export.export import Exported
    from lathe.engine.export.source import Lineage, Source


class Format(StrEnum):
    """What is written."""

    PEFT = "peft"
    SAFETENSORS = "safetensors"
    GGUF = "gguf"


# The first one of a format is what it is unless told otherwise.
_TYPES = {Format.PEFT: ("",), Format.SAFETENSORS: ("bf16", "f32"), Format.GGUF: ("f16", "q8_0")}


def export(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="ft:… for a tuned model, or a base model's id.", show_default=False)
    ] = None,
    to: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.SAFETENSORS,
    kind: Annotated[
        str, typer.Option("--type", help="bf16 or f32 for safetensors, f16 or q8_0 for gguf.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="A new folder; the model's name here if unset.", show_default=False)
    ] = None,
    base_folder: Annotated[
        Path | None,
        typer.Option(help="The base model as a Hugging Face folder here, instead of fetching it."),
    ] = None,
    adapter_folder: Annotated[
        Path | None, typer.Option(help="The adapter as a PEFT folder here, instead of fetching it.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts to check the result on: a line each, of chat (JSONL) or plain text."),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Run a GGUF file in llama.cpp before it is handed over.")
    ] = True,
    as_json: JSON = False,
) -> None:
    """Write a model to a folder, checked by what will load it. Needs the extra `engine`; `export` to check GGUF.

    With both folders given, no platform is asked; a MODEL is then what the result is called.
    """
    kind = _checked_type(to, kind)
    _need_engine()
    with tempfile.TemporaryDirectory(prefix=".lathe-export-", dir=_beside(out)) as scratch:
        source = _source(context, model, base_folder, adapter_folder, scratch=Path(scratch), quiet=as_json)
        folder = out if out is not None else Path(source.name)
        made = _export(source, folder, to, kind, texts=texts, verify=verify, quiet=as_json)
    if as_json:
        print_json(
            {
                "folder": str(made.folder),
                "files": list(made.files),
                "size_bytes": made.size_bytes,
                "measured": dict(made.measured),
                "warnings": list(made.warnings),
            }
        )
        return
    for name, value in made.measured.items():
        note(f"{name}: {value}.")
    for warning in made.warnings:
        note(f"Warning: {warning}.")
    note(f"{len(made.files)} files, {size(made.size_bytes)}.")
    print(made.folder)


def _checked_type(to: Format, kind: str) -> str:
    allowed = _TYPES[to]
    if kind and kind not in allowed:
        what = f"choose from {', '.join(allowed)}" if allowed[0] else "an adapter keeps its own"
        raise typer.BadParameter(f"--type {kind} is none of {to}'s; {what}.")
    return kind or allowed[0]


def _need_engine() -> None:
    try:
        import gguf  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise FailedPrecondition(
            "Exporting computes with the model itself and needs the extra `engine`: pip install 'lathe[engine]'."
        ) from error


def _beside(out: Path | None) -> Path:
    """Where what is fetched is kept meanwhile: on the disk that has room for the result."""
    folder = (out or Path("x")).absolute()
    return next(parent for parent in folder.parents if parent.is_dir())


def _source(
    context: typer.Context,
    model: str | None,
    base: Path | None,
    adapter: Path | None,
    *,
    scratch: Path,
    quiet: bool,
) -> "Source":
    """The folders to export from, fetched where they are not given."""
    from lathe.engine.export.source import Lineage, Source
    from lathe.engine.hf_folder import licence_of

    if model is None or (base is not None and adapter is not None):
        if base is None:
            raise InvalidArgument(
                "Name a model, or give --base-folder (and --adapter-folder) to export without a platform."
            )
        made = model or (adapter or base).resolve().name
        base_name = "" if adapter is None else base.resolve().name
        return Source(base, adapter, Lineage(made, base_name, licence_of(base)))
    with client_of(context) as client:
        tuned = client.adapters.of_model(model) if model.startswith("ft:") else None
        platforms = client.models.get(tuned.base_model if tuned is not None else model)
        if tuned is not None:
            _check_digest(platforms, tuned)
        if base is not None:
            _check_base(base, platforms)
        else:
            base = scratch / "base"
            with bar(quiet, "Fetching the base model") as progress:
                client.models.fetch(platforms, base, progress=progress)
        if tuned is not None and adapter is None:
            adapter = scratch / "adapter"
            with bar(quiet, "Fetching the adapter") as progress:
                client.adapters.fetch(tuned, adapter, progress=progress)
    return Source(base, adapter, _lineage(model, platforms, tuned))


def _check_digest(base: pb.BaseModel, adapter: pb.Adapter) -> None:
    trained_on = adapter.lineage.base_digest
    if trained_on and base.digest and trained_on != base.digest:
        raise FailedPrecondition(
            f"{adapter.model_id} was trained on a base model with the digest {trained_on}; {base.name} now has "
            f"{base.digest}. Give the base that it was trained on with --base-folder and the adapter with "
            "--adapter-folder: with both, no platform is asked."
        )


def _check_base(folder: Path, base: pb.BaseModel) -> None:
    """Raises InvalidArgument unless the folder's weights and tokenizer are the platform's."""
    for file in base.files:
        path = folder / file.path
        if not file.path.endswith((".safetensors", "config.json", "tokenizer.json")):
            continue
        if not path.is_file():
            raise InvalidArgument(f"{folder} has no {file.path}, which {base.name} consists of.")
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                raise InvalidArgument(
                    f"{path} is not the file of {base.name}, which this model was trained on: leave --base-folder out "
                    "to fetch it."
                )


def _lineage(model: str, base: pb.BaseModel, tuned: pb.Adapter | None) -> "Lineage":
    from lathe.engine.export.source import Lineage

    base_id = base.name.rpartition("/")[2]
    if tuned is None:
        return Lineage(model, "", base.license, {"source": base.source, "digest": base.digest})
    made = tuned.lineage
    facts = {
        "job": made.job.rpartition("/")[2],
        "step": str(made.step),
        "dataset": f"sha256 {made.dataset_sha256}",
        "base digest": made.base_digest,
        "hyperparameters": made.hyperparameters_json,
        "seed": str(made.seed),
        "code": made.code_version,
    }
    return Lineage(model, base_id, base.license, facts)


def _export(
    source: "Source", out: Path, to: Format, kind: str, *, texts: Path | None, verify: bool, quiet: bool
) -> "Exported":
    from lathe.engine.export.export import MergedType, export_gguf, export_peft, export_safetensors
    from lathe.engine.export.gguf_file import GgufType
    from lathe.engine.export.texts import read_probes

    probes = read_probes(texts, source.tokenizer()) if texts is not None else []
    if to is Format.PEFT:
        return export_peft(source, out)
    with bar(quiet, "Writing", counts=True) as progress:
        if to is Format.SAFETENSORS:
            return export_safetensors(source, out, MergedType(kind), probes=probes, progress=progress)
        return export_gguf(source, out, GgufType(kind), probes=probes, verify=verify, progress=progress)
