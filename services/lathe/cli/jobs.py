"""`lathe jobs`: ask for a model to be tuned, and watch it happen."""

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.message import Message

from lathe.cli import exits
from lathe.cli.connection import client_of
from lathe.cli.estimates import asked_of, confirm, estimate, estimate_lines
from lathe.cli.jobview import JobView, metrics_line
from lathe.cli.output import (
    JSON,
    enum_word,
    note,
    plain,
    print_facts,
    print_json,
    print_messages,
    print_table,
    state_word,
    when,
)
from lathe.cli.training_files import job_files
from lathe.client import Client
from lathe.client.jobsettings import asked_settings
from lathe.client.names import last_id
from lathe.common.errors import InvalidArgument
from lathe.v1 import jobs_pb2 as pb

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs.")
# Settings that `show` has a line for.
_OWN_LINES = frozenset({"n_epochs", "batch_size", "learning_rate_multiplier", "full_parameter"})
JOB = Annotated[str, typer.Argument(help="ftjob-…")]


@app.command()
def create(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The base or tuned model to start from.")],
    train: Annotated[str, typer.Option(help="file-… or the path of a file, which is uploaded.")],
    validation: Annotated[str, typer.Option(help="file-… or a path; its loss is measured.")] = "",
    suffix: Annotated[str, typer.Option(help="Part of the tuned model's id.")] = "",
    seed: Annotated[int | None, typer.Option(help="Chosen if unset.")] = None,
    n_epochs: Annotated[int | None, typer.Option(help="Times over the data; auto if unset.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step; auto if unset.")] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(help="Auto if unset.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    method: Annotated[str, typer.Option(help="supervised, dpo, orpo or kto.")] = "supervised",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, such as beta=0.2; repeatable."),
    ] = None,
    engine_class: Annotated[
        str, typer.Option(help="Which kind of engine, of those that the operator offers.")
    ] = "",
    dedicated: Annotated[
        bool, typer.Option("--dedicated", help="On an engine of its own, which ends with the job.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that train it together, on an engine of its own.")
    ] = 1,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it until it ends.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask after the estimate.")] = False,
    as_json: JSON = False,
) -> None:
    """Ask for a model to be tuned on a file of examples; on a terminal, after a look at what that takes."""
    named = {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
        "lora_r": lora_r,
    }
    wanted = asked_settings(method, settings or [], named)
    with client_of(context) as client:
        asked: dict[str, Any] = {
            "suffix": suffix,
            "seed": seed,
            "method": method,
            "settings": wanted,
            "engine_class": engine_class,
            "dedicated": dedicated,
            "workers": workers,
        }
        dataset, asked["validation_dataset"] = job_files(client, model, train, validation, **asked)
        confirm(asked_of(client, model, dataset, **asked), yes=yes, quiet=as_json)
        job = client.jobs.create(model, dataset, **asked)
        if watch:
            if not as_json:
                note(last_id(job.name))
            raise typer.Exit(_watch(client, job.name, as_json))
    if as_json:
        print_json(job)
    else:
        print(last_id(job.name))


app.command()(estimate)


@app.command()
def watch(context: typer.Context, job: JOB, as_json: JSON = False) -> None:
    """Show a job's progress until it ends; it goes on when you leave with Ctrl-C. Exit code 1 if it failed."""
    with client_of(context) as client:
        raise typer.Exit(_watch(client, job, as_json))


@app.command(name="list")
def list_(
    context: typer.Context,
    state: Annotated[
        list[str] | None, typer.Option(help="Only those in it, such as queued or running; repeatable.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Your jobs, newest first."""
    states = [_state(word) for word in state or []]
    with client_of(context) as client:
        jobs = list(client.jobs.list(states))
    if as_json:
        print_messages(jobs)
        return
    rows = (
        (
            last_id(job.name),
            job.model,
            state_word(job),
            f"{job.step}/{job.total_steps}" if job.total_steps else "",
            job.fine_tuned_model,
            when(job.create_time),
        )
        for job in jobs
    )
    none = "There are no jobs in that state." if states else "There are no jobs."
    print_table(("id", "model", "state", "step", "tuned model", "created"), rows, none)


@app.command()
def show(context: typer.Context, job: JOB, as_json: JSON = False) -> None:
    """One job, with its checkpoints."""
    with client_of(context) as client:
        found = client.jobs.get(job)
        checkpoints = list(client.jobs.checkpoints(job))
    if as_json:
        print_json({**plain(found), "checkpoints": [plain(one) for one in checkpoints]})
        return
    method = found.method.WhichOneof("method") or "supervised"
    chosen = getattr(found.method, method)
    print_facts(
        (
            ("id", last_id(found.name)),
            ("model", found.model),
            ("state", state_word(found)),
            ("", found.state_reason if found.state_reason != found.error.message else ""),
            ("estimate", "\n".join(estimate_lines(found.estimate)) if found.HasField("estimate") else ""),
            ("error", found.error.message),
            ("tuned model", found.fine_tuned_model),
            ("step", f"{found.step} of {found.total_steps}" if found.total_steps else ""),
            ("trained tokens", str(found.trained_tokens or "")),
            ("method", method),
            ("parent", found.parent_model),
            ("rerun of", last_id(found.rerun_of)),
            ("its weights", _compared(found)),
            ("epochs", str(chosen.hyperparameters.n_epochs or "auto")),
            ("batch size", str(chosen.hyperparameters.batch_size or "auto")),
            ("learning rate", f"x {chosen.hyperparameters.learning_rate_multiplier or 'auto'}"),
            ("LoRA", _lora(chosen.lora, full_parameter=found.training.full_parameter)),
            ("settings", settings_line(chosen.hyperparameters, found.training)),
            ("seed", str(found.seed)),
            ("engine", _engine(found.compute)),
            ("training file", last_id(found.training_dataset)),
            ("validation file", last_id(found.validation_dataset)),
            ("result files", ", ".join(last_id(name) for name in found.result_files)),
            (
                "attempts",
                f"{found.attempt_count}, {found.lost_lease_count} lost" if found.attempt_count else "",
            ),
            ("created", when(found.create_time)),
            ("likely done", when(found.estimated_finish_time)),
            ("finished", when(found.finish_time)),
            *(("checkpoint", one.model_id) for one in checkpoints),
        )
    )


@app.command()
def receipt(
    context: typer.Context,
    job: JOB,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it there.")] = None,
) -> None:
    """What a job that succeeded was made from and computed with, as JSON."""
    with client_of(context) as client:
        document = client.jobs.receipt(job)
    if output is None:
        print(document, end="")
    else:
        output.write_text(document, encoding="utf-8")


@app.command()
def rerun(
    context: typer.Context,
    job: JOB,
    watch: Annotated[bool, typer.Option("--watch", help="Watch it until it ends.")] = False,
    as_json: JSON = False,
) -> None:
    """Repeat a job from its receipt; the new job's end says whether its weights are the same, bit for bit."""
    with client_of(context) as client:
        again = client.jobs.rerun(job)
        if watch:
            if not as_json:
                note(last_id(again.name))
            raise typer.Exit(_watch(client, again.name, as_json))
    if as_json:
        print_json(again)
    else:
        print(last_id(again.name))


@app.command()
def cancel(context: typer.Context, job: JOB, as_json: JSON = False) -> None:
    """Stop a job."""
    with client_of(context) as client:
        cancelled = client.jobs.cancel(job)
    if as_json:
        print_json(cancelled)
    else:
        note(f"{job}: {state_word(cancelled)}. {cancelled.state_reason}")


@app.command()
def events(context: typer.Context, job: JOB, as_json: JSON = False) -> None:
    """Everything that happened to a job, oldest first; one JSON document per line with --json."""
    with client_of(context) as client:
        happened = list(client.jobs.events(job))
    for event in reversed(happened):
        if as_json:
            print_json(event)
        else:
            text = metrics_line(event.metrics) if event.type == pb.EVENT_TYPE_METRICS else event.message
            print(f"{when(event.create_time)}  {text}")


def settings_line(*messages: Message) -> str:
    """`beta 0.2, schedule linear`: what was asked for or chosen and stands in no line of its own."""
    given = [(field.name, value) for message in messages for field, value in message.ListFields()]
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in given
        if name not in _OWN_LINES
    )


def _lora(given: pb.LoraConfig, *, full_parameter: bool) -> str:
    if full_parameter:
        return "none: all weights are trained"
    parts = [f"r {given.r or 'auto'}", f"alpha {given.lora_alpha or 'auto'}"]
    parts += [f"dropout {given.lora_dropout}"] if given.lora_dropout else []
    parts += [word for word, on in (("rsLoRA", given.use_rslora), ("DoRA", given.use_dora)) if on]
    return ", ".join(parts)


def _engine(compute: pb.ComputeSpec) -> str:
    if compute.workers > 1:
        return f"{compute.engine_class}, its own, of {compute.workers} workers"
    return f"{compute.engine_class}{', its own' if compute.dedicated else ''}"


def _compared(job: pb.Job) -> str:
    found = job.comparison
    if not job.HasField("comparison"):
        return ""
    if found.not_compared_reason:
        return f"not compared: {found.not_compared_reason}"
    if found.bit_identical:
        return "bit-identical to the first's"
    return f"differ from the first's by at most {found.largest_difference:.3g} ({found.tensor})"


def _state(word: str) -> pb.JobState.ValueType:
    """Raises InvalidArgument for what is no state of a job."""
    words = {enum_word(pb.JobState.DESCRIPTOR, number): number for number in pb.JobState.values() if number}
    found = words.get(word.strip().lower().replace(" ", "_").replace("-", "_"))
    if found is None:
        raise InvalidArgument(f"--state {word!r} is no state of a job; choose from {', '.join(words)}.")
    return found


def _watch(client: Client, name: str, as_json: bool) -> int:
    """Watch until the end; the exit code."""
    job = pb.Job()
    try:
        if as_json:
            for update in client.jobs.watch(name):
                job = update.job
                print_json(update)
        else:
            with JobView() as view:
                for update in client.jobs.watch(name):
                    job = update.job
                    view.update(update)
    except KeyboardInterrupt:
        note(f"The job goes on. Watch it again with: lathe jobs watch {last_id(name)}")
        return exits.INTERRUPTED
    return exits.OK if job.state == pb.JOB_STATE_SUCCEEDED else exits.FAILED
