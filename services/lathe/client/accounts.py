"""Keys and projects."""

from __future__ import annotations

from collections.abc import Iterator

from lathe.client.paging import pages
from lathe.client.transport import Transport, new_request_id
from lathe.v1 import accounts_pb2 as pb
from lathe.v1.accounts_pb2_grpc import AccountsServiceStub

ROLES = {"viewer": pb.ROLE_VIEWER, "member": pb.ROLE_MEMBER, "admin": pb.ROLE_ADMIN}


class Keys:
    """The API keys of the caller's project."""

    def __init__(self, transport: Transport, project: str) -> None:
        self._transport = transport
        self._project = project
        self._stub = AccountsServiceStub(transport.channel)

    def create(self, display_name: str, role: str = "member") -> tuple[pb.ApiKey, str]:
        """A new key and its secret, which is shown here and never again."""
        request = pb.CreateApiKeyRequest(
            parent=self._project,
            api_key=pb.ApiKey(display_name=display_name, role=ROLES.get(role, pb.ROLE_UNSPECIFIED)),
            request_id=new_request_id(),
        )
        # Once only: the answer to a repeat would not have the secret.
        answer = self._transport.once(self._stub.CreateApiKey, request, timeout=self._transport.timeout)
        return answer.api_key, answer.secret

    def list(self) -> Iterator[pb.ApiKey]:
        """Every key, revoked ones too."""
        return pages(
            self._transport, self._stub.ListApiKeys, pb.ListApiKeysRequest(parent=self._project), "api_keys"
        )

    def revoke(self, name: str) -> pb.ApiKey:
        """Revoke for ever. name: `projects/…/apiKeys/…` or the id alone."""
        full = name if "/" in name else f"{self._project}/apiKeys/{name}"
        return self._transport.call(self._stub.RevokeApiKey, pb.RevokeApiKeyRequest(name=full))


class Projects:
    """The projects that the caller may see."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stub = AccountsServiceStub(transport.channel)

    def list(self) -> Iterator[pb.Project]:
        return pages(self._transport, self._stub.ListProjects, pb.ListProjectsRequest(), "projects")

    def create(self, project_id: str, display_name: str = "", quota: pb.Quota | None = None) -> pb.Project:
        """A new project; for admins of the default project."""
        request = pb.CreateProjectRequest(
            project_id=project_id,
            project=pb.Project(display_name=display_name, quota=quota),
            request_id=new_request_id(),
        )
        return self._transport.call(self._stub.CreateProject, request)

    def create_key(self, project: str, display_name: str, role: str = "admin") -> tuple[pb.ApiKey, str]:
        """A key of any project, for admins of the default project. project: `projects/…` or the id."""
        full = project if "/" in project else f"projects/{project}"
        return Keys(self._transport, full).create(display_name, role)
