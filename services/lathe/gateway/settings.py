"""The gateway's settings: environment `LATHE_GATEWAY_…`, or a YAML file."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings, StoreSettings


class GatewaySettings(ProcessSettings, service="gateway"):
    """`LATHE_GATEWAY_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    http_host: str = "127.0.0.1"
    http_port: int = Field(8080, ge=0, le=65535, description="0 picks a free port")
    http_tls_cert_file: Path | None = Field(None, description="TLS on the HTTP port; may change meanwhile")
    http_tls_key_file: Path | None = None
    db: DatabaseSettings
    store: StoreSettings
    cache_folder: Path = Field(description="where tokenizers are kept, by digest")
    accounts_address: str
    models_address: str
    datasets_address: str
    jobs_address: str
    engine_start_timeout_s: float = Field(
        120.0, gt=0, description="how long a request waits for an engine before 503"
    )
    auth_cache_s: float = Field(5.0, ge=0, le=60, description="the bound on how long a revoked key works")
    model_cache_s: float = Field(5.0, ge=0, le=60)
    forward_timeout_s: float = Field(60.0, gt=0, description="deadline of calls that come without one")

    @model_validator(mode="after")
    def _http_tls_is_whole(self) -> Self:
        if (self.http_tls_cert_file is None) != (self.http_tls_key_file is None):
            raise ValueError("http_tls_cert_file and http_tls_key_file must be given together")
        return self

    def addresses(self) -> dict[str, str]:
        """Where each service behind the gateway is, by its short name."""
        return {
            "accounts": self.accounts_address,
            "datasets": self.datasets_address,
            "models": self.models_address,
            "jobs": self.jobs_address,
        }
