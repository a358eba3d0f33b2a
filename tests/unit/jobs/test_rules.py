"""The pure rules: requests, hyperparameters, sentences, states."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import FailedPrecondition, InvalidArgument
from lathe.jobs import hyperparameters, messages, transitions
from lathe.jobs.model import (
    TERMINAL_STATES,
    DatasetRef,
    Job,
    JobState,
    checkpoint_model_id,
    choose_seed,
    tuned_model_id,
)
from lathe.jobs.ports import FileFinding
from lathe.jobs.requests import JobRequest, check_request
from lathe.jobs.training import TrainingSpec
from lathe.jobs.transitions import Trigger
from tests.fakes.jobs import BASE, measured

GOOD = JobRequest("acme", "tiny", "file-1")
NUMBERS = "job.method.supervised.hyperparameters"


def test_a_good_request_passes() -> None:
    spec = TrainingSpec(50, 256, 0.1, 256, 32.0, ("q_proj",))
    check_request(
        replace(GOOD, suffix="My_model-1", seed=2**31 - 1, spec=spec, metadata={"k" * 64: "v" * 512})
    )


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (replace(GOOD, model=""), "job.model"),
        (replace(GOOD, training=""), "job.training_dataset"),
        (replace(GOOD, suffix="a:b"), "job.suffix"),
        (replace(GOOD, suffix="x" * 65), "job.suffix"),
        (replace(GOOD, seed=-1), "job.seed"),
        (replace(GOOD, seed=2**31), "job.seed"),
        (replace(GOOD, metadata={str(n): "" for n in range(17)}), "job.metadata"),
        (replace(GOOD, metadata={"k" * 65: ""}), "job.metadata"),
        (replace(GOOD, metadata={"k": "v" * 513}), "job.metadata[k]"),
        (replace(GOOD, spec=TrainingSpec(n_epochs=0)), f"{NUMBERS}.n_epochs"),
        (replace(GOOD, spec=TrainingSpec(n_epochs=51)), f"{NUMBERS}.n_epochs"),
        (replace(GOOD, spec=TrainingSpec(batch_size=257)), f"{NUMBERS}.batch_size"),
        (
            replace(GOOD, spec=TrainingSpec(learning_rate_multiplier=0.0)),
            f"{NUMBERS}.learning_rate_multiplier",
        ),
        (
            replace(GOOD, spec=TrainingSpec(learning_rate_multiplier=float("nan"))),
            f"{NUMBERS}.learning_rate_multiplier",
        ),
        (replace(GOOD, spec=TrainingSpec(lora_r=257)), "job.method.supervised.lora.r"),
    ],
)
def test_a_wrong_field_is_named(request_: JobRequest, path: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        check_request(request_)
    assert [violation.field for violation in raised.value.violations] == [path]


@pytest.mark.parametrize(
    ("n", "epochs"), [(10, 10), (33, 3), (34, 3), (1, 25), (5000, 3), (8334, 2), (30000, 1)]
)
def test_auto_epochs_follow_the_published_rule(n: int, epochs: int) -> None:
    assert hyperparameters.auto_n_epochs(n) == epochs


@given(st.integers(1, 10**7))
def test_auto_is_always_within_the_ranges_of_a_request(examples: int) -> None:
    chosen = hyperparameters.resolve(TrainingSpec(), BASE, examples)
    check_request(replace(GOOD, spec=TrainingSpec(chosen.n_epochs, chosen.batch_size)))
    assert chosen.batch_size <= max(1, examples)
    assert hyperparameters.total_steps(chosen, examples) >= chosen.n_epochs


def test_given_hyperparameters_stand() -> None:
    chosen = hyperparameters.resolve(TrainingSpec(1, 4, 2.0, 8), BASE, 300)
    assert (chosen.n_epochs, chosen.batch_size, chosen.lora_r, chosen.lora_alpha) == (1, 4, 8, 16.0)
    assert chosen.learning_rate == 2 * hyperparameters.base_learning_rate(BASE.parameter_count)
    assert chosen.target_modules == BASE.target_modules


@pytest.mark.parametrize(
    ("parameters", "rate"), [(0, 3e-3), (135_000_000, 2.99e-3), (10**9, 1.1e-3), (8 * 10**9, 3.89e-4)]
)
def test_larger_models_learn_with_smaller_steps(parameters: int, rate: float) -> None:
    assert hyperparameters.base_learning_rate(parameters) == pytest.approx(rate, rel=0.01)


def test_model_ids() -> None:
    job = Job(
        "ftjob-" + "0" * 12 + "abcdefghijkl", "acme", "tiny", BASE, DatasetRef("f"), 1, datetime.now(UTC)
    )
    assert tuned_model_id(job) == "ft:tiny:acme::abcdefghijkl"
    named = replace(job, suffix="tickets")
    assert checkpoint_model_id(named, 38) == "ft:tiny:acme:tickets:abcdefghijkl:ckpt-step-38"
    assert choose_seed(job.id) == choose_seed(job.id) != choose_seed(job.id + "x")


def test_step_messages_are_worded_as_openai_words_them() -> None:
    row = measured(3)
    assert messages.step(row).message == "Step 3/10: training loss=1.50"
    full = replace(row, valid_loss=0.123, full_valid_loss=2.0)
    assert messages.step(full).message == (
        "Step 3/10: training loss=1.50, validation loss=0.12, full validation loss=2.00"
    )


def test_results_have_openais_columns() -> None:
    text = messages.results_csv([measured(1), replace(measured(2), valid_loss=0.25)]).decode()
    assert text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,1.5,0.5,,",
        "2,1.5,0.5,0.25,",
    ]


def test_a_file_error_names_the_first_lines() -> None:
    findings = [FileFinding(n, "messages[0].role", "unrecognized_role", f"bad {n}.") for n in range(1, 6)]
    error = messages.file_error("training_file", "file-1", findings, 25)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "25 problems: line 1, messages[0].role: bad 1; line 2" in error.message
    assert "22 more" in error.message
    whole = FileFinding(
        0, "", "invalid_n_examples", "Training file has 7 example(s), but must have at least 10"
    )
    assert messages.file_error("training_file", "file-1", [whole], 1).code == "invalid_n_examples"


def test_nothing_leaves_a_terminal_state() -> None:
    for state in TERMINAL_STATES:
        for trigger in Trigger:
            with pytest.raises(FailedPrecondition):
                transitions.apply(state, trigger)


def test_every_state_has_a_way_to_each_terminal_state() -> None:
    for state in set(JobState) - TERMINAL_STATES - {JobState.CANCELLING}:
        assert _reachable(state) >= TERMINAL_STATES
    assert _reachable(JobState.CANCELLING) == {JobState.CANCELLING, JobState.CANCELLED}


def _reachable(start: JobState) -> set[JobState]:
    seen, edge = {start}, {start}
    while edge:
        edge = {to for (state, _), to in transitions.TABLE.items() if state in edge} - seen
        seen |= edge
    return seen


@given(st.lists(st.sampled_from(list(Trigger)), max_size=40))
def test_any_sequence_of_triggers_keeps_to_the_table(triggers: list[Trigger]) -> None:
    state = JobState.VALIDATING_FILES
    for trigger in triggers:
        if transitions.allowed(state, trigger):
            assert state not in TERMINAL_STATES
            state = transitions.apply(state, trigger)
    # Whatever happened, a cancel ends it: at once or when the attempt ends.
    if transitions.allowed(state, Trigger.CANCEL):
        state = transitions.apply(state, Trigger.CANCEL)
        if state is JobState.CANCELLING:
            state = transitions.apply(state, Trigger.LEASE_LOST)
    assert state in TERMINAL_STATES or state is JobState.CANCELLING


def test_every_trigger_is_used_and_shown() -> None:
    assert {trigger for _, trigger in transitions.TABLE} == set(Trigger) == set(transitions.MEANINGS)
    assert len(transitions.markdown().splitlines()) == len(transitions.TABLE) + 4
