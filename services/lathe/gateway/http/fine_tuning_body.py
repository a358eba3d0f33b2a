"""POST /v1/fine_tuning/jobs: OpenAI's JSON to proto. Pure."""

from typing import Annotated, Any, Literal, TypeVar

from google.protobuf.message import Message
from pydantic import Field, field_validator

from lathe.common.names import DATASET, PROJECT
from lathe.gateway.http.errors import invalid, unsupported
from lathe.gateway.http.requests import Model
from lathe.v1 import jobs_pb2 as pb

M = TypeVar("M", bound=Message)


class Chosen(Model):
    """Settings that Lathe chooses where they are not given: "auto", null and absent mean the same."""

    @field_validator("*", mode="before")
    @classmethod
    def _auto(cls, value: object) -> object:
        return None if value == "auto" else value


Beta = Annotated[float, Field(gt=0, le=2)] | None
Weight = Annotated[float, Field(gt=0, le=100)] | None


class Hyperparameters(Chosen):
    n_epochs: Annotated[int, Field(ge=1, le=50)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=256)] | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | None = None


class DpoHyperparameters(Hyperparameters):
    """loss_type and label_smoothing are Lathe's own."""

    beta: Beta = None
    loss_type: Literal["sigmoid", "ipo"] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None


class OrpoHyperparameters(Hyperparameters):
    beta: Beta = None


class KtoHyperparameters(Hyperparameters):
    batch_size: Annotated[int, Field(ge=2, le=256)] | None = None
    beta: Beta = None
    desirable_weight: Weight = None
    undesirable_weight: Weight = None


class Lora(Chosen):
    """Lathe's own: PEFT's LoraConfig."""

    r: Annotated[int, Field(ge=1, le=256)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    target_modules: list[str] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None


class Supervised(Model):
    hyperparameters: Hyperparameters | None = None
    lora: Lora | None = None


class Dpo(Model):
    hyperparameters: DpoHyperparameters | None = None
    lora: Lora | None = None


class Orpo(Model):
    """Lathe's own, in the shape of OpenAI's methods; so is kto."""

    hyperparameters: OrpoHyperparameters | None = None
    lora: Lora | None = None


class Kto(Model):
    hyperparameters: KtoHyperparameters | None = None
    lora: Lora | None = None


class Method(Model):
    type: Literal["supervised", "dpo", "orpo", "kto", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    orpo: Orpo | None = None
    kto: Kto | None = None
    reinforcement: Any = None


class Training(Chosen):
    """Lathe's own: TrainingOptions of jobs.proto, which has the ranges."""

    full_parameter: bool | None = None
    schedule: str | None = None
    warmup_fraction: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    early_stopping_patience: Annotated[int, Field(ge=0, le=1000)] | None = None
    eval_every: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    keep_checkpoints: Annotated[int, Field(ge=1, le=100)] | None = None
    sample_prompts: Annotated[int, Field(ge=0, le=8)] | None = None


class JobBody(Model):
    """POST /v1/fine_tuning/jobs"""

    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    training: Training | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2147483647)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None


_METHODS: dict[str, type[Message]] = {
    "supervised": pb.SupervisedMethod,
    "dpo": pb.DpoMethod,
    "orpo": pb.OrpoMethod,
    "kto": pb.KtoMethod,
}


# gRPC's fields by OpenAI's names, for errors.
FIELDS = (
    ("job.training_dataset", "training_file"),
    ("job.validation_dataset", "validation_file"),
    *((f"job.{name}", name) for name in ("model", "suffix", "seed", "metadata", "method", "training")),
)


def job_fields(body: JobBody) -> tuple[tuple[str, str], ...]:
    """gRPC's fields by the names that this request used."""
    given = "hyperparameters" if body.hyperparameters is not None else "method.supervised.hyperparameters"
    return (("job.method.supervised.hyperparameters", given), *FIELDS)


def job_request(body: JobBody, project: str, request_id: str) -> pb.CreateJobRequest:
    """Raises Unimplemented for what Lathe does not offer, InvalidArgument for what contradicts itself."""
    _refuse_unsupported(body)
    job = pb.Job(
        model=body.model,
        training_dataset=_dataset(project, body.training_file, "training_file"),
        suffix=body.suffix or "",
        seed=body.seed,
        method=_method(body),
        metadata=body.metadata or {},
    )
    if body.training is not None:
        job.training.CopyFrom(_filled(pb.TrainingOptions(), body.training))
    if body.validation_file is not None:
        job.validation_dataset = _dataset(project, body.validation_file, "validation_file")
    return pb.CreateJobRequest(parent=PROJECT.format(project), job=job, request_id=request_id)


def _refuse_unsupported(body: JobBody) -> None:
    if body.integrations:
        raise unsupported("integrations", "integrations are not supported yet; leave them out.")
    if body.method is None:
        return
    chosen = body.method.type
    if chosen not in _METHODS:
        message = f"method.type '{chosen}' is not supported; choose from {', '.join(_METHODS)}."
        raise unsupported("method.type", message)
    for name in (*_METHODS, "reinforcement"):
        if name != chosen and getattr(body.method, name) is not None:
            raise invalid(f"method.{name}", f"method.{name} does not go with method.type '{chosen}'.")


def _method(body: JobBody) -> pb.Method:
    chosen = body.method.type if body.method is not None else "supervised"
    given = getattr(body.method, chosen) if body.method is not None else None
    numbers = given.hyperparameters if given is not None else None
    if body.hyperparameters is not None and chosen != "supervised":
        message = f"hyperparameters is deprecated: give method.{chosen}.hyperparameters instead."
        raise invalid("hyperparameters", message)
    if numbers is not None and body.hyperparameters is not None:
        message = "hyperparameters is deprecated: give method.supervised.hyperparameters alone."
        raise invalid("hyperparameters", message)
    message_pb: Any = _METHODS[chosen]()
    _filled(message_pb.hyperparameters, numbers or body.hyperparameters)
    _filled(message_pb.lora, given.lora if given is not None else None)
    method = pb.Method()
    getattr(method, chosen).CopyFrom(message_pb)
    return method


def _filled(message: M, given: Model | None) -> M:
    """The message with what is given; null is the same as absent. Fields have the same names on both sides."""
    for name, value in (given.model_dump(exclude_none=True) if given is not None else {}).items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def _dataset(project: str, file_id: str, field: str) -> str:
    if not DATASET.matches(f"projects/{project}/datasets/{file_id}"):
        raise invalid(field, f"Invalid value for '{field}': {file_id[:100]!r} is no file id.")
    return DATASET.format(project, file_id)
