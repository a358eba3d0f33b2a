"""models and datasets as they really run: gRPC, SQLite, a folder; killed and started again."""

import hashlib
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from lathe.common.clock import SystemClock
from lathe.common.db import Database, migrate
from lathe.common.errors import NotFound, PermissionDenied, Unimplemented
from lathe.common.metrics import Metrics
from lathe.common.objectstore.folder import FolderStore
from lathe.common.rpc.channel import call, connect
from lathe.common.rpc.principal import Principal
from lathe.common.settings import DatabaseSettings, RpcSettings, StoreSettings
from lathe.datasets import main as datasets_main
from lathe.datasets.settings import DatasetsSettings
from lathe.jobs.model import BaseRef, DatasetRef, Job
from lathe.jobs.peers import RpcDatasets, RpcModels
from lathe.models import main as models_main
from lathe.models.settings import ModelsSettings
from lathe.text.arrow import read_tokens
from lathe.v1 import datasets_pb2 as dpb
from lathe.v1 import models_pb2 as mpb
from lathe.v1.datasets_pb2_grpc import DatasetsInternalServiceStub, DatasetsServiceStub
from lathe.v1.models_pb2_grpc import ModelsInternalServiceStub, ModelsServiceStub
from tests.fixtures.models import tiny_folder
from tests.fixtures.until import until
from tests.unit.datasets.conftest import GOOD, jsonl, row

OPERATOR = Principal("default", "admin", "key_0")
ADMIN = Principal("acme", "admin", "key_1")
VIEWER = Principal("acme", "viewer", "key_2")
STRANGER = Principal("other", "admin", "key_3")


def sha(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
async def start(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret-of-services")
    rpc = RpcSettings(port=0, health_port=None, service_token_file=token)
    store = StoreSettings(kind="folder", folder=tmp_path / "store")
    urls = {name: f"sqlite+aiosqlite:///{tmp_path}/{name}.sqlite" for name in ("models", "datasets")}
    for name, url in urls.items():
        db = Database(url)
        await migrate(db, f"lathe.{name}")
        await db.close()

    @asynccontextmanager
    async def start():
        async with AsyncExitStack() as stack:
            settings = ModelsSettings(rpc=rpc, db=DatabaseSettings(url=urls["models"]), store=store)
            models = await stack.enter_async_context(models_main.running(settings, Metrics("test")))
            settings = DatasetsSettings(
                rpc=rpc,
                db=DatabaseSettings(url=urls["datasets"]),
                store=store,
                models_address=f"127.0.0.1:{models.port}",
                cache_folder=tmp_path / "cache",
            )
            datasets = await stack.enter_async_context(datasets_main.running(settings, Metrics("test")))
            channels = [
                connect(f"127.0.0.1:{port}", "secret-of-services") for port in (models.port, datasets.port)
            ]
            for channel in channels:
                stack.push_async_callback(channel.close)
            yield channels

    return start


async def import_tiny(models, store):
    public, internal = ModelsServiceStub(models), ModelsInternalServiceStub(models)
    folder = tiny_folder()
    files = [mpb.ModelFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256) for f in folder.files()]
    request = mpb.CreateBaseModelRequest(
        base_model_id="tiny", base_model=mpb.BaseModel(files=files, license="mit"), request_id="r1"
    )
    # Every project uses base models: no project's own admin may make or delete them.
    for user in (VIEWER, ADMIN, Principal("default", "member", "key_4")):
        with pytest.raises(PermissionDenied):
            await call(public.CreateBaseModel, request, principal=user)
        with pytest.raises(PermissionDenied):
            await call(
                public.DeleteBaseModel, mpb.DeleteBaseModelRequest(name="baseModels/tiny"), principal=user
            )
    created = await call(public.CreateBaseModel, request, principal=OPERATOR)
    for file in created.files:
        assert file.object_key == ""
        await store.put("staging/up", folder.contents[file.path])
        commit = mpb.CommitModelFileRequest(
            base_model=created.name,
            path=file.path,
            staging_key="staging/up",
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )
        assert (await call(internal.CommitModelFile, commit, principal=OPERATOR)).object_key
    return await call(
        public.CommitBaseModel, mpb.CommitBaseModelRequest(name=created.name), principal=OPERATOR
    )


async def commit(datasets, store, content, request_id):
    public, internal = DatasetsServiceStub(datasets), DatasetsInternalServiceStub(datasets)
    new = dpb.CreateDatasetRequest(
        parent="projects/acme",
        dataset=dpb.Dataset(display_name="train.jsonl", purpose="fine-tune"),
        request_id=request_id,
    )
    created = await call(public.CreateDataset, new, principal=ADMIN)
    upload = await call(internal.GetUpload, dpb.GetUploadRequest(name=created.name), principal=ADMIN)
    await store.put(f"{upload.staging_key}/00000", content[:100])
    await store.put(f"{upload.staging_key}/00001", content[100:])
    return await call(
        internal.CommitUpload,
        dpb.CommitUploadRequest(
            name=created.name, staging_key=upload.staging_key, size_bytes=len(content), sha256=sha(content)
        ),
        principal=ADMIN,
    )


async def test_from_a_folder_and_a_file_to_tokens_across_a_restart(start, tmp_path):
    store = FolderStore(tmp_path / "store")
    async with start() as (models, datasets):
        base = await import_tiny(models, store)
        assert base.state == mpb.BASE_MODEL_STATE_READY and base.tunable
        dataset = await commit(datasets, store, GOOD, "r1")
        # Left while it is validated: the next process goes on.
    async with start() as (models, datasets):
        public, internal = DatasetsServiceStub(datasets), DatasetsInternalServiceStub(datasets)
        get = dpb.GetDatasetRequest(name=dataset.name)
        done = (dpb.DATASET_STATE_READY, dpb.DATASET_STATE_ERROR)
        dataset = await until(
            lambda: call(public.GetDataset, get, principal=ADMIN), lambda found: found.state in done
        )
        assert dataset.state == dpb.DATASET_STATE_READY and dataset.report.example_count == 12
        with pytest.raises(NotFound):
            await call(public.GetDataset, get, principal=STRANGER)
        with pytest.raises(PermissionDenied):
            await call(public.DeleteDataset, dpb.DeleteDatasetRequest(name=dataset.name), principal=VIEWER)
        with pytest.raises(Unimplemented):
            await call(
                public.GetDatasetUpload, dpb.GetDatasetUploadRequest(name=dataset.name), principal=ADMIN
            )
        ensure = dpb.EnsureAuditRequest(
            dataset=dataset.name, base_model=base.name, options=dpb.AuditOptions(method="supervised")
        )
        ended = (dpb.AUDIT_STATE_READY, dpb.AUDIT_STATE_ERROR)
        audit = await until(lambda: call(internal.EnsureAudit, ensure), lambda found: found.state in ended)
        assert audit.state == dpb.AUDIT_STATE_READY, audit
        path = tmp_path / "tokens.arrow"
        await store.fetch(audit.object_key, path)
        assert sha(path.read_bytes()) == audit.sha256 and len(read_tokens(path)) == audit.rows == 12
        await RpcDatasets(public, internal).keep_tokens([audit.sha256])


async def test_jobs_has_models_remove_what_an_ended_job_left(start, tmp_path):
    store = FolderStore(tmp_path / "store")
    job = Job("ftjob-1", "acme", "tiny", BaseRef("tiny", "d" * 64), DatasetRef("f"), 1, SystemClock().now())
    kept, left = "jobs/ftjob-1/att-2/final", "jobs/ftjob-1/att-1/checkpoints/step-1"
    others = "jobs/ftjob-11/att-1/final/manifest.json"
    async with start() as (models, _):
        for folder in (kept, left):
            for name in ("manifest.json", "optimizer.safetensors"):
                await store.put(f"{folder}/{name}", b"x")
        await store.put(others, b"x")
        await RpcModels(ModelsInternalServiceStub(models)).sweep_files(job, [kept])
    found = [info.key async for info in store.list("jobs/")]
    assert found == [f"{kept}/manifest.json", f"{kept}/optimizer.safetensors", others]


async def test_lists_page_by_token_and_by_openais_cursor(start, tmp_path):
    store = FolderStore(tmp_path / "store")
    async with start() as (_, datasets):
        public = DatasetsServiceStub(datasets)
        made = [await commit(datasets, store, jsonl([row(str(n))] * 10), f"r{n}") for n in range(5)]
        names = [dataset.name for dataset in made]
        request = dpb.ListDatasetsRequest(parent="projects/acme", page_size=2)
        seen = []
        while True:
            page = await call(public.ListDatasets, request, principal=ADMIN)
            seen += [dataset.name for dataset in page.datasets]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert seen == names[::-1]
        request = dpb.ListDatasetsRequest(parent="projects/acme", after=names[2], ascending=True)
        page = await call(public.ListDatasets, request, principal=ADMIN)
        assert [dataset.name for dataset in page.datasets] == names[3:]
        with pytest.raises(NotFound):
            await call(public.ListDatasets, request, principal=STRANGER)
