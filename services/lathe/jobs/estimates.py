"""What a job will take, by what was measured and, where nothing was, by published rules. Pure; docs/estimates.md.

The work of a token is counted in forward passes. One takes 2 N operations for N parameters, and the pass backward
twice as many (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); with an adapter the half of it that is the gradients
of the weights is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs.figures import (
    Basis,
    BreakEven,
    EngineEstimate,
    JobEstimate,
    Prices,
    Range,
    ReplacedPrompt,
    Speed,
    Tokens,
    Work,
)
from lathe.jobs.training import Hyperparameters, Method

# Of what is on record, the last so many attempts speak for the next one.
RECENT = 20
# Rows are of other lengths and machines have other company: a measured rate is not trusted more closely.
MEASURED_SPREAD = 1.25
SCALED_SPREAD = 2.0
RULE_SPREAD = 4.0
# Forward passes beside the one that is trained: DPO's reference, and for KTO its reference and its mismatched rows with
# both models.
_EXTRA_PASSES = {Method.SUPERVISED: 0.0, Method.ORPO: 0.0, Method.DPO: 1.0, Method.KTO: 3.0}
# Operations a second that training sustains, of one thread of a CPU: half of what AVX2 does in float32 at 3 GHz (two
# units of 8 sums and products); with instructions for bfloat16, 0.46 of the 3.7e11 that were measured of products of a
# model's own shapes (docs/benchmarks.md); about their geometric mean where nobody knows.
_CPU_THREAD_FLOPS = {False: 5e10, True: 1.7e11, None: 1e11}
# Of a GPU: 0.4 of the 312 TFLOP/s of an A100 (PaLM, arXiv:2204.02311, table 3 has 0.2 to 0.46 for large models).
_GPU_FLOPS = 1.25e14
# Bytes a parameter: bfloat16 on a GPU; on a CPU float32, or bfloat16 in two layouts, one for each direction. For a
# trained one, gradient and AdamW in mixed precision (ZeRO, arXiv:1910.02054, section 3.1).
_GPU_WEIGHT_BYTES, _CPU_WEIGHT_BYTES = 2, 4
_TRAINED_BYTES = 16
# An adapter at this rank on every linear layer: r (in + out) for each, which are 19 r h a layer beside its 12 h^2.
_RANK = 16
# Activations of a layer take 34 bytes a token and hidden unit (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1,
# without the scores of attention, which is fused).
_ACTIVATION_BYTES = 34
# N = 12 L h^2 with h = 96 L (Kaplan et al., eq. 2.2, and a usual shape).
_ASPECT = 96
# The engines' own slices (train_tokens_per_slice), by device.
_PASS_TOKENS = {"cpu": 320, "cuda": 8192}
HOURS_PER_MONTH = 730


@dataclass(frozen=True, slots=True)
class Engines:
    """The engines of one class. device and threads: of those there are or were, `` and 0 where there never was one.

    wait: seconds until one of them takes the job. bfloat16: whether their CPUs have instructions for it. None: unknown.
    """

    engine_class: str
    device: str = ""
    threads: int = 0
    wait: float | None = None
    bfloat16: bool | None = None


# --- tokens -------------------------------------------------------------------------------------------------------


def tokens_of(
    chosen: Hyperparameters,
    *,
    examples: int,
    tokens: int,
    trained: int,
    max_row: int,
    steps: int,
    validation_examples: int = 0,
    validation_tokens: int = 0,
) -> Tokens:
    """The job's work, from what the audits counted."""
    return Tokens(
        examples=examples,
        n_epochs=chosen.n_epochs,
        batch_size=chosen.batch_size,
        steps=steps,
        per_epoch=tokens,
        trained_per_epoch=trained,
        validation=_validated(chosen, steps, validation_examples, validation_tokens),
        max_row=max_row,
    )


def _validated(chosen: Hyperparameters, steps: int, examples: int, tokens: int) -> int:
    """The whole file at each epoch's end; between, a batch of it, or all of it where early stopping asks for that."""
    if not examples:
        return 0
    between = steps // max(1, chosen.eval_every)
    part = tokens * min(1.0, chosen.batch_size / examples)
    return round(chosen.n_epochs * tokens + between * (tokens if chosen.early_stopping_patience else part))


# --- seconds ------------------------------------------------------------------------------------------------------


def passes(method: str, *, full_parameter: bool) -> float:
    """The work of training one token, in forward passes of it."""
    return (3.0 if full_parameter else 2.0) + _EXTRA_PASSES[Method(method)]


def rate(work: Work, engines: Engines, measured: Sequence[Speed]) -> Range | None:
    """Tokens a second. None for a class that has no measurement and no engine: its device is not known then.

    measured: of any job, newest first.
    """
    alike = [one for one in measured if one.engine_class == engines.engine_class and _counts(one)]
    same = [one for one in alike if one.work == work][:RECENT]
    if same:
        return _spread([one.tokens / one.seconds for one in same], _mean_rate(same), Basis.MEASURED)
    if alike:
        near = _nearest(work, alike)
        rates = [one.tokens / one.seconds * _ratio(one.work, work) for one in near]
        return _spread(rates, math.exp(math.fsum(map(math.log, rates)) / len(rates)), Basis.SCALED)
    flops = _rule_flops(engines)
    if flops is None:
        return None
    likely = flops * work.workers / _token_flops(work)
    return Range(likely / RULE_SPREAD, likely, likely * RULE_SPREAD, Basis.RULE)


def _counts(one: Speed) -> bool:
    return one.tokens >= 1 and one.seconds > 0


def _mean_rate(same: Sequence[Speed]) -> float:
    return math.fsum(one.tokens for one in same) / math.fsum(one.seconds for one in same)


def _spread(rates: Sequence[float], likely: float, basis: Basis) -> Range:
    wide = MEASURED_SPREAD if basis is Basis.MEASURED else SCALED_SPREAD
    return Range(min(likely / wide, *rates), likely, max(likely * wide, *rates), basis)


def _nearest(work: Work, measured: Sequence[Speed]) -> Sequence[Speed]:
    """Those that differ in the fewest things: another method scales better than another model does."""

    def distance(one: Speed) -> tuple[bool, bool, bool]:
        its = one.work
        return (
            its.base_digest != work.base_digest,
            its.workers != work.workers,
            (its.method, its.full_parameter) != (work.method, work.full_parameter),
        )

    least = min(map(distance, measured))
    return [one for one in measured if distance(one) == least][:RECENT]


def _token_flops(work: Work) -> float:
    return 2.0 * max(1, work.parameters) * passes(work.method, full_parameter=work.full_parameter)


def _ratio(measured: Work, wanted: Work) -> float:
    """How much faster the wanted work goes: by the operations of its token and by its workers."""
    return _token_flops(measured) / _token_flops(wanted) * wanted.workers / measured.workers


def _rule_flops(engines: Engines) -> float | None:
    if not engines.device:
        return None
    if engines.device.startswith("cuda"):
        return _GPU_FLOPS
    return _CPU_THREAD_FLOPS[engines.bfloat16] * max(1, engines.threads)


def seconds(tokens: Tokens, work: Work, speed: Range) -> Range:
    """From the first step to the last. Validation is the forward pass of training alone."""
    share = 1 / passes(work.method, full_parameter=work.full_parameter)
    amount = tokens.all + tokens.validation * share
    return Range(amount / speed.high, amount / speed.likely, amount / speed.low, speed.basis)


# --- memory -------------------------------------------------------------------------------------------------------


def memory(tokens: Tokens, work: Work, engines: Engines, measured: Sequence[Speed]) -> Range:
    """Bytes of the weights and the heaviest slice, on one worker.

    A slice's bytes are in proportion to its tokens, and a row is never cut: a longer row than was measured takes more.
    """
    same = [
        one
        for one in measured
        if one.engine_class == engines.engine_class and one.work == work and one.held_bytes
    ][:RECENT]
    whole = [one for one in same if one.pass_bytes and one.pass_tokens]
    if whole:
        found = [
            one.held_bytes + one.pass_bytes * max(1.0, tokens.max_row / one.pass_tokens) for one in whole
        ]
        return Range(min(found), max(found), max(found) * MEASURED_SPREAD, Basis.MEASURED)
    rule = _weights(work, engines.device) + _activations(tokens, work, engines.device)
    return Range(rule / RULE_SPREAD, rule, rule * RULE_SPREAD, Basis.RULE)


def _shape(work: Work) -> tuple[float, float]:
    """Layers and width of a model of so many parameters."""
    layers: float = (max(1, work.parameters) / (12 * _ASPECT**2)) ** (1 / 3)
    return layers, _ASPECT * layers


def _weights(work: Work, device: str) -> float:
    share = 1.0 if work.full_parameter else min(1.0, 19 * _RANK / (12 * _shape(work)[1]))
    held = _GPU_WEIGHT_BYTES if device.startswith("cuda") else _CPU_WEIGHT_BYTES
    return held * work.parameters + _TRAINED_BYTES * share * work.parameters


def _activations(tokens: Tokens, work: Work, device: str) -> float:
    layers, width = _shape(work)
    slice_tokens = max(
        tokens.max_row, min(_PASS_TOKENS.get(device, 8192), tokens.batch_size * tokens.max_row)
    )
    return _ACTIVATION_BYTES * layers * width * slice_tokens


# --- all of it ----------------------------------------------------------------------------------------------------


def job_estimate(
    tokens: Tokens, work: Work, classes: Sequence[Engines], measured: Sequence[Speed], prices: Prices
) -> JobEstimate:
    """On each of the classes. measured: newest first."""
    return JobEstimate(
        examples=tokens.examples,
        n_epochs=tokens.n_epochs,
        batch_size=tokens.batch_size,
        steps=tokens.steps,
        tokens_per_epoch=tokens.per_epoch,
        tokens=tokens.all,
        trained_tokens=tokens.trained_per_epoch * tokens.n_epochs,
        validation_tokens=tokens.validation,
        engines=tuple(_on(tokens, work, engines, measured, prices.engine_hour) for engines in classes),
        currency=prices.currency,
        hosting_price_per_hour=prices.hosting_hour,
    )


def _on(
    tokens: Tokens,
    work: Work,
    engines: Engines,
    measured: Sequence[Speed],
    engine_hour: Mapping[str, float],
) -> EngineEstimate:
    speed = rate(work, engines, measured)
    taken = seconds(tokens, work, speed) if speed is not None else None
    hour = engine_hour.get(engines.engine_class)
    return EngineEstimate(
        engine_class=engines.engine_class,
        workers=work.workers,
        device=engines.device,
        tokens_per_second=speed.likely if speed is not None else 0.0,
        seconds=taken,
        memory_bytes=memory(tokens, work, engines, measured),
        queue_seconds=engines.wait,
        price=_times(taken, hour * work.workers / 3600) if taken is not None and hour is not None else None,
    )


def _times(range_: Range, factor: float) -> Range:
    return Range(range_.low * factor, range_.likely * factor, range_.high * factor, range_.basis)


# --- whether it pays ----------------------------------------------------------------------------------------------


def check_replaced(replaced: ReplacedPrompt) -> None:
    """Raise InvalidArgument for numbers that nothing can be reckoned from."""
    wrong = [
        FieldViolation(f"replaces.{name}", f"replaces.{name} is {value}; it must be a number of at least 0.")
        for name, value in (
            ("prompt_tokens_saved", replaced.prompt_tokens_saved),
            ("price_per_million_tokens", replaced.price_per_million_tokens),
            ("seconds_saved", replaced.seconds_saved),
            ("requests_per_hour", replaced.requests_per_hour),
        )
        if value is not None and not (math.isfinite(value) and value >= 0)
    ]
    if replaced.price_per_million_tokens is None and replaced.seconds_saved is None:
        text = "replaces needs price_per_million_tokens (with prompt_tokens_saved) or seconds_saved."
        wrong.append(FieldViolation("replaces", text))
    elif replaced.price_per_million_tokens is not None and not replaced.prompt_tokens_saved:
        text = "replaces.prompt_tokens_saved is required with price_per_million_tokens."
        wrong.append(FieldViolation("replaces.prompt_tokens_saved", text))
    if wrong:
        raise InvalidArgument(" ".join(one.description for one in wrong), violations=wrong)


def break_even(estimate: JobEstimate, replaced: ReplacedPrompt, prices: Prices) -> BreakEven:
    """Fixed costs over what each request contributes: training / (saved - hosting per hour / requests per hour).

    Where the operator has set no price of the engines, seconds of an engine stand for money, without hosting.
    """
    engine = estimate.engines[0]
    hour = prices.engine_hour.get(engine.engine_class)
    if engine.seconds is None:
        return BreakEven(
            None, "How long the training takes is not known: no engine of the class has trained yet."
        )
    if replaced.price_per_million_tokens is None and hour is None:
        saved = replaced.seconds_saved or 0.0
        return _over(engine.seconds.likely * engine.workers, saved, None, replaced, by_seconds=True)
    if engine.price is None or hour is None:
        text = f"The operator has set no price for engines of the class {engine.engine_class}."
        return BreakEven(None, text)
    if replaced.price_per_million_tokens is not None:
        saved = replaced.prompt_tokens_saved * replaced.price_per_million_tokens / 1e6
    else:
        saved = (replaced.seconds_saved or 0.0) * hour / 3600
    return _over(engine.price.likely, saved, prices.hosting_hour, replaced, by_seconds=False)


def _over(
    fixed: float, saved: float, hosting: float | None, replaced: ReplacedPrompt, *, by_seconds: bool
) -> BreakEven:
    reason, net = "", saved
    hosting_requests = hosting / saved if hosting is not None and saved > 0 else None
    if hosting and replaced.requests_per_hour:
        net = saved - hosting / replaced.requests_per_hour
    elif hosting:
        reason = "Hosting is left out: say how many requests come an hour."
    if net <= 0:
        reason = (
            "A request saves no more than its share of hosting." if saved > 0 else "A request saves nothing."
        )
    return BreakEven(
        requests=math.ceil(fixed / net) if net > 0 and math.isfinite(fixed / net) else None,
        reason=reason,
        by_seconds=by_seconds,
        saved_per_request=saved,
        net_saved_per_request=net,
        hosting_requests_per_hour=hosting_requests,
    )
