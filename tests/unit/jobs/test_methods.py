"""Methods, training options, continued tuning, and the rules that choose what a user leaves open."""

import math
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.common.errors import InvalidArgument
from lathe.jobs import hyperparameters, protos, trainingprotos
from lathe.jobs.model import AdapterObject, DatasetRef, Job, JobError, JobState, Outcome
from lathe.jobs.ports import ResolvedModel
from lathe.jobs.requests import JobRequest, check_request
from lathe.jobs.training import Hyperparameters, Method, TrainingSpec, inherit
from lathe.v1 import jobs_pb2, worker_pb2
from tests.fakes.clock import FakeClock
from tests.fakes.jobs import BASE, World

GOOD = JobRequest("acme", "tiny", "file-1")
DPO = TrainingSpec(method=Method.DPO)
KTO = TrainingSpec(method=Method.KTO)
PARENT = TrainingSpec(
    lora_r=8, lora_alpha=16.0, target_modules=("q_proj",), use_rslora=True, lora_dropout=0.1
)


def wrong_fields(spec: TrainingSpec, validation: str = "") -> list[str]:
    with pytest.raises(InvalidArgument) as raised:
        check_request(replace(GOOD, spec=spec, validation=validation))
    return [violation.field for violation in raised.value.violations]


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (replace(DPO, beta=0.0), "job.method.dpo.hyperparameters.beta"),
        (replace(DPO, beta=2.1), "job.method.dpo.hyperparameters.beta"),
        (replace(DPO, loss_type="hinge"), "job.method.dpo.hyperparameters.loss_type"),
        (replace(DPO, label_smoothing=0.5), "job.method.dpo.hyperparameters.label_smoothing"),
        (
            replace(DPO, loss_type="ipo", label_smoothing=0.1),
            "job.method.dpo.hyperparameters.label_smoothing",
        ),
        (TrainingSpec(method=Method.ORPO, beta=math.nan), "job.method.orpo.hyperparameters.beta"),
        (replace(KTO, batch_size=1), "job.method.kto.hyperparameters.batch_size"),
        (replace(KTO, undesirable_weight=0.0), "job.method.kto.hyperparameters.undesirable_weight"),
        (TrainingSpec(lora_dropout=1.0), "job.method.supervised.lora.lora_dropout"),
        (TrainingSpec(full_parameter=True, use_dora=True), "job.method.supervised.lora"),
        (TrainingSpec(schedule="step"), "job.training.schedule"),
        (TrainingSpec(warmup_fraction=1.5), "job.training.warmup_fraction"),
        (TrainingSpec(weight_decay=-0.1), "job.training.weight_decay"),
        (TrainingSpec(max_grad_norm=0.0), "job.training.max_grad_norm"),
        (TrainingSpec(eval_every=0), "job.training.eval_every"),
        (TrainingSpec(keep_checkpoints=0), "job.training.keep_checkpoints"),
        (TrainingSpec(sample_prompts=9), "job.training.sample_prompts"),
        (TrainingSpec(early_stopping_patience=2), "job.training.early_stopping_patience"),
    ],
)
def test_a_wrong_option_is_named(spec: TrainingSpec, path: str) -> None:
    assert path in wrong_fields(spec)


def test_what_validation_needs_is_taken_with_a_validation_file() -> None:
    spec = TrainingSpec(early_stopping_patience=2, sample_prompts=3)
    assert wrong_fields(spec) == ["job.training.early_stopping_patience", "job.training.sample_prompts"]
    check_request(replace(GOOD, spec=spec, validation="file-2"))


def test_fewer_workers_than_one_are_refused_with_the_field() -> None:
    with pytest.raises(InvalidArgument) as raised:
        check_request(replace(GOOD, compute=replace(GOOD.compute, workers=-1)))
    assert [violation.field for violation in raised.value.violations] == ["job.compute.workers"]


# --- rules ---


@pytest.mark.parametrize(
    ("method", "full", "share"),
    [
        (Method.SUPERVISED, False, 1.0),
        (Method.SUPERVISED, True, 1 / 10),
        (Method.ORPO, False, 1 / 4),
        (Method.DPO, False, 1 / 40),
        (Method.DPO, True, 1 / 400),
        (Method.KTO, False, 1 / 40),
    ],
)
def test_the_learning_rate_follows_the_method(method: Method, full: bool, share: float) -> None:
    rate = hyperparameters.auto_learning_rate(method, 10**9, full_parameter=full)
    assert rate == pytest.approx(share * 1.1e-3)


@given(st.integers(1, 256), st.booleans())
def test_the_scale_of_an_adapter_does_not_depend_on_its_rank(rank: int, rslora: bool) -> None:
    chosen = hyperparameters.resolve(TrainingSpec(lora_r=rank, use_rslora=rslora), BASE, 300)
    assert chosen.lora_alpha / (math.sqrt(rank) if rslora else rank) == pytest.approx(2.0)


@given(st.sampled_from(Method), st.integers(10, 10**6), st.booleans())
def test_what_is_chosen_could_have_been_asked_for(method: Method, examples: int, full: bool) -> None:
    spec = TrainingSpec(method=method, full_parameter=full)
    chosen = hyperparameters.resolve(spec, BASE, examples)
    asked = {name: value for name, value in asdict(chosen).items() if name != "learning_rate" and value}
    if full:
        asked = {name: value for name, value in asked.items() if name not in ("lora_r", "lora_alpha")}
    again = TrainingSpec(**asked)
    check_request(replace(GOOD, spec=again))
    assert hyperparameters.resolve(again, BASE, examples) == chosen


def test_every_option_has_one_name_everywhere() -> None:
    """What is asked, what it becomes, what the engine is told, and the messages: the same fields."""
    asked, chosen = ({field.name for field in fields(one)} for one in (TrainingSpec, Hyperparameters))
    assert chosen - asked == {"learning_rate"} and asked <= chosen
    told = {field.name for field in worker_pb2.TrainingConfig.DESCRIPTOR.fields}
    assert told - chosen == {"seed", "base_model"}
    assert chosen - told == {"learning_rate_multiplier"}


# --- over the wire ---


def request_of(**method: object) -> jobs_pb2.CreateJobRequest:
    job = jobs_pb2.Job(model="tiny", training_dataset="projects/acme/datasets/file-1")
    job.method.CopyFrom(jobs_pb2.Method(**method))  # type: ignore[arg-type]
    job.training.CopyFrom(jobs_pb2.TrainingOptions(schedule="linear", eval_every=3))
    return jobs_pb2.CreateJobRequest(parent="projects/acme", job=job)


def test_a_method_comes_and_goes_over_the_wire() -> None:
    numbers = jobs_pb2.DpoHyperparameters(n_epochs=2, beta=0.3, loss_type="ipo")
    dpo = jobs_pb2.DpoMethod(hyperparameters=numbers, lora=jobs_pb2.LoraConfig(r=4, use_dora=True))
    request = protos.job_request(request_of(dpo=dpo))
    assert request.spec == TrainingSpec(
        n_epochs=2,
        lora_r=4,
        use_dora=True,
        method=Method.DPO,
        beta=0.3,
        loss_type="ipo",
        schedule="linear",
        eval_every=3,
    )
    job = Job("j", "acme", "tiny", BASE, DatasetRef("f"), 1, FakeClock().now(), spec=request.spec)
    shown = protos.job_pb(job)
    assert shown.method == jobs_pb2.Method(dpo=dpo)
    assert shown.training == jobs_pb2.TrainingOptions(schedule="linear", eval_every=3)
    resolved = replace(job, hyperparameters=hyperparameters.resolve(job.spec, BASE, 100))
    assert protos.job_pb(resolved).method.dpo.hyperparameters.label_smoothing == 0.0
    config = trainingprotos.config_pb(resolved)
    assert (config.method, config.loss_type, config.lora_r, config.use_dora) == ("dpo", "ipo", 4, True)
    assert (config.seed, config.base_model, config.keep_checkpoints) == (1, "baseModels/tiny", 3)


def test_a_method_left_out_is_supervised() -> None:
    assert protos.job_request(request_of()).spec.method is Method.SUPERVISED
    given = request_of(supervised=jobs_pb2.SupervisedMethod())
    assert protos.job_request(given).spec.method is Method.SUPERVISED


def test_a_method_of_a_later_version_is_not_taken_for_supervised() -> None:
    request = request_of()
    # Field 15, which this version does not know.
    request.job.method.MergeFromString(b"\x7a\x00")
    with pytest.raises(InvalidArgument, match=r"job\.method is none of supervised, dpo"):
        protos.job_request(request)


# --- continued tuning ---


def test_an_adapter_hands_its_lora_on() -> None:
    spec = inherit(TrainingSpec(method=Method.DPO, beta=0.2), PARENT)
    assert spec == replace(PARENT, method=Method.DPO, beta=0.2)
    assert inherit(TrainingSpec(lora_dropout=0.0), PARENT).lora_dropout == 0.0
    assert inherit(replace(PARENT), PARENT) == PARENT


def test_whole_weights_are_trained_whole_again() -> None:
    parent = TrainingSpec(full_parameter=True)
    assert inherit(DPO, parent) == replace(DPO, full_parameter=True)
    for spec in (TrainingSpec(full_parameter=False), TrainingSpec(lora_r=4)):
        with pytest.raises(InvalidArgument, match="are trained again"):
            inherit(spec, parent)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (TrainingSpec(lora_r=16), "job.method.supervised.lora.r"),
        (TrainingSpec(lora_alpha=8.0), "job.method.supervised.lora.lora_alpha"),
        (TrainingSpec(target_modules=("v_proj",)), "job.method.supervised.lora.target_modules"),
        (TrainingSpec(use_rslora=False), "job.method.supervised.lora.use_rslora"),
        (replace(DPO, use_dora=True), "job.method.dpo.lora.use_dora"),
        (TrainingSpec(full_parameter=True), "job.training.full_parameter"),
    ],
)
def test_another_shape_than_the_adapters_is_refused(spec: TrainingSpec, path: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        inherit(spec, PARENT)
    assert [violation.field for violation in raised.value.violations] == [path]


async def test_a_job_on_a_tuned_model_records_its_parent(world: World) -> None:
    files = AdapterObject("jobs/a/b/final", "0" * 64)
    world.models.models["ft:tiny"] = ResolvedModel(BASE, True, "", tuple(Method), files, PARENT, "ft:tiny")
    job = await world.create(model="ft:tiny", spec=DPO)
    assert (job.parent_model, job.initial_adapter) == ("ft:tiny", files)
    await world.steps.run_once()
    await world.register()
    lease = await world.workers.lease("eng-a")
    assert lease is not None
    attempt = protos.attempt_pb(lease)
    assert (attempt.initial_adapter.prefix, attempt.config.method) == (files.prefix, "dpo")
    assert protos.job_pb(await world.job(job.id)).parent_model == "ft:tiny"


async def test_a_job_whose_parent_was_deleted_says_which_model_that_was(world: World) -> None:
    files = AdapterObject("jobs/a/b/final", "0" * 64)
    world.models.models["ft:tiny"] = ResolvedModel(BASE, True, "", tuple(Method), files, PARENT, "ft:tiny")
    lease = await world.leased(model="ft:tiny")
    gone = JobError("parent_deleted", "There is no adapter at jobs/a/b/final.")
    await world.complete(lease, Outcome.FAILED, error=gone)
    job = await world.job(lease.job.id)
    assert job.state is JobState.FAILED and job.error is not None
    assert (job.error.code, job.error.param) == ("parent_deleted", "model")
    assert "ft:tiny" in job.error.message and job.error.message in (await world.messages(job.id))[-1]


async def test_a_base_model_may_not_offer_a_method(world: World) -> None:
    world.models.models["old"] = ResolvedModel(BASE, True, methods=("supervised",))
    with pytest.raises(InvalidArgument, match="does not offer the method dpo"):
        await world.create(model="old", spec=DPO)


async def test_the_audit_is_for_the_method(world: World) -> None:
    await world.queued(spec=KTO)
    assert world.datasets.audited == [("file-1", "kto")]
    assert set(world.datasets.asked) == {("file-1", False, "")}


async def test_nothing_is_trained_on_a_validation_file(world: World) -> None:
    world.datasets.add("file-2")
    await world.queued(validation="file-2")
    assert world.datasets.audited == [("file-1", "supervised"), ("file-2", "supervised")]
    assert world.datasets.asked == [("file-1", False, "file-2"), ("file-2", True, "")]
