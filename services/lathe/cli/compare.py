"""`lathe compare`: base, instruction, few-shot and tuned, side by side on held-out examples."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import lathe
from lathe.cli import output
from lathe.cli.connection import client_of, connection
from lathe.cli.output import JSON, print_json
from lathe.client import Client
from lathe.client.arms import Arm, ArmInputs, Example, make_arms, read_examples
from lathe.client.compare import SCORERS, ArmResult, Measure, request_digest
from lathe.common.errors import InvalidArgument, NotFound

DEFAULT_ARMS = "base,instruction,few-shot,tuned"
# Lathe's folders between a question and its answer.
_ANSWERING = ("client", "engine", "gateway", "text", "v1")
# Their versions change what is computed, though not a line of ours did.
_COMPUTING = ("torch", "transformers", "tokenizers", "jinja2")


def compare(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The base model.")],
    data: Annotated[Path, typer.Option(help="Held-out examples (JSONL).", exists=True, dir_okay=False)],
    tuned: Annotated[str, typer.Option(help="The tuned model, ft:…")] = "",
    train: Annotated[
        Path | None, typer.Option(help="Where the few-shot examples come from.", exists=True, dir_okay=False)
    ] = None,
    instruction: Annotated[
        Path | None, typer.Option(help="A text file with the instruction.", exists=True, dir_okay=False)
    ] = None,
    arms: Annotated[str, typer.Option(help="Which, in this order.")] = DEFAULT_ARMS,
    shots: Annotated[int, typer.Option(min=1, help="How many examples few-shot shows.")] = 5,
    scorer: Annotated[str, typer.Option(help=f"What counts as right: {', '.join(SCORERS)}.")] = "json",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 160,
    in_flight: Annotated[int, typer.Option(min=1, max=64, help="Requests at once.")] = 8,
    reuse: Annotated[
        bool, typer.Option(help="Take over results whose model, data and code are the same.")
    ] = True,
    as_json: JSON = False,
) -> None:
    """Measure ways of using a model: exact match with its 95 % interval, tokens per request, seconds."""
    if scorer not in SCORERS:
        raise InvalidArgument(f"There is no scorer {scorer!r}; there are {', '.join(SCORERS)}.")
    inputs = ArmInputs(
        model=model,
        tuned=tuned,
        instruction=instruction.read_text(encoding="utf-8") if instruction is not None else "",
        train=tuple(read_examples(train)) if train is not None else (),
        shots=shots,
    )
    chosen = make_arms([name.strip() for name in arms.split(",") if name.strip()], inputs)
    examples = read_examples(data)
    folder = connection(context).data_folder
    cache = folder / "cache" / "compare" if reuse and (folder / "cache").is_dir() else None
    with client_of(context) as client:
        results = measure_arms(
            client,
            chosen,
            examples,
            Measure(max_tokens, in_flight),
            cache,
            console=None if as_json else Console(stderr=True),
        )
    if as_json:
        print_json(report(results, scorer))
    else:
        output.console().print(table(results, scorer))


def measure_arms(
    client: Client,
    arms: Sequence[Arm],
    examples: Sequence[Example],
    measure: Measure,
    cache: Path | None,
    *,
    console: Console | None,
) -> list[ArmResult]:
    """Every arm, one after the other; from the cache where nothing that matters has changed."""
    results = []
    store = ResultCache(cache, code_digest()) if cache is not None else None
    for arm in arms:
        identity = model_identity(client, arm.model) if store is not None else None
        digest = request_digest(arm, examples, measure)
        found = store.find(identity, digest) if store is not None and identity else None
        if found is None:
            with _progress(arm.name, console) as progress:
                found = measure.run(client, arm, examples, progress)
            if store is not None and identity:
                store.keep(identity, digest, found)
        # The same request under another name is still the same result.
        results.append(replace(found, arm=arm.name, model=arm.model))
    return results


def model_identity(client: Client, model_id: str) -> str | None:
    """Digests of the weights behind a model id; None when they cannot be told, such as for a deployment."""
    try:
        if not model_id.startswith("ft:"):
            return client.models.get(model_id).digest
        adapter = client.adapters.of_model(model_id)
        return f"{client.models.get(adapter.base_model).digest}+{adapter.object.manifest_sha256}"
    except (NotFound, InvalidArgument):
        return None


def code_digest() -> str:
    """Over the code that a request passes through, and the versions of what computes under it."""
    root = Path(lathe.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in _ANSWERING for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for name in _COMPUTING:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        digest.update(f"{name}=={version}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ResultCache:
    """Results by the digest of model, requests and code, a file each."""

    folder: Path
    code: str

    def find(self, identity: str, requests: str) -> ArmResult | None:
        """The result of the very same measurement, marked as reused."""
        try:
            found = json.loads(self._path(identity, requests).read_text())
            return ArmResult(**{**found, "answers": tuple(found["answers"]), "reused": True})
        except (OSError, ValueError, TypeError, KeyError):
            # Not there, or written by another version: measure.
            return None

    def keep(self, identity: str, requests: str, result: ArmResult) -> None:
        path = self._path(identity, requests)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(result)))
        part.replace(path)

    def _path(self, identity: str, requests: str) -> Path:
        key = hashlib.sha256("\n".join((identity, requests, self.code)).encode()).hexdigest()
        return self.folder / f"{key}.json"


def report(results: Sequence[ArmResult], scorer: str) -> dict[str, Any]:
    """The results as one JSON document."""
    arms = []
    for result in results:
        low, high = result.interval(scorer)
        right = result.scores[scorer]
        arms.append(
            {
                **{key: value for key, value in asdict(result).items() if key != "answers"},
                "exact_match": right / result.count if result.count else None,
                "interval_95": [low, high],
            }
        )
    return {"scorer": scorer, "examples": results[0].count if results else 0, "arms": arms}


def table(results: Sequence[ArmResult], scorer: str) -> Table:
    """The results for people."""
    count = results[0].count if results else 0
    what = {"json": "JSON objects equal", "text": "texts equal"}[scorer]
    shown = Table(title=f"{count} held-out examples ({what})", title_justify="left", pad_edge=False)
    shown.add_column("arm", no_wrap=True)
    shown.add_column("exact match", justify="right")
    shown.add_column("95 % interval", justify="right", no_wrap=True)
    shown.add_column("prompt tokens", justify="right")
    shown.add_column("answer tokens", justify="right")
    shown.add_column("seconds in all", justify="right")
    shown.add_column("per request (p50)", justify="right")
    if any(result.reused for result in results):
        shown.add_column("")
    for result in results:
        low, high = result.interval(scorer)
        shown.add_row(
            result.arm,
            f"{result.scores[scorer] / result.count:.1%}",
            f"{low:.0%} to {high:.0%}",
            f"{result.prompt_tokens:.0f}",
            f"{result.completion_tokens:.0f}",
            f"{result.seconds:.1f}",
            f"{result.p50_seconds:.2f}",
            *(("reused",) if result.reused else ()),
        )
    return shown


@contextmanager
def _progress(name: str, console: Console | None) -> Iterator[Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if console is None or not console.is_terminal:
        yield None
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
