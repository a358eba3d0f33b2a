"""Typed settings: frozen, read once, a typo is an error at start.

A value is looked up in this order: arguments, environment, YAML file (`LATHE_CONFIG` or `--config`), default.
A service's own variables begin with `LATHE_<SERVICE>_`; the same without the service (`LATHE_RPC__PORT`)
holds for every service that does not say otherwise. `__` steps into a group.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from lathe.common.errors import FieldViolation, InvalidArgument

# Kubernetes sets these for every Service in the namespace; they are nobody's typo.
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)")


class SettingsGroup(BaseModel):
    """Base of every nested group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PeerTls(SettingsGroup):
    """How a process proves itself to the services that it calls, and proves them. The files may change meanwhile."""

    ca_file: Path = Field(description="PEM authorities that the other services' certificates come from")
    cert_file: Path
    key_file: Path
    engine_name: str = Field(
        default="engine.lathe.internal", description="the TLS name of every engine, which have no host names"
    )


class RpcSettings(SettingsGroup):
    """The gRPC server of a service, and the credentials it checks and shows."""

    host: str = "127.0.0.1"
    port: int = Field(default=7460, ge=0, le=65535, description="0 picks a free port")
    health_port: int | None = Field(
        default=7461, ge=0, le=65535, description="plaintext, health only; null for none"
    )
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = Field(
        default=None, description="when given, clients must show a certificate"
    )
    peers: PeerTls | None = Field(
        default=None, description="mTLS for calls to other services; plaintext when not given"
    )
    reflection: bool = False
    service_token_file: Path | None = Field(
        default=None, description="the secret that Lathe's services share"
    )
    engine_token_file: Path | None = Field(
        default=None, description="the secret of engines: WorkerService only"
    )
    drain_delay_s: float = Field(
        default=0.0, ge=0, description="seconds between NOT_SERVING and refusing new calls"
    )
    grace_s: float = Field(
        default=10.0, ge=0, description="seconds that running calls may take to end at a stop"
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file must be given together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("tls_client_ca_file needs tls_cert_file and tls_key_file")
        return self


class DatabaseSettings(SettingsGroup):
    """Where a service keeps its own tables.

    url: `sqlite+aiosqlite:///path` (embedded only) or `postgresql+psycopg://user:password@host/name`.
    """

    url: SecretStr
    pool_size: int = Field(default=5, ge=1)


class StoreSettings(SettingsGroup):
    """The object store that services share."""

    kind: Literal["folder", "s3"] = "folder"
    folder: Path | None = None
    endpoint: str | None = Field(default=None, description="host:port of the S3 service")
    bucket: str | None = None
    access_key: str | None = None
    secret_key: SecretStr | None = None
    region: str = "us-east-1"
    secure: bool = True
    public_endpoint: str | None = Field(
        default=None,
        pattern=r"^(https?://)?[A-Za-z0-9.-]+(:[0-9]{1,5})?$",
        description="where clients reach the S3 service, [https://]host[:port] (without scheme as `secure` says): "
        "large files then go straight to it, by presigned URLs",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = ("folder",) if self.kind == "folder" else ("endpoint", "bucket")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a store of kind {self.kind!r} needs {' and '.join(missing)}")
        if self.public_endpoint is not None and (self.kind == "folder" or self.access_key is None):
            raise ValueError("public_endpoint needs a store of kind 's3' with access_key and secret_key")
        return self

    def public_url(self) -> str | None:
        """`public_endpoint` with its scheme."""
        if self.public_endpoint is None or "://" in self.public_endpoint:
            return self.public_endpoint
        return f"{'https' if self.secure else 'http'}://{self.public_endpoint}"


class MetricsSettings(SettingsGroup):
    """The `/metrics` endpoint."""

    host: str = "127.0.0.1"
    port: int | None = Field(default=9090, ge=0, le=65535, description="0 picks a free port; null for none")


class LogSettings(SettingsGroup):
    """How a process logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["console", "json"] = "console"


class ServiceSettings(BaseSettings):
    """Base of each service's settings: `class JobsSettings(ServiceSettings, service="jobs")` adds fields."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="LATHE_",
        env_nested_delimiter="__",
        validate_default=True,
        env_parse_none_str="null",
    )
    service: ClassVar[str] = ""
    # True for a class that reads a part of what a service is given: other settings are none of its business.
    partial: ClassVar[bool] = False

    def __init_subclass__(cls, service: str = "", **options: Any) -> None:
        super().__init_subclass__(**options)
        if service:
            cls.service = service

    config: Path | None = Field(default=None, description="a YAML file with any of these settings")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings]
        if cls.service:
            prefix = f"LATHE_{cls.service.upper()}_"
            if not cls.partial:
                _refuse_unknown_variables(settings_cls, prefix, os.environ)
            sources.append(EnvSettingsSource(settings_cls, env_prefix=prefix))
        given = init_settings().get("config") or os.environ.get("LATHE_CONFIG")
        return (*sources, env_settings, _YamlSource(settings_cls, Path(given) if given else None))

    @classmethod
    def load(cls, config: Path | None = None, **overrides: Any) -> Self:
        """The settings of this process.

        Raises InvalidArgument with one sentence per wrong setting; values are never repeated in it.
        """
        if config is not None:
            overrides["config"] = config
        try:
            return cls(**overrides)
        except ValidationError as error:
            raise _explain(cls.service, error) from None
        except SettingsError as error:
            raise InvalidArgument(f"The environment cannot be read as settings: {error}.") from None


class _YamlSource(PydanticBaseSettingsSource):
    """The settings in a YAML file."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path | None) -> None:
        super().__init__(settings_cls)
        self._values = read_yaml(path) if path is not None else {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InvalidArgument if it is missing or no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"The configuration file {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"The configuration file {path} is not valid YAML: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidArgument(f"The configuration file {path} must hold a mapping of settings.")
    return content


def _refuse_unknown_variables(cls: type[BaseSettings], prefix: str, environ: Mapping[str, str]) -> None:
    fields = {name.upper() for name in cls.model_fields}
    for variable, value in environ.items():
        if not variable.upper().startswith(prefix):
            continue
        if variable.upper().removeprefix(prefix).split("__")[0] in fields:
            continue
        if _SERVICE_LINK.fullmatch(variable) and (
            value.startswith("tcp://") or "_SERVICE_" in variable or "_PORT_" in variable
        ):
            continue
        known = ", ".join(prefix + name for name in sorted(fields))
        message = f"The environment variable {variable} is no setting. Known are {known}."
        raise InvalidArgument(message, violations=[FieldViolation(variable, message)])


def _explain(service: str, error: ValidationError) -> InvalidArgument:
    violations = []
    for problem in error.errors(include_input=False, include_url=False):
        path = ".".join(str(part) for part in problem["loc"]) or "settings"
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = "there is no such setting"
        elif problem["type"] == "missing":
            text = "this setting is required"
        violations.append(FieldViolation(path, text))
    owner = f"the {service} service" if service else "Lathe"
    sentences = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return InvalidArgument(f"Wrong settings for {owner}: {sentences}.", violations=violations)
