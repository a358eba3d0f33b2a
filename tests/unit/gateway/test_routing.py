from __future__ import annotations

from dataclasses import replace

from lathe.gateway.model import EngineInfo
from lathe.gateway.routing import Situation, may_be_deployment, model_behind, pick_engine

A = EngineInfo("eng-a", "a:1", "baseModels/b", "d1", max_sequences=4)
B = EngineInfo("eng-b", "b:1", "baseModels/b", "d1", max_sequences=4)


def test_least_loaded_of_the_right_base() -> None:
    other = replace(B, engine_id="eng-c", base_digest="d2")
    assert pick_engine([replace(A, active_sequences=2), B, other], "d1", None, Situation()) == B
    assert pick_engine([A, B], "d3", None, Situation()) is None
    assert pick_engine([A, B], "d1", None, Situation()) == A


def test_own_calls_count_before_the_list_shows_them() -> None:
    assert pick_engine([A, B], "d1", None, Situation(own_load={"eng-a": 1})) == B


def test_draining_and_suspect_engines_are_left_out() -> None:
    assert pick_engine([replace(A, draining=True), B], "d1", None, Situation()) == B
    assert pick_engine([A, B], "d1", None, Situation(suspects={"eng-a"})) == B
    assert pick_engine([A], "d1", None, Situation(suspects={"eng-a"})) is None


def test_the_engine_that_holds_the_adapter_is_preferred_until_it_is_full() -> None:
    warm = Situation(served_by={"p": "eng-b"})
    assert pick_engine([A, replace(B, active_sequences=1)], "d1", "p", warm) == replace(B, active_sequences=1)
    assert pick_engine([A, replace(B, active_sequences=4)], "d1", "p", warm) == A
    assert pick_engine([A, B], "d1", "q", warm) == A


def test_a_deployment_comes_before_a_model() -> None:
    assert model_behind("x", {"x": "ft:b:p:s:1"}) == "ft:b:p:s:1"
    assert model_behind("y", {"x": "ft:b:p:s:1"}) == "y"
    assert may_be_deployment("x-1.2") and not may_be_deployment("ft:a:b:c:d")
