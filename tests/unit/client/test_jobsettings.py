"""A job's settings by their names alone."""

from typing import Any

import pytest

from lathe.client.jobsettings import asked_settings, messages_of, parsed
from lathe.common.errors import InvalidArgument
from lathe.v1 import jobs_pb2 as pb


def test_each_setting_finds_its_place() -> None:
    settings = {"beta": 0.2, "lora_r": 4, "use_dora": True, "schedule": "linear", "n_epochs": None}
    method, options = messages_of("dpo", settings)
    assert method == pb.Method(
        dpo=pb.DpoMethod(
            hyperparameters=pb.DpoHyperparameters(beta=0.2), lora=pb.LoraConfig(r=4, use_dora=True)
        )
    )
    assert options == pb.TrainingOptions(schedule="linear")
    assert messages_of("kto", {})[0].WhichOneof("method") == "kto"


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("beta=0.2", "beta", 0.2),
        ("n_epochs=3", "n_epochs", 3),
        ("use_rslora=yes", "use_rslora", True),
        ("target_modules=q_proj, v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("loss_type=ipo", "loss_type", "ipo"),
    ],
)
def test_a_command_lines_setting_has_the_contracts_type(given: str, name: str, value: Any) -> None:
    assert parsed("dpo", given) == (name, value)
    messages_of("dpo", {name: value})


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("dpo", "beta=strong", "beta is 'strong'; it must be a number"),
        ("dpo", "n_epochs=1.5", "must be a whole number"),
        ("dpo", "use_dora", "use_dora has no value; it must be true or false"),
        ("supervised", "beta=0.2", "supervised has no setting 'beta'; choose from n_epochs"),
        ("sft", "beta=0.2", "no method 'sft'; choose from supervised, dpo, orpo, kto"),
    ],
)
def test_a_wrong_setting_is_named(method: str, given: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parsed(method, given)


def test_what_set_says_is_kept_beside_options_that_were_not_given() -> None:
    named = {"n_epochs": None, "batch_size": 4, "lora_r": None}
    asked = asked_settings("supervised", ["n_epochs=2", "lora_r=8"], named)
    assert asked == {"n_epochs": 2, "batch_size": 4, "lora_r": 8}


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("supervised", ["batch_size=2"], "batch_size is given twice"),
        ("supervised", ["lora_r=1", "lora_r=2"], "lora_r is given twice"),
        ("supervised", ["n_epochs=99999999999999"], "n_epochs is '99999999999999'; it is out of range"),
        ("ppo", [], "no method 'ppo'; choose from supervised"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_sent(
    method: str, given: list[str], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words):
        asked_settings(method, given, {"batch_size": 4})


def test_a_setting_of_another_type_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"n_epochs is '1\.5'; it must be a whole number"):
        messages_of("supervised", {"n_epochs": 1.5})
