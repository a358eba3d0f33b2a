"""The settings of models."""

from pydantic import Field

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, StoreSettings


class ModelsSettings(ProcessSettings, service="models"):
    """`LATHE_MODELS_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    db: DatabaseSettings
    store: StoreSettings
    sweep_interval_s: float = Field(
        300.0, gt=0, description="how often deleted and abandoned files are looked for"
    )
