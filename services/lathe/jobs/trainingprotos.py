"""What is asked of training and what it became: messages to models and back. Fields have one name everywhere."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from lathe.common.errors import FieldViolation, InvalidArgument
from lathe.jobs.model import Job
from lathe.jobs.training import Method, TrainingSpec
from lathe.v1 import jobs_pb2, worker_pb2

_METHODS: dict[Method, type[Message]] = {
    Method.SUPERVISED: jobs_pb2.SupervisedMethod,
    Method.DPO: jobs_pb2.DpoMethod,
    Method.ORPO: jobs_pb2.OrpoMethod,
    Method.KTO: jobs_pb2.KtoMethod,
}
# LoraConfig's r is lora_r among all the others.
_LORA_NAMES = {"r": "lora_r"}


def spec(job: jobs_pb2.Job) -> TrainingSpec:
    """What a CreateJob asks for. Raises InvalidArgument for a method that this version does not know."""
    chosen = job.method.WhichOneof("method")
    if chosen is None and job.HasField("method") and job.method.ByteSize():
        text = f"job.method is none of {', '.join(Method)}."
        raise InvalidArgument(text, violations=[FieldViolation("job.method", text)])
    method = Method(chosen or Method.SUPERVISED)
    given = getattr(job.method, method)
    lora = {_LORA_NAMES.get(name, name): value for name, value in _given(given.lora).items()}
    return TrainingSpec(method=method, **_given(given.hyperparameters), **lora, **_given(job.training))


def _given(message: Message) -> dict[str, Any]:
    """The fields that are set; lists as tuples."""
    return {field.name: tuple(value) if field.is_repeated else value for field, value in message.ListFields()}


def method_pb(job: Job) -> jobs_pb2.Method:
    """What auto became, once it is known; what was asked for before."""
    chosen = job.hyperparameters or job.spec
    message = _METHODS[chosen.method]()
    _fill(message.hyperparameters, chosen)  # type: ignore[attr-defined]
    if not chosen.full_parameter:
        _fill(message.lora, chosen)  # type: ignore[attr-defined]
    return jobs_pb2.Method(**{str(chosen.method): message})  # type: ignore[arg-type]


def options_pb(job: Job) -> jobs_pb2.TrainingOptions:
    """As `method_pb`."""
    message = jobs_pb2.TrainingOptions()
    _fill(message, job.hyperparameters or job.spec)
    return message


def _fill(message: Message, values: object) -> None:
    for field in message.DESCRIPTOR.fields:
        value = getattr(values, _LORA_NAMES.get(field.name, field.name))
        if field.is_repeated:
            getattr(message, field.name).extend(value)
        elif value is not None:
            setattr(message, field.name, value)


def config_pb(job: Job) -> worker_pb2.TrainingConfig:
    """What the engine is told. The job has left validation."""
    message = worker_pb2.TrainingConfig(seed=job.seed, base_model=job.base.name)
    for field in message.DESCRIPTOR.fields:
        if field.name in ("seed", "base_model"):
            continue
        value = getattr(job.hyperparameters, field.name)
        if field.is_repeated:
            getattr(message, field.name).extend(value)
        else:
            setattr(message, field.name, value)
    return message
