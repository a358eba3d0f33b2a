"""The settings of accounts."""

from pydantic import Field, SecretStr

from lathe.common.service import ProcessSettings
from lathe.common.settings import DatabaseSettings, RpcSettings


class AccountsSettings(ProcessSettings, service="accounts"):
    """`LATHE_ACCOUNTS_…`, or `LATHE_…` for what all services share."""

    rpc: RpcSettings = RpcSettings()
    db: DatabaseSettings
    bootstrap_key: SecretStr | None = Field(
        None, description="the first API key; read only while the database has never held a key"
    )
