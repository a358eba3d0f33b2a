"""What jobs says to an engine and an engine to jobs: one meaning on both sides of the contract."""

from dataclasses import replace

import pytest

from lathe.common.errors import Unimplemented
from lathe.engine import jobs_client
from lathe.engine.model import Dpo, Kto, Orpo, StepMetrics, Supervised
from lathe.engine.model import Method as EngineMethod
from lathe.jobs import hyperparameters, protos, trainingprotos
from lathe.jobs.model import DatasetRef, Job
from lathe.jobs.training import Method, TrainingSpec
from lathe.v1 import worker_pb2
from tests.fakes.clock import FakeClock
from tests.fakes.jobs import BASE


def told(spec: TrainingSpec) -> worker_pb2.TrainingConfig:
    """What an engine is told of a job that asked for `spec`."""
    job = Job("j", "acme", "tiny", BASE, DatasetRef("f"), 7, FakeClock().now(), spec=spec)
    return trainingprotos.config_pb(replace(job, hyperparameters=hyperparameters.resolve(spec, BASE, 100)))


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        (TrainingSpec(), Supervised()),
        (TrainingSpec(method=Method.DPO), Dpo()),
        (TrainingSpec(method=Method.DPO, beta=0.3, loss_type="ipo"), Dpo(0.3, "ipo")),
        (TrainingSpec(method=Method.DPO, label_smoothing=0.1), Dpo(label_smoothing=0.1)),
        (TrainingSpec(method=Method.ORPO, beta=0.2), Orpo(0.2)),
        (TrainingSpec(method=Method.KTO, undesirable_weight=1.5), Kto(undesirable_weight=1.5)),
    ],
)
def test_a_method_reaches_the_engine(spec: TrainingSpec, method: EngineMethod) -> None:
    assert jobs_client.config_from(told(spec)).method == method


def test_every_setting_reaches_the_engine() -> None:
    spec = TrainingSpec(
        n_epochs=2,
        batch_size=5,
        learning_rate_multiplier=0.5,
        lora_r=4,
        lora_alpha=3.0,
        target_modules=("v_proj",),
        lora_dropout=0.25,
        use_rslora=True,
        use_dora=True,
        schedule="constant",
        warmup_fraction=0.3,
        weight_decay=0.02,
        max_grad_norm=0.7,
        early_stopping_patience=3,
        eval_every=11,
        keep_checkpoints=6,
        sample_prompts=2,
    )
    config = jobs_client.config_from(told(spec))
    for name in ("method", "learning_rate_multiplier", "full_parameter"):
        spec = replace(spec, **{name: None})
    asked = {name: getattr(spec, name) for name in spec.__dataclass_fields__}
    assert {name: getattr(config, name) for name, value in asked.items() if value is not None} == {
        name: value for name, value in asked.items() if value is not None
    }
    assert (config.seed, config.base_model) == (7, "baseModels/tiny")
    assert config.learning_rate == 0.5 * hyperparameters.base_learning_rate(BASE.parameter_count)


def test_what_an_earlier_jobs_leaves_out_is_as_it_was_then() -> None:
    config = jobs_client.config_from(worker_pb2.TrainingConfig(n_epochs=1, batch_size=1))
    assert (config.method, config.schedule, config.full_parameter) == (Supervised(), "cosine", False)


@pytest.mark.parametrize("field", ["method", "schedule"])
def test_what_the_engine_does_not_know_is_not_guessed(field: str) -> None:
    with pytest.raises(Unimplemented, match="'telepathy'"):
        jobs_client.config_from(worker_pb2.TrainingConfig(**{field: "telepathy"}))


def test_figures_of_a_step_reach_jobs() -> None:
    row = StepMetrics(1, 2, 0.5, 0.5, 1e-3, 10.0, 7, 1.0, 0.1, 1, figures={"rewards/margins": 0.25})
    request = worker_pb2.ReportProgressRequest(metrics=[jobs_client.metrics_pb(row)], total_steps=2)
    [found] = protos.progress_of(request).metrics
    assert found.figures == {"rewards/margins": 0.25}
