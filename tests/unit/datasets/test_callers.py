"""Who may call what: every method of the contract, for each role and for another project's names."""

import pytest

from lathe.common.errors import LatheError, NotFound, PermissionDenied
from lathe.common.rpc.principal import Caller, Principal, set_caller
from lathe.datasets.import_store import SqlImportStore
from lathe.datasets.importing import Importing
from lathe.datasets.preview import Previews
from lathe.datasets.servicer import DatasetsInternalServicer, DatasetsServicer
from lathe.datasets.tokenizers import TokenizerCache
from lathe.datasets.upload_service import UploadService
from lathe.v1 import datasets_pb2 as pb
from tests.unit.datasets.conftest import GOOD, sha

IN_GATEWAY = {"UploadDataset", "GetDatasetUpload", "DownloadDataset"}
ROLES = {
    "viewer": {
        *("GetDataset", "ListDatasets", "GetUploadSession", "DiffDatasets", "FindRows", "GetTrainedRows"),
        *("GetUpload", "EnsureAudit"),
    },
    "member": {
        *(
            "CreateDataset",
            "ImportDataset",
            "AuditDataset",
            "PreviewDataset",
            "DeleteDataset",
            "PrepareDataset",
        ),
        *("SignUploadParts", "CompleteUploadSession", "CancelUploadSession", "FreezeDataset"),
        *("OpenUploadPart", "CommitUpload"),
    },
    "admin": {"ThawDataset"},
}
# jobs calls them for itself.
NOBODYS = {"KeepTokens", "CreateResultFile"}
TINY = "baseModels/tiny"


def request(method, dataset, **changes):
    """A call that would be answered, or refused for its state, were it allowed."""
    parent, new = dataset.rpartition("/datasets/")[0], pb.Dataset(display_name="a.jsonl", purpose="fine-tune")
    sample = pb.DatasetOperation(sample=pb.SampleRows(seed=1, count=1))
    given = {
        "CreateDataset": {"parent": parent, "dataset": new},
        "ImportDataset": {"parent": parent, "dataset": new, "source": "https://files.example.org/a.jsonl"},
        "ListDatasets": {"parent": parent},
        "FindRows": {"parent": parent, "row": GOOD.splitlines()[0].decode()},
        "GetTrainedRows": {"parent": parent, "dataset_sha256": sha(GOOD)},
        "AuditDataset": {"name": dataset, "model": TINY},
        "PreviewDataset": {"name": dataset, "model": TINY},
        "PrepareDataset": {"name": dataset, "operation": sample},
        "DiffDatasets": {"name": dataset, "other": dataset},
        "FreezeDataset": {"name": dataset, "frozen_as": "exam"},
        "CommitUpload": {"name": dataset, "size_bytes": len(GOOD), "sha256": sha(GOOD)},
        "EnsureAudit": {"dataset": dataset, "base_model": TINY},
        "CreateResultFile": {"parent": parent, "display_name": "a", "content": b"a", "request_id": "1"},
    }.get(method, {"name": dataset})
    return getattr(pb, f"{method}Request")(**given | changes)


def methods(service):
    return {method.name for method in pb.DESCRIPTOR.services_by_name[service].methods}


class Door:
    """The servicers over one world, called as somebody of the project acme."""

    def __init__(self, world):
        service = world.start()
        uploads = UploadService(service, world.uploads)
        previews = Previews(service, world.objects, TokenizerCache(world.objects, world.folder), world.folder)
        imports = Importing(service, SqlImportStore(world.db), None)
        self.uploads = uploads
        self.public = DatasetsServicer(service, uploads, imports, world.preparation(), previews)
        self.internal = DatasetsInternalServicer(service, uploads)

    async def call(self, method, message, role="admin"):
        set_caller(Caller("lathe", Principal("acme", role, "key-1")))
        servicer = self.public if method in methods("DatasetsService") else self.internal
        return await getattr(servicer, method)(message, None)


@pytest.fixture
async def door(world):
    await world.base_models.add_tiny(world.objects)
    return Door(world)


async def ready(world, project):
    """A dataset of the project, with rows."""
    service = world.start()
    made = await service.create(project, "train.jsonl", "fine-tune", None, "")
    await world.objects.put(made.staging_key, GOOD)
    await service.commit_upload(project, made.id, made.staging_key, len(GOOD), sha(GOOD))
    await world.validate()
    return made.name


async def in_parts(door, project):
    """A dataset of the project that takes parts."""
    made = await door.uploads.datasets.create(project, "train.jsonl", "fine-tune", None, "")
    await door.uploads.open(made, len(GOOD), "", presigned=False)
    return made.name


def test_every_method_is_in_the_table():
    listed = IN_GATEWAY.union(NOBODYS, *ROLES.values())
    assert listed == methods("DatasetsService") | methods("DatasetsInternalService")


async def test_a_lower_role_is_refused_and_the_right_one_is_not(world, door):
    mine = await ready(world, "acme")
    for needed, lower in (("member", "viewer"), ("admin", "member")):
        for method in ROLES[needed]:
            with pytest.raises(PermissionDenied, match=f"needs the role {needed}"):
                await door.call(method, request(method, mine), lower)
    for role, allowed in ROLES.items():
        for method in allowed:
            try:
                await door.call(method, request(method, mine), role)
            except LatheError as error:
                # For its state, such as being none that is uploaded in parts.
                assert not isinstance(error, PermissionDenied), method


async def test_another_projects_datasets_are_not_there_for_anybody(world, door):
    theirs, open_ = await ready(world, "other"), await in_parts(door, "other")
    of_parts = {"GetUploadSession", "SignUploadParts", "CompleteUploadSession", "CancelUploadSession"}
    for method in sorted(set().union(*ROLES.values())):
        named = open_ if method in of_parts | {"OpenUploadPart"} else theirs
        with pytest.raises(NotFound):
            await door.call(method, request(method, named))
    left = await world.store.page("other", purpose="", after=None, ascending=True, limit=9)
    assert [each.state for each in left] == ["ready", "uploading"]


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("ListDatasets", "after"),
        ("DiffDatasets", "other"),
        ("FindRows", "line"),
        ("AuditDataset", "validation_dataset"),
        ("EnsureAudit", "validation_dataset"),
    ],
)
async def test_nor_where_they_are_named_beside_one_of_ones_own(world, door, method, field):
    mine, theirs = await ready(world, "acme"), await ready(world, "other")
    changes = {"line": {"row": "", "line": pb.DatasetLine(dataset=theirs, line=1)}}.get(
        field, {field: theirs}
    )
    with pytest.raises(NotFound, match=theirs):
        await door.call(method, request(method, mine, **changes))
