"""The rules of docs/estimates.md."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.jobs import estimates
from lathe.jobs.estimates import Engines
from lathe.jobs.figures import NO_PRICES, Basis, Prices, Range, ReplacedPrompt, Speed, Tokens, Work
from lathe.jobs.hyperparameters import resolve
from lathe.jobs.machine import has_bfloat16
from lathe.jobs.model import BaseRef
from lathe.jobs.training import TrainingSpec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WORK = Work("d", 1_000_000_000, "supervised")
TOKENS = Tokens(
    examples=100,
    n_epochs=3,
    batch_size=10,
    steps=30,
    per_epoch=10_000,
    trained_per_epoch=2_000,
    validation=0,
    max_row=200,
)
CPU = Engines("default", "cpu", 2, wait=0.0)


def speed(rate: float = 100.0, work: Work = WORK, **fields: object) -> Speed:
    one = Speed("att-1", work, "default", "cpu", 2, rate * 50, 50.0, 5, NOW)
    return replace(one, **fields)  # type: ignore[arg-type]


def test_what_was_measured_counts_before_all_else() -> None:
    other = speed(9.0, replace(WORK, method="dpo"))
    found = estimates.rate(WORK, CPU, [speed(100.0), speed(300.0), other])
    assert found == Range(100.0, 200.0, 300.0, Basis.MEASURED)


def test_another_method_is_scaled_by_the_passes_of_its_tokens() -> None:
    found = estimates.rate(replace(WORK, method="dpo"), CPU, [speed(300.0)])
    # Two passes beside three.
    assert found is not None and (found.basis, round(found.likely, 6)) == (Basis.SCALED, 200.0)


def test_another_model_is_scaled_by_its_parameters_and_workers() -> None:
    larger = Work("e", 4_000_000_000, "supervised", workers=2)
    found = estimates.rate(larger, CPU, [speed(100.0)])
    assert found is not None and (found.basis, round(found.likely, 6)) == (Basis.SCALED, 50.0)


def test_the_same_model_says_more_than_another_one() -> None:
    wanted = replace(WORK, method="dpo")
    found = estimates.rate(wanted, CPU, [speed(1.0, replace(wanted, base_digest="e")), speed(300.0)])
    assert found is not None and round(found.likely) == 200


def test_measurements_of_another_class_say_nothing() -> None:
    measured = [speed(100.0, engine_class="gpu")]
    found = estimates.rate(WORK, CPU, measured)
    assert found is not None and found.basis is Basis.RULE
    assert estimates.rate(WORK, Engines("default"), measured) is None


def test_the_rule_is_six_operations_for_each_parameter_of_full_training() -> None:
    found = estimates.rate(replace(WORK, full_parameter=True), Engines("default", "cuda", 1), [])
    assert found is not None and found.likely * 6 * WORK.parameters == pytest.approx(1.25e14)


def test_validation_is_a_forward_pass() -> None:
    taken = estimates.seconds(replace(TOKENS, validation=10_000), WORK, Range(50, 100, 200, Basis.MEASURED))
    # 30,000 trained and half of 10,000, at 100 a second.
    assert (taken.low, taken.likely, taken.high, taken.basis) == (175, 350, 700, Basis.MEASURED)


def test_the_validation_file_counts_once_an_epoch_and_a_batch_between() -> None:
    chosen = resolve(
        TrainingSpec(n_epochs=2, batch_size=10, eval_every=5), BaseRef("b", "d", 10**9), examples=100
    )

    def validated(**changed: object) -> int:
        return estimates.tokens_of(
            replace(chosen, **changed),  # type: ignore[arg-type]
            examples=100,
            tokens=1000,
            trained=10,
            max_row=20,
            steps=20,
            validation_examples=40,
            validation_tokens=400,
        ).validation

    assert validated() == 2 * 400 + 4 * 100
    assert validated(early_stopping_patience=1) == 2 * 400 + 4 * 400


def test_memory_is_what_was_measured_and_more_for_a_longer_row() -> None:
    known = speed(held_bytes=1000, pass_bytes=100, pass_tokens=400)
    assert estimates.memory(TOKENS, WORK, CPU, [known]).likely == 1100
    longer = estimates.memory(replace(TOKENS, max_row=800), WORK, CPU, [known])
    assert (longer.likely, longer.basis) == (1200, Basis.MEASURED)
    assert estimates.memory(TOKENS, WORK, Engines("gpu"), [known]).basis is Basis.RULE


@pytest.mark.parametrize(("bfloat16", "flops"), [(False, 5e10), (None, 1e11), (True, 1.7e11)])
def test_a_thread_is_faster_with_instructions_for_bfloat16(bfloat16: bool | None, flops: float) -> None:
    found = estimates.rate(WORK, replace(CPU, bfloat16=bfloat16), [])
    assert found is not None and found.likely * 4 * WORK.parameters == pytest.approx(2 * flops)


def test_the_rules_are_near_what_was_measured_of_smollm2() -> None:
    """docs/estimates.md: one idle thread of a CPU with bfloat16, 349 tokens/s; 1.02 GB with a slice of 468 tokens."""
    work = Work("d", 134_515_008, "supervised")
    engines = Engines("default", "cpu", 1, bfloat16=True)
    found = estimates.rate(work, engines, [])
    assert found is not None and 1 / 1.5 < found.likely / 349 < 1.5
    memory = estimates.memory(replace(TOKENS, max_row=468, batch_size=8), work, engines, [])
    assert 1 / 1.5 < memory.likely / 1.022e9 < 1.5


def test_the_rule_of_memory_holds_weights_and_what_adam_keeps() -> None:
    full = estimates.memory(TOKENS, replace(WORK, full_parameter=True), CPU, [])
    adapter = estimates.memory(TOKENS, WORK, CPU, [])
    # r = 16 beside a width of 2000: 1.27 %.
    assert full.likely - adapter.likely == pytest.approx(16e9 * (1 - 0.0127), rel=1e-3)
    assert adapter.likely > 4e9
    on_gpu = estimates.memory(replace(TOKENS, max_row=10_000), WORK, Engines("gpu", "cuda"), [])
    on_cpu = estimates.memory(replace(TOKENS, max_row=10_000), WORK, CPU, [])
    assert on_cpu.likely - on_gpu.likely == pytest.approx(2e9)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16 sse\n", True),
        ("processor : 0\nFeatures : fp asimd bf16\n", True),
        ("flags : fpu avx2\n", False),
        ("processor : 0\n", None),
    ],
)
def test_a_machine_says_whether_it_has_bfloat16(content: str, expected: bool | None, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert has_bfloat16(file) is None
    file.write_text(content)
    assert has_bfloat16(file) is expected


PRICES = Prices("EUR", {"default": 3.6}, hosting_hour=1.0)
BY_TOKENS = ReplacedPrompt(1000, price_per_million_tokens=10.0)


def test_money_is_time_times_price_times_workers() -> None:
    work = replace(WORK, workers=2)
    found = estimates.job_estimate(TOKENS, work, [CPU], [speed(100.0, work)], PRICES)
    assert found.currency == "EUR" and found.engines[0].price is not None
    assert found.engines[0].price.likely == pytest.approx(300 * 2 * 0.001)
    free = estimates.job_estimate(TOKENS, work, [CPU], [speed(100.0, work)], NO_PRICES)
    assert free.engines[0].price is None


def break_even(replaced: ReplacedPrompt, prices: Prices = PRICES, work: Work = WORK) -> estimates.BreakEven:
    found = estimates.job_estimate(TOKENS, work, [CPU], [speed(100.0, work)], prices)
    return estimates.break_even(found, replaced, prices)


def test_tuning_pays_when_what_requests_save_is_what_training_cost() -> None:
    # 300 s at 0.001 are 0.3; a request saves 0.01.
    found = break_even(BY_TOKENS)
    assert (found.requests, found.saved_per_request) == (30, 0.01)
    assert "Hosting is left out" in found.reason and found.hosting_requests_per_hour == 100
    assert break_even(replace(BY_TOKENS, requests_per_hour=200)).requests == 60
    never = break_even(replace(BY_TOKENS, requests_per_hour=100))
    assert never.requests is None and "share of hosting" in never.reason


def test_without_a_price_seconds_of_the_engine_stand_for_money() -> None:
    found = break_even(ReplacedPrompt(seconds_saved=0.5), NO_PRICES)
    assert (found.requests, found.by_seconds) == (600, True)
    by_two = break_even(ReplacedPrompt(seconds_saved=0.5), NO_PRICES, replace(WORK, workers=2))
    assert by_two.requests == 1200
    assert break_even(ReplacedPrompt(seconds_saved=0.0), NO_PRICES).requests is None
    no_price = break_even(BY_TOKENS, NO_PRICES)
    assert no_price.requests is None and "set no price" in no_price.reason


@pytest.mark.parametrize(
    ("replaced", "field"),
    [
        (ReplacedPrompt(1000), "replaces"),
        (ReplacedPrompt(0, price_per_million_tokens=1.0), "replaces.prompt_tokens_saved"),
        (ReplacedPrompt(seconds_saved=-1.0), "replaces.seconds_saved"),
        (ReplacedPrompt(seconds_saved=math.nan), "replaces.seconds_saved"),
        (ReplacedPrompt(seconds_saved=1.0, requests_per_hour=math.inf), "replaces.requests_per_hour"),
    ],
)
def test_what_says_too_little_is_named(replaced: ReplacedPrompt, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        estimates.check_replaced(replaced)
    assert [one.field for one in raised.value.violations] == [field]


works = st.builds(
    Work,
    st.sampled_from(["d", "e"]),
    st.integers(0, 10**12),
    st.sampled_from(["supervised", "dpo", "orpo", "kto"]),
    st.booleans(),
    st.integers(1, 8),
)
sizes = st.integers(0, 10**12)
speeds = st.builds(
    lambda work, rate, held, longest: speed(
        rate, work, held_bytes=held, pass_bytes=held, pass_tokens=longest
    ),
    works,
    st.floats(0, 1e9),
    sizes,
    st.integers(0, 10**5),
)


@given(works, st.lists(speeds, max_size=6), sizes, st.integers(1, 10**5))
def test_every_range_is_in_order_and_more_work_takes_longer(
    work: Work, measured: list[Speed], per_epoch: int, max_row: int
) -> None:
    tokens = replace(TOKENS, per_epoch=per_epoch, max_row=max_row)
    engine = estimates.job_estimate(tokens, work, [CPU], measured, PRICES).engines[0]
    more = replace(tokens, per_epoch=per_epoch * 2 + 1)
    longer = estimates.job_estimate(more, work, [CPU], measured, PRICES).engines[0]
    for found in (engine.seconds, engine.memory_bytes, engine.price):
        assert found is not None and 0 <= found.low <= found.likely <= found.high < math.inf
    assert engine.seconds is not None and longer.seconds is not None
    assert longer.seconds.likely > engine.seconds.likely


@given(st.floats(1e-6, 1e6), st.floats(0.01, 1e6), st.floats(0, 100), st.floats(0, 1e5))
def test_at_the_break_even_savings_are_no_less_than_costs(
    saved_tokens: float, price: float, hosting: float, per_hour: float
) -> None:
    prices = replace(PRICES, hosting_hour=hosting)
    found = break_even(ReplacedPrompt(saved_tokens, price, requests_per_hour=per_hour), prices)
    if found.requests is not None:
        cost = 0.3
        assert found.requests * found.net_saved_per_request >= cost * (1 - 1e-9)
        assert (found.requests - 1) * found.net_saved_per_request <= cost * (1 + 1e-9)
