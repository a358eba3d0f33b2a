from __future__ import annotations

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lathe.common.errors import FailedPrecondition
from lathe.engine.distributed.fit import (
    Footprint,
    ShardBase,
    check_choice,
    check_shard,
    footprint,
    serving_note,
    wants_shards,
)
from lathe.engine.distributed.joining import is_sharded, told
from lathe.engine.full import parameters
from lathe.engine.settings import EngineSettings
from lathe.engine.spec import DecoderSpec
from tests.fixtures.gang import Together
from tests.unit.engine.conftest import CONFIG

NEED = Footprint(whole=800, shard=400, gathered=100)


@pytest.mark.parametrize(
    ("choice", "free", "world", "sharded"),
    [
        ("auto", 1000, 2, False),
        ("auto", 999, 2, True),
        ("auto", None, 2, False),
        ("auto", 10, 1, False),
        ("always", 10_000, 2, True),
        ("always", 10_000, 1, False),
        ("never", 10, 2, False),
    ],
)
def test_a_base_is_sharded_when_it_does_not_fit(
    choice: ShardBase, free: int | None, world: int, sharded: bool
) -> None:
    assert wants_shards(choice, NEED, free, world=world, nf4=False) is sharded


@pytest.mark.parametrize("wishes", [(False, False, False), (False, True, False), (True, False, False)])
def test_the_rank_with_the_least_room_decides_for_all(wishes: tuple[bool, ...]) -> None:
    group = Together(len(wishes))
    with ThreadPoolExecutor(len(wishes)) as ranks:
        answers = list(ranks.map(lambda wish: is_sharded(wish, group, torch.device("cpu")), wishes))
    assert answers == [any(wishes)] * len(wishes)


def test_four_bits_are_never_sharded() -> None:
    assert not wants_shards("auto", NEED, 10, world=2, nf4=True)
    check_choice("auto", nf4=True)
    with pytest.raises(FailedPrecondition, match="nf4"):
        check_choice("always", nf4=True)


def test_a_share_that_does_not_fit_is_refused_with_numbers() -> None:
    need = Footprint(whole=140_000_000_000, shard=70_000_000_000, gathered=6_000_000_000)
    check_shard(need, 76_000_000_000, world=2)
    check_shard(need, None, world=2)
    with pytest.raises(
        FailedPrecondition, match=r"takes 140 GB.*over 2 workers.*70 GB.*6 GB more.*75 GB are free"
    ):
        check_shard(need, 75_000_000_000, world=2)


def test_the_user_is_told_what_serving_the_result_takes() -> None:
    note = serving_note(Footprint(140_000_000_000, 35_000_000_000, 6_000_000_000), world=4)
    assert note.kind == "sharded"
    assert "takes 140 GB and is sharded over the 4 workers" in note.message
    assert "a worker with 175 GB free" in note.message


@pytest.mark.parametrize("tied", [True, False])
def test_the_footprint_counts_every_weight(tied: bool) -> None:
    spec = DecoderSpec.from_config(CONFIG | {"tie_word_embeddings": tied})
    count = parameters(spec)[-1].stop
    need = footprint(spec, 2, 3, packed=False, nf4=False)
    assert need.whole == 2 * count
    assert need.shard == -(-2 * count // 3)
    assert footprint(spec, 2, 3, packed=True, nf4=False).whole > 2 * need.whole * 0.9
    assert footprint(spec, 2, 3, packed=False, nf4=True).whole < need.whole


def test_the_other_ranks_are_told_everything_but_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = {"kind": "s3", "endpoint": "s3:8333", "bucket": "b", "access_key": "sesame", "secret_key": "hush"}
    settings = EngineSettings.model_validate(
        {
            "engine_id": "e", "base_model": "m", "base_digest": "d", "jobs_address": "j:1",
            "store": store, "cache_folder": tmp_path, "workers": 2, "shard_base": "always", "dtype": "float32",
        }
    )  # fmt: skip

    rank = told(settings)

    assert (rank.shard_base, rank.world) == ("always", 2)
    assert not {b"sesame", b"hush"} & set(re.findall(rb"[a-z]+", pickle.dumps(rank)))
    monkeypatch.setenv("LATHE_STORE__ACCESS_KEY", "its own")
    monkeypatch.setenv("LATHE_ENGINE_STORE__SECRET_KEY", "secret")
    monkeypatch.setenv("LATHE_ENGINE_JOBS_ADDRESS", "none of its business")
    own = rank.own_store()
    assert own.endpoint == "s3:8333"
    assert own.access_key == "its own"
    assert own.secret_key is not None and own.secret_key.get_secret_value() == "secret"
