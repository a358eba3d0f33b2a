"""Messages of jobs.proto about estimates to models and back."""

from __future__ import annotations

from dataclasses import asdict

from lathe.jobs.estimates import HOURS_PER_MONTH
from lathe.jobs.estimating import Answer
from lathe.jobs.figures import Basis, BreakEven, EngineEstimate, JobEstimate, Range, ReplacedPrompt
from lathe.v1 import jobs_pb2

_BASES = {
    Basis.MEASURED: jobs_pb2.ESTIMATE_BASIS_MEASURED,
    Basis.SCALED: jobs_pb2.ESTIMATE_BASIS_SCALED,
    Basis.RULE: jobs_pb2.ESTIMATE_BASIS_RULE,
}


def replaced(request: jobs_pb2.EstimateJobRequest) -> ReplacedPrompt | None:
    """What the tuned model replaces, if the request says."""
    if not request.HasField("replaces"):
        return None
    given = request.replaces
    saving = given.WhichOneof("saving")
    return ReplacedPrompt(
        given.prompt_tokens_saved,
        given.price_per_million_tokens if saving == "price_per_million_tokens" else None,
        given.seconds_saved if saving == "seconds_saved" else None,
        given.requests_per_hour,
    )


def answer_pb(answer: Answer) -> jobs_pb2.EstimateJobResponse:
    return jobs_pb2.EstimateJobResponse(
        pending=answer.estimate is None,
        estimate=estimate_pb(answer.estimate) if answer.estimate is not None else None,
        break_even=_break_even_pb(answer.break_even) if answer.break_even is not None else None,
    )


def estimate_pb(estimate: JobEstimate) -> jobs_pb2.JobEstimate:
    hour = estimate.hosting_price_per_hour
    return jobs_pb2.JobEstimate(
        examples=estimate.examples,
        n_epochs=estimate.n_epochs,
        batch_size=estimate.batch_size,
        steps=estimate.steps,
        tokens_per_epoch=estimate.tokens_per_epoch,
        tokens=estimate.tokens,
        trained_tokens=estimate.trained_tokens,
        validation_tokens=estimate.validation_tokens,
        engines=map(_engine_pb, estimate.engines),
        currency=estimate.currency,
        hosting_price_per_hour=hour,
        hosting_price_per_month=hour * HOURS_PER_MONTH if hour is not None else None,
    )


def _engine_pb(engine: EngineEstimate) -> jobs_pb2.EngineEstimate:
    return jobs_pb2.EngineEstimate(
        engine_class=engine.engine_class,
        device=engine.device,
        workers=engine.workers,
        seconds=_range_pb(engine.seconds),
        memory_bytes=_range_pb(engine.memory_bytes),
        queue_seconds=engine.queue_seconds,
        price=_range_pb(engine.price),
        tokens_per_second=engine.tokens_per_second,
    )


def _range_pb(found: Range | None) -> jobs_pb2.EstimateRange | None:
    if found is None:
        return None
    return jobs_pb2.EstimateRange(
        low=found.low, likely=found.likely, high=found.high, basis=_BASES[found.basis]
    )


def _break_even_pb(found: BreakEven) -> jobs_pb2.BreakEven:
    return jobs_pb2.BreakEven(**asdict(found))
