"""Where a request goes: pure decisions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lathe.gateway.model import EngineInfo

# An engine that holds the adapter already is worth this much more load (share of its sequences).
_WARM_BONUS = 0.5


@dataclass(frozen=True, slots=True)
class Situation:
    """What the gateway knows besides the list: its own open calls per engine, engines whose connection
    failed, and which engine served an adapter last.
    """

    own_load: Mapping[str, int] = field(default_factory=dict)
    suspects: Collection[str] = ()
    served_by: Mapping[str, str] = field(default_factory=dict)


def model_behind(requested: str, deployments: Mapping[str, str]) -> str:
    """The model id a client means: a deployment's id comes first, else it is a model id itself.

    deployments: id -> model id of the caller's project.
    """
    return deployments.get(requested, requested)


def may_be_deployment(requested: str) -> bool:
    """Tuned ids and resource names cannot be deployments': no need to look."""
    return ":" not in requested and "/" not in requested


def load(engine: EngineInfo, situation: Situation) -> float:
    """Sequences per sequence that fits; the list is up to ten seconds old, so our own calls may say more."""
    busy = max(engine.active_sequences, situation.own_load.get(engine.engine_id, 0))
    return busy / max(engine.max_sequences, 1)


def pick_engine(
    engines: Sequence[EngineInfo], base_digest: str, adapter: str | None, situation: Situation
) -> EngineInfo | None:
    """The least loaded engine that serves this base, preferring the one that served this adapter lately.

    Draining engines and suspects are never picked; None when no engine is left.
    """
    fit = [
        engine
        for engine in engines
        if engine.base_digest == base_digest
        and not engine.draining
        and engine.engine_id not in situation.suspects
    ]
    warm = situation.served_by.get(adapter) if adapter is not None else None

    def cost(engine: EngineInfo) -> tuple[float, str]:
        own = load(engine, situation)
        bonus = _WARM_BONUS if engine.engine_id == warm and own < 1 else 0.0
        return own - bonus, engine.engine_id

    return min(fit, key=cost, default=None)
