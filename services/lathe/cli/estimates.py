"""`lathe jobs estimate`, and the estimate that `lathe jobs create` shows before it asks."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lathe.cli.connection import client_of
from lathe.cli.output import JSON, enum_word, note, print_json, size
from lathe.cli.training_files import job_files
from lathe.client import Client
from lathe.client.jobsettings import asked_settings
from lathe.common.errors import DeadlineExceeded, InvalidArgument, LatheError, Unimplemented
from lathe.v1 import jobs_pb2 as pb

SETTINGS = typer.Option(
    "--set", metavar="NAME=VALUE", help="Any other setting, such as beta=0.2; repeatable."
)


def estimate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="The base or tuned model to start from.")],
    train: Annotated[str, typer.Option(help="file-… or the path of a file, which is uploaded.")],
    validation: Annotated[str, typer.Option(help="file-… or a path.")] = "",
    method: Annotated[str, typer.Option(help="supervised, dpo, orpo or kto.")] = "supervised",
    n_epochs: Annotated[int | None, typer.Option(help="Times over the data; auto if unset.")] = None,
    settings: Annotated[list[str] | None, SETTINGS] = None,
    engine_class: Annotated[str, typer.Option(help="Which kind of engine; all are shown.")] = "",
    dedicated: Annotated[bool, typer.Option("--dedicated", help="On an engine of its own.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train it together.")] = 1,
    prompt_tokens_saved: Annotated[
        float, typer.Option(min=0, help="Fewer tokens of a request's prompt once the model is tuned.")
    ] = 0.0,
    price_per_million: Annotated[
        float | None, typer.Option(min=0, help="What a million tokens of that prompt cost.")
    ] = None,
    seconds_saved: Annotated[
        float | None, typer.Option(min=0, help="Or how much sooner a request is answered.")
    ] = None,
    requests_per_hour: Annotated[
        float, typer.Option(min=0, help="Share hosting among so many requests.")
    ] = 0.0,
    compare: Annotated[
        Path | None,
        typer.Option(help="What is saved, from `lathe compare --json`.", exists=True, dir_okay=False),
    ] = None,
    replaced_arm: Annotated[
        str, typer.Option(help="The arm of --compare that the tuned one replaces.")
    ] = "few-shot",
    as_json: JSON = False,
) -> None:
    """What a job would take: tokens, time, memory and money; and when it pays for itself. Starts nothing."""
    if compare is not None:
        replaces: pb.ReplacedPrompt | None = replaced_of(_document(compare), replaced_arm, price_per_million)
    else:
        replaces = _replaced(prompt_tokens_saved, price_per_million, seconds_saved)
    if replaces is not None:
        replaces.requests_per_hour = requests_per_hour
    wanted = asked_settings(method, settings or [], {"n_epochs": n_epochs})
    asked: dict[str, Any] = {
        "method": method,
        "settings": wanted,
        "engine_class": engine_class,
        "dedicated": dedicated,
        "workers": workers,
        "replaces": replaces,
    }
    with client_of(context) as client:
        dataset, asked["validation_dataset"] = job_files(client, model, train, validation, **asked)
        found = client.jobs.estimate(model, dataset, **asked)
    if as_json:
        print_json(found)
    else:
        for line in answer_lines(found):
            print(line)


def confirm(ask: Callable[[float], pb.EstimateJobResponse], *, yes: bool, quiet: bool) -> None:
    """Show the estimate and, on a terminal without `yes`, ask whether to go on. Raises Abort for a no.

    ask: the estimate within so many seconds. Where nobody can be asked, nothing is waited for and nothing hinders:
    what is wrong with the request the job says itself.
    """
    asked = not yes and not quiet and sys.stdin.isatty() and sys.stderr.isatty()
    try:
        found = ask(600.0 if asked else 0.0)
    except (DeadlineExceeded, Unimplemented):
        found = pb.EstimateJobResponse(pending=True)
    except LatheError:
        if asked:
            raise
        return
    if not quiet:
        for line in answer_lines(found):
            note(line)
    if asked:
        typer.confirm("Start it?", default=True, abort=True, err=True)


def answer_lines(found: pb.EstimateJobResponse) -> Iterator[str]:
    """An answer of EstimateJob, for people."""
    if found.pending:
        yield "The files are still being audited; `lathe jobs show` has the estimate once they are."
        return
    yield from estimate_lines(found.estimate)
    if found.HasField("break_even"):
        yield _break_even(found.break_even, found.estimate.currency)


def estimate_lines(estimate: pb.JobEstimate) -> Iterator[str]:
    """The tokens, then a line for each engine class."""
    yield (
        f"{estimate.steps:,} steps: {_many(estimate.n_epochs, 'epoch')} of {_many(estimate.examples, 'example')}, "
        f"{estimate.batch_size} at a time; {estimate.tokens:,} tokens, {estimate.trained_tokens:,} of them trained."
    )
    for engine in estimate.engines:
        yield f"  {_engine(engine)}: {', '.join(_parts(engine, estimate.currency))}."
    if estimate.HasField("hosting_price_per_hour"):
        hour, month = estimate.hosting_price_per_hour, estimate.hosting_price_per_month
        yield f"  Hosting: {_money(hour, estimate.currency)} an hour, {_money(month, estimate.currency)} a month."


def _engine(engine: pb.EngineEstimate) -> str:
    name = f"{engine.engine_class} ({engine.device})" if engine.device else engine.engine_class
    return f"{name}, {engine.workers} workers" if engine.workers > 1 else name


def _parts(engine: pb.EngineEstimate, currency: str) -> Iterator[str]:
    if engine.HasField("seconds"):
        yield _said(engine.seconds, duration)
        yield f"{engine.tokens_per_second:,.0f} tokens/s"
    else:
        yield "time not known: no such engine has trained yet"
    yield f"memory {_said(engine.memory_bytes, lambda count: size(round(count)))}"
    if engine.HasField("queue_seconds"):
        yield f"wait {duration(engine.queue_seconds)}" if engine.queue_seconds >= 1 else "no wait"
    if engine.HasField("price"):
        yield f"price {_said(engine.price, lambda amount: _money(amount, currency))}"


def _said(found: pb.EstimateRange, words: Callable[[float], str]) -> str:
    """`about 3 min (2 min to 5 min, measured)`"""
    basis = enum_word(pb.EstimateBasis.DESCRIPTOR, found.basis)
    where = {"rule": "by rule"}.get(basis, basis)
    return f"about {words(found.likely)} ({words(found.low)} to {words(found.high)}, {where})"


def _break_even(found: pb.BreakEven, currency: str) -> str:
    why = f" {found.reason}" if found.reason else ""
    if not found.HasField("requests"):
        return f"It does not pay for itself, or that is not known:{why}"
    saved = found.net_saved_per_request
    each = f"{saved:.3g} s of an engine" if found.by_seconds else f"{saved:.3g} {currency}".strip()
    return f"It pays for itself after {found.requests:,.0f} requests, each of which saves {each}.{why}"


def _money(amount: float, currency: str) -> str:
    return f"{amount:,.2f} {currency}" if amount >= 1 or amount == 0 else f"{amount:.2g} {currency}"


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2.1 h`, `3.5 days`"""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def replaced_of(report: dict[str, Any], arm: str, price_per_million: float | None) -> pb.ReplacedPrompt:
    """What the tuned arm of `lathe compare --json` saves a request beside another one.

    Without a price of tokens it is seconds of the engine: an arm's wall time over its requests.
    """
    arms = {one.get("arm"): one for one in report.get("arms", [])}
    missing = [name for name in (arm, "tuned") if name not in arms]
    if missing:
        there = ", ".join(str(name) for name in arms) or "none"
        raise InvalidArgument(f"The comparison has no arm {missing[0]!r}; there are {there}.")
    before, after = arms[arm], arms["tuned"]
    tokens = max(0.0, before["prompt_tokens"] - after["prompt_tokens"])
    if price_per_million is not None:
        return pb.ReplacedPrompt(prompt_tokens_saved=tokens, price_per_million_tokens=price_per_million)
    seconds = before["seconds"] / before["count"] - after["seconds"] / after["count"]
    return pb.ReplacedPrompt(prompt_tokens_saved=tokens, seconds_saved=max(0.0, seconds))


def _replaced(tokens: float, price: float | None, seconds: float | None) -> pb.ReplacedPrompt | None:
    """None where nothing was said. Raises InvalidArgument for what nothing can be reckoned from."""
    if price is not None and seconds is not None:
        raise InvalidArgument("Give --price-per-million or --seconds-saved, not both.")
    if bool(tokens) != (price is not None):
        raise InvalidArgument("--prompt-tokens-saved and --price-per-million are given together.")
    if price is not None:
        return pb.ReplacedPrompt(prompt_tokens_saved=tokens, price_per_million_tokens=price)
    return pb.ReplacedPrompt(seconds_saved=seconds) if seconds is not None else None


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"{path} is not what `lathe compare --json` prints.")
    return found


def asked_of(client: Client, model: str, dataset: str, **asked: Any) -> Callable[[float], Any]:
    """What `confirm` asks with."""
    return lambda timeout: client.jobs.estimate(model, dataset, timeout=timeout, **asked)
