"""accounts over gRPC: proto to model and back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import TypeVar

from lathe.accounts.model import ApiKey, Project, Quota
from lathe.accounts.service import AccountsService
from lathe.common import names
from lathe.common.errors import InvalidArgument, PermissionDenied
from lathe.common.pages import coerce_page_size, decode_page_token, encode_page_token
from lathe.common.rpc.context import ServicerContext
from lathe.common.rpc.principal import current_caller, is_operator, require_project, require_role
from lathe.v1 import accounts_pb2 as pb
from lathe.v1 import accounts_pb2_grpc as pb_grpc

_ROLES = {"viewer": pb.ROLE_VIEWER, "member": pb.ROLE_MEMBER, "admin": pb.ROLE_ADMIN}
T = TypeVar("T", Project, ApiKey)

_ROLE_NAMES = {number: name for name, number in _ROLES.items()}


class AccountsServicer(pb_grpc.AccountsServiceServicer):
    """The public methods. Admins of the default project are the operators: they see every project."""

    def __init__(self, service: AccountsService) -> None:
        self._service = service

    async def GetCaller(self, request: pb.GetCallerRequest, context: ServicerContext) -> pb.Caller:
        principal = current_caller().principal
        if principal is None:
            raise PermissionDenied("GetCaller answers for a user's key; this call has none.")
        return pb.Caller(
            project=names.PROJECT.format(principal.project),
            role=_ROLES[principal.role],
            api_key=names.API_KEY.format(principal.project, principal.key_id),
        )

    async def GetProject(self, request: pb.GetProjectRequest, context: ServicerContext) -> pb.Project:
        return _project_pb(await self._service.get_project(_visible_project(request.name, "name")))

    async def ListProjects(
        self, request: pb.ListProjectsRequest, context: ServicerContext
    ) -> pb.ListProjectsResponse:
        principal = current_caller().principal
        if principal is not None and not _is_operator():
            return pb.ListProjectsResponse(
                projects=[_project_pb(await self._service.get_project(principal.project))]
            )
        size = coerce_page_size(request.page_size)
        rows = await self._service.list_projects(after=_after(request.page_token, ""), limit=size + 1)
        page, token = _page(rows, size, "")
        return pb.ListProjectsResponse(projects=[_project_pb(row) for row in page], next_page_token=token)

    async def CreateProject(self, request: pb.CreateProjectRequest, context: ServicerContext) -> pb.Project:
        if not _is_operator():
            raise PermissionDenied("Only an admin of the default project may create projects.")
        project = await self._service.create_project(
            request.project_id,
            request.project.display_name,
            _quota(request.project.quota),
            request.request_id,
        )
        return _project_pb(project)

    async def UpdateProject(self, request: pb.UpdateProjectRequest, context: ServicerContext) -> pb.Project:
        if not _is_operator():
            raise PermissionDenied("Only an admin of the default project may change projects.")
        project_id = _visible_project(request.project.name, "project.name")
        wanted = Project(
            project_id,
            request.project.display_name,
            _quota(request.project.quota),
            request.project.create_time.ToDatetime(UTC),
        )
        version = _version(request.project.etag)
        changed = await self._service.update_project(wanted, list(request.update_mask.paths), version)
        return _project_pb(changed)

    async def CreateApiKey(
        self, request: pb.CreateApiKeyRequest, context: ServicerContext
    ) -> pb.CreateApiKeyResponse:
        project = _managed_project(request.parent, "parent")
        role = _ROLE_NAMES.get(request.api_key.role, "")
        key, secret = await self._service.create_key(
            project, request.api_key.display_name, role, request.request_id
        )
        return pb.CreateApiKeyResponse(api_key=_key_pb(key), secret=secret)

    async def GetApiKey(self, request: pb.GetApiKeyRequest, context: ServicerContext) -> pb.ApiKey:
        project, key = _managed_key(request.name)
        return _key_pb(await self._service.get_key(project, key))

    async def ListApiKeys(
        self, request: pb.ListApiKeysRequest, context: ServicerContext
    ) -> pb.ListApiKeysResponse:
        project = _managed_project(request.parent, "parent")
        size = coerce_page_size(request.page_size)
        after = _after(request.page_token, project)
        rows = await self._service.list_keys(project, after=after, limit=size + 1)
        page, token = _page(rows, size, project)
        return pb.ListApiKeysResponse(api_keys=[_key_pb(row) for row in page], next_page_token=token)

    async def RevokeApiKey(self, request: pb.RevokeApiKeyRequest, context: ServicerContext) -> pb.ApiKey:
        project, key = _managed_key(request.name)
        return _key_pb(await self._service.revoke_key(project, key))


class AccountsInternalServicer(pb_grpc.AccountsInternalServiceServicer):
    """What the gateway and jobs call."""

    def __init__(self, service: AccountsService) -> None:
        self._service = service

    async def Authenticate(self, request: pb.AuthenticateRequest, context: ServicerContext) -> pb.Caller:
        identity = await self._service.authenticate(request.secret)
        return pb.Caller(
            project=names.PROJECT.format(identity.project),
            role=_ROLES[identity.role],
            api_key=names.API_KEY.format(identity.project, identity.key_id),
        )

    async def GetQuota(self, request: pb.GetQuotaRequest, context: ServicerContext) -> pb.Quota:
        (project,) = names.PROJECT.parse(request.project, field="project")
        return _quota_pb((await self._service.get_project(project)).quota)


def _is_operator() -> bool:
    return is_operator(current_caller().principal)


def _visible_project(name: str, field: str) -> str:
    (project,) = names.PROJECT.parse(name, field=field)
    return project if _is_operator() else require_project(name, field=field)


def _managed_project(name: str, field: str) -> str:
    project = _visible_project(name, field)
    require_role("admin")
    return project


def _managed_key(name: str) -> tuple[str, str]:
    project, key = names.API_KEY.parse(name)
    if not _is_operator():
        require_project(name)
        require_role("admin")
    return project, key


def _after(page_token: str, parent: str) -> str:
    cursor = decode_page_token(page_token, {"parent": parent})
    return str(cursor[0]) if cursor else ""


def _page(rows: Sequence[T], size: int, parent: str) -> tuple[Sequence[T], str]:
    if len(rows) <= size:
        return rows, ""
    return rows[:size], encode_page_token([rows[size - 1].id], {"parent": parent})


def _version(etag: str) -> int | None:
    if not etag:
        return None
    if not etag.isdecimal():
        raise InvalidArgument(f"etag {etag!r} is not one that this service gave out.")
    return int(etag)


def _quota(quota: pb.Quota) -> Quota:
    return Quota(quota.max_running_jobs, quota.max_queued_jobs)


def _quota_pb(quota: Quota) -> pb.Quota:
    return pb.Quota(max_running_jobs=quota.max_running_jobs, max_queued_jobs=quota.max_queued_jobs)


def _project_pb(project: Project) -> pb.Project:
    message = pb.Project(
        name=names.PROJECT.format(project.id),
        display_name=project.display_name,
        quota=_quota_pb(project.quota),
        etag=str(project.version),
    )
    message.create_time.FromDatetime(project.create_time)
    return message


def _key_pb(key: ApiKey) -> pb.ApiKey:
    message = pb.ApiKey(
        name=names.API_KEY.format(key.project, key.id),
        display_name=key.display_name,
        role=_ROLES[key.role],
        hint=key.hint,
    )
    message.create_time.FromDatetime(key.create_time)
    if key.revoke_time is not None:
        message.revoke_time.FromDatetime(key.revoke_time)
    return message
