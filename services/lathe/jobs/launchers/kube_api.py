"""The few calls that are made to Kubernetes, as plain JSON: objects go in and out as the API writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import urllib3
from kubernetes import config as kube_config
from kubernetes.client import ApiClient, ApiException, Configuration
from kubernetes.config.config_exception import ConfigException

from lathe.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LatheError,
    NotFound,
    PermissionDenied,
    Unavailable,
)

Object: TypeAlias = Mapping[str, Any]


class Kind(StrEnum):
    """What is asked for; the value is the path of its collection."""

    RAYJOB = "/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    DEPLOYMENT = "/apis/apps/v1/namespaces/{namespace}/deployments"
    POD = "/api/v1/namespaces/{namespace}/pods"
    EVENT = "/api/v1/namespaces/{namespace}/events"
    NODE = "/api/v1/nodes"


class KubeApi(Protocol):
    """The API server, seen from one namespace. Every call blocks, ends within a deadline and is never retried.

    All raise Unavailable (no answer, or none now) and PermissionDenied; NotFound where the kind is not served.
    """

    def list(self, kind: Kind, labels: str = "", fields: str = "") -> Sequence[Object]:
        """labels, fields: selectors in Kubernetes' own notation."""
        ...

    def get(self, kind: Kind, name: str) -> Object | None: ...

    def create(self, kind: Kind, body: Object) -> None:
        """Raises AlreadyExists, and InvalidArgument for what the API refuses to take."""
        ...

    def delete(self, kind: Kind, name: str) -> None:
        """In the background, with what it owns. Nothing happens if it is gone."""
        ...

    def log_tail(self, pod: str, container: str, *, previous: bool = False) -> str:
        """The last lines that the container wrote; `previous`: before its last restart. Empty if there are none."""
        ...

    def serves(self, group_version: str) -> bool:
        """Whether the API has a group, such as `ray.io/v1`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HttpKubeApi:
    """The real one, through the official client's connection: its TLS, its credentials and their renewal."""

    client: ApiClient
    namespace: str
    timeout_s: float = 4.0

    def list(self, kind: Kind, labels: str = "", fields: str = "") -> Sequence[Object]:
        query = [("labelSelector", labels), ("fieldSelector", fields)]
        answer = self._json("GET", self._path(kind), [pair for pair in query if pair[1]])
        return list(answer["items"] or ())

    def get(self, kind: Kind, name: str) -> Object | None:
        try:
            found: Object = self._json("GET", f"{self._path(kind)}/{name}")
        except NotFound:
            return None
        return found

    def create(self, kind: Kind, body: Object) -> None:
        self._json("POST", self._path(kind), body=body)

    def delete(self, kind: Kind, name: str) -> None:
        try:
            self._json("DELETE", f"{self._path(kind)}/{name}", body={"propagationPolicy": "Background"})
        except NotFound:
            return

    def log_tail(self, pod: str, container: str, *, previous: bool = False) -> str:
        query = [("container", container), ("tailLines", "20"), ("limitBytes", "16384")]
        if previous:
            query.append(("previous", "true"))
        try:
            return self._call("GET", f"{self._path(Kind.POD)}/{pod}/log", query).decode("utf-8", "replace")
        except (NotFound, InvalidArgument):
            # The pod, or the container's first life, is gone: there is nothing to tell.
            return ""

    def serves(self, group_version: str) -> bool:
        try:
            self._json("GET", f"/apis/{group_version}")
        except NotFound:
            return False
        return True

    def close(self) -> None:
        self.client.rest_client.pool_manager.clear()

    def _path(self, kind: Kind) -> str:
        return kind.value.format(namespace=self.namespace)

    def _json(
        self, method: str, path: str, query: Sequence[tuple[str, str]] = (), body: Object | None = None
    ) -> Any:
        try:
            return json.loads(self._call(method, path, query, body))
        except ValueError as error:
            raise Unavailable(
                f"Kubernetes' answer to {method} {path} is no JSON.", reason="KUBERNETES"
            ) from error

    def _call(
        self, method: str, path: str, query: Sequence[tuple[str, str]] = (), body: Object | None = None
    ) -> bytes:
        try:
            response = self.client.call_api(
                path,
                method,
                query_params=list(query),
                header_params={"Accept": "application/json, */*", "Content-Type": "application/json"},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                # To connect, and to read. A single float would be taken for no limit at all.
                _request_timeout=(self.timeout_s, self.timeout_s),
            )
            data: bytes = response.read()
        except ApiException as error:
            if not error.status:
                raise Unavailable(
                    f"Kubernetes does not answer: {error.reason}", reason="KUBERNETES"
                ) from error
            raise refusal(error.status, f"{method} {path}", *_said(error.body or b"")) from error
        # ConfigException: the file with the token is empty while it is replaced.
        except (urllib3.exceptions.HTTPError, OSError, ConfigException) as error:
            raise Unavailable(f"Kubernetes does not answer: {error}", reason="KUBERNETES") from error
        return data


def refusal(status: int, call: str, said: str, reason: str) -> LatheError:
    """The error that an HTTP status of the API stands for. said, reason: its Status' message and reason."""
    message = f"Kubernetes refused {call}: {said}"
    match status:
        case 404:
            return NotFound(message, reason="KUBERNETES")
        case 409 if reason == "AlreadyExists":
            return AlreadyExists(message, reason="KUBERNETES")
        case 403:
            return PermissionDenied(message, reason="KUBERNETES")
        case 400 | 422:
            return InvalidArgument(message, reason="KUBERNETES")
        case _:
            return Unavailable(f"{message} (HTTP {status})", reason="KUBERNETES")


def connect(namespace: str | None, kubeconfig: Path | None, timeout_s: float = 4.0) -> HttpKubeApi:
    """The API of the cluster that this pod runs on, or of a kubeconfig file's current context.

    Raises FailedPrecondition where there is neither.
    """
    settings = Configuration()
    # Only jobs retries.
    settings.retries = False
    settings.connection_pool_maxsize = 4
    try:
        if kubeconfig is not None:
            kube_config.load_kube_config(str(kubeconfig), client_configuration=settings)
        else:
            kube_config.load_incluster_config(settings)
    except (ConfigException, OSError) as error:
        raise FailedPrecondition(
            f"This process has no access to Kubernetes ({error}). Run it in a pod with a service account's token, "
            "or give LATHE_JOBS_LAUNCHER__KUBERNETES__KUBECONFIG."
        ) from error
    return HttpKubeApi(ApiClient(settings), namespace or own_namespace(), timeout_s)


def own_namespace() -> str:
    """The namespace of the pod that this is. Raises FailedPrecondition elsewhere."""
    try:
        return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
    except OSError as error:
        raise FailedPrecondition(
            "The namespace for engines is not known; set LATHE_JOBS_LAUNCHER__KUBERNETES__NAMESPACE."
        ) from error


def _said(data: bytes | str) -> tuple[str, str]:
    """The message and the reason of an answer that is a Status; else the text itself, and none."""
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return text[:500], ""
    return str(said.get("message") or text)[:500], str(said.get("reason") or "")
