"""The settings of datasets."""

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, SettingsGroup, StoreSettings
from lathe.datasets.addresses import networks


class ImportSettings(SettingsGroup):
    """What users may have fetched. Addresses that are not public are refused, but for `allow_networks`."""

    enabled: bool = Field(False, description="whether datasets may be imported from URLs; needs a way out")
    allow_networks: tuple[str, ...] = Field(
        (), description="networks inside that imports may reach, such as 10.2.0.0/16"
    )
    max_bytes: int = Field(8 << 30, ge=1, le=8 << 30, description="the largest file")
    max_seconds: float = Field(3600.0, gt=0, description="the longest that one fetch may take")
    workers: int = Field(2, ge=1, le=16, description="imports that are fetched beside each other")
    hub: str = Field("https://huggingface.co", description="what hf: means")
    hub_token: SecretStr | None = Field(
        None, description="sent to the hub alone; every project may then read by hf: what it may read"
    )
    s3: StoreSettings | None = Field(
        None,
        description="the S3 service of s3:// sources (its bucket is not read unless s3_buckets names it)",
    )
    s3_buckets: tuple[str, ...] = Field((), description="buckets there that every project may read")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        networks(self.allow_networks)
        if self.s3 is not None and self.s3.kind != "s3":
            raise ValueError("imports.s3 must be of kind 's3'")
        if self.s3_buckets and self.s3 is None:
            raise ValueError("imports.s3_buckets needs imports.s3: where these buckets are")
        return self


class DatasetsSettings(ProcessSettings, service="datasets"):
    """`LATHE_DATASETS_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    db: DatabaseSettings
    store: StoreSettings
    models_address: str = Field("127.0.0.1:7460", description="host:port of models")
    cache_folder: Path | None = Field(
        None, description="tokenizers and unfinished token objects; a temporary folder if not given"
    )
    imports: ImportSettings = ImportSettings()
    validation_workers: int = Field(2, ge=1, le=32, description="files that are validated beside each other")
    audit_workers: int = Field(
        0,
        ge=0,
        le=256,
        description="processes that audit a file of 8 MiB or more (0.25 GB each); 0 for one a core, at most 4",
    )
    sweep_interval_s: float = Field(
        300.0, gt=0, description="how often deleted and expired files are looked for"
    )

    @model_validator(mode="after")
    def _not_our_own_bucket(self) -> Self:
        # By name alone: one service may go by many endpoints.
        if self.store.bucket is not None and self.store.bucket in self.imports.s3_buckets:
            raise ValueError(
                f"imports.s3_buckets may not name {self.store.bucket!r}: the platform's own bucket of that name holds "
                "everybody's data"
            )
        return self
