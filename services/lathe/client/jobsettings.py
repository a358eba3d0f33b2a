"""The settings of a job by their names alone: each belongs to one message of the contract, which is found for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from lathe.common.errors import InvalidArgument
from lathe.v1 import jobs_pb2 as pb

METHODS = tuple(field.name for field in pb.Method.DESCRIPTOR.fields)
# LoraConfig's r among all the others.
_RENAMED = {"r": "lora_r"}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_WHOLE = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)


def messages_of(method: str, settings: Mapping[str, Any]) -> tuple[pb.Method, pb.TrainingOptions]:
    """What a CreateJob holds of settings such as `{"beta": 0.2, "use_dora": True, "schedule": "linear"}`.

    Those that are None are left to the rules. Raises InvalidArgument for a method or a setting that there is not.
    """
    places = _places(method)
    chosen, options = pb.Method(), pb.TrainingOptions()
    getattr(chosen, method).SetInParent()
    parts = {"hyperparameters": getattr(chosen, method).hyperparameters, "lora": getattr(chosen, method).lora}
    for name, value in settings.items():
        if value is None:
            continue
        part, field = _found(places, name, method)
        message = parts.get(part, options)
        try:
            if field.is_repeated:
                getattr(message, field.name).extend(value)
            else:
                setattr(message, field.name, value)
        except (TypeError, ValueError) as error:
            # A number of the right kind that the contract's type cannot hold is a ValueError.
            why = "is out of range" if isinstance(error, ValueError) else f"must be {_kind(field)}"
            raise InvalidArgument(f"{name} is {str(value)[:40]!r}; it {why}.") from error
    return chosen, options


def asked_settings(method: str, assignments: Iterable[str], named: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command line by name. assignments: `NAME=VALUE` each. named: options of their own; None where
    one was not given.

    Raises InvalidArgument for a method or a setting that there is not, a wrong value, and a setting given twice.
    """
    settings = {name: value for name, value in named.items() if value is not None}
    for assignment in assignments:
        name, value = parsed(method, assignment)
        if name in settings:
            raise InvalidArgument(f"{name} is given twice; give it once.")
        settings[name] = value
    messages_of(method, settings)
    return settings


def parsed(method: str, assignment: str) -> tuple[str, Any]:
    """A setting from a command line, such as `beta=0.2` or `target_modules=q_proj,v_proj`: its name and value.

    Raises InvalidArgument.
    """
    name, equals, text = assignment.partition("=")
    _, field = _found(_places(method), name, method)
    try:
        return name, _value(field, text)
    except (ValueError, KeyError) as error:
        shown = f"{name} is {text!r}" if equals else f"{name} has no value"
        raise InvalidArgument(f"{shown}; it must be {_kind(field)}.") from error


def setting_paths(method: str) -> dict[str, str]:
    """The paths by which errors of the platform call a method's settings, by the settings' names."""
    parts = {
        "hyperparameters": f"job.method.{method}.hyperparameters",
        "lora": f"job.method.{method}.lora",
        "training": "job.training",
    }
    return {name: f"{parts[part]}.{field.name}" for name, (part, field) in _places(method).items()}


def _kind(field: FieldDescriptor) -> str:
    if field.is_repeated:
        return "a list of texts"
    if field.type in _WHOLE:
        return "a whole number"
    if field.type == field.TYPE_BOOL:
        return "true or false"
    return "a text" if field.type == field.TYPE_STRING else "a number"


def _value(field: FieldDescriptor, text: str) -> Any:
    if field.is_repeated:
        return [part.strip() for part in text.split(",") if part.strip()]
    if field.type == field.TYPE_BOOL:
        return _WORDS[text.lower()]
    if field.type in _WHOLE:
        return int(text)
    return text if field.type == field.TYPE_STRING else float(text)


def _places(method: str) -> dict[str, tuple[str, FieldDescriptor]]:
    if method not in METHODS:
        raise InvalidArgument(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    chosen = getattr(pb.Method(), method)
    parts = {"hyperparameters": chosen.hyperparameters, "lora": chosen.lora, "training": pb.TrainingOptions()}
    return {
        _RENAMED.get(field.name, field.name): (part, field)
        for part, message in parts.items()
        for field in message.DESCRIPTOR.fields
    }


def _found(
    places: Mapping[str, tuple[str, FieldDescriptor]], name: str, method: str
) -> tuple[str, FieldDescriptor]:
    if name not in places:
        raise InvalidArgument(f"{method} has no setting {name!r}; choose from {', '.join(places)}.")
    return places[name]
