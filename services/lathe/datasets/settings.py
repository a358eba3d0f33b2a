"""The settings of datasets."""

from pathlib import Path

from pydantic import Field

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, StoreSettings


class DatasetsSettings(ProcessSettings, service="datasets"):
    """`LATHE_DATASETS_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    db: DatabaseSettings
    store: StoreSettings
    models_address: str = Field("127.0.0.1:7460", description="host:port of models")
    cache_folder: Path | None = Field(
        None, description="tokenizers and unfinished token objects; a temporary folder if not given"
    )
    validation_workers: int = Field(2, ge=1, le=32, description="files that are validated beside each other")
    audit_workers: int = Field(
        0,
        ge=0,
        le=256,
        description="processes that audit a large file (150 MB each); 0 for one a core, at most 4",
    )
    sweep_interval_s: float = Field(
        300.0, gt=0, description="how often deleted and expired files are looked for"
    )
