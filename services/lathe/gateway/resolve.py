"""What a client's `model` means, remembered for a few seconds."""

from __future__ import annotations

from collections import OrderedDict

from lathe.common.clock import Clock
from lathe.common.errors import NotFound
from lathe.common.rpc.principal import Principal
from lathe.gateway.model import ServedModel
from lathe.gateway.ports import DeploymentStore, ModelResolver
from lathe.gateway.routing import may_be_deployment, model_behind

_MAX_CACHED = 10_000


class ModelDirectory:
    """Deployment id first, then model id. Only what was found is remembered, for `cache_s` seconds."""

    def __init__(
        self, models: ModelResolver, deployments: DeploymentStore, clock: Clock, cache_s: float = 5.0
    ) -> None:
        self._models = models
        self._deployments = deployments
        self._clock = clock
        self._cache_s = cache_s
        self._known: OrderedDict[tuple[str, str], tuple[float, ServedModel]] = OrderedDict()

    async def resolve(self, principal: Principal, requested: str) -> ServedModel:
        """Raises NotFound, alike for what does not exist and what is another project's; Unavailable."""
        key = (principal.project, requested)
        until, found = self._known.get(key, (0.0, None))
        if found is not None and self._clock.monotonic() < until:
            return found
        until = self._clock.monotonic() + self._cache_s
        found = await self._look_up(principal, requested)
        self._known[key] = (until, found)
        self._known.move_to_end(key)
        while len(self._known) > _MAX_CACHED:
            self._known.popitem(last=False)
        return found

    async def _look_up(self, principal: Principal, requested: str) -> ServedModel:
        aliases: dict[str, str] = {}
        if may_be_deployment(requested):
            name = f"projects/{principal.project}/deployments/{requested}"
            deployment = await self._deployments.get(name)
            if deployment is not None:
                aliases[requested] = deployment.model_id
        try:
            return await self._models.resolve(principal, model_behind(requested, aliases))
        except NotFound as error:
            raise NotFound(
                f"The model {requested!r} does not exist, or this key has no access to it; `lathe models list`, or GET "
                "/v1/models, shows those there are.",
                reason="MODEL_NOT_FOUND",
                metadata={"model": requested},
            ) from error
