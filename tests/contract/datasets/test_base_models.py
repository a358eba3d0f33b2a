"""BaseModels: the fake of the tests, and the models service over gRPC."""

from contextlib import asynccontextmanager

import pytest

from lathe.common.db import Database, migrate
from lathe.common.errors import NotFound, Unavailable
from lathe.common.metrics import Metrics
from lathe.common.rpc.auth import ServiceAuthenticator, ServiceCredentials
from lathe.common.rpc.channel import connect
from lathe.common.rpc.server import Registration, build_server
from lathe.common.settings import RpcSettings
from lathe.datasets.peers import RpcBaseModels
from lathe.models.service import ModelsService
from lathe.models.servicer import ModelsInternalServicer
from lathe.models.store import SqlModelStore
from lathe.v1.models_pb2_grpc import ModelsInternalServiceStub, add_ModelsInternalServiceServicer_to_server
from tests.fakes.clock import FakeClock
from tests.fakes.datasets import FakeBaseModels
from tests.fakes.ids import FakeIds
from tests.fakes.objectstore import MemoryObjectStore
from tests.fixtures.models import tiny_folder, upload

NAME = "lathe.v1.ModelsInternalService"


@asynccontextmanager
async def real(folder, objects):
    db = Database(f"sqlite+aiosqlite:///{folder}/models.sqlite")
    await migrate(db, "lathe.models")
    service = ModelsService(SqlModelStore(db), objects, FakeClock(), FakeIds())
    await upload(service, tiny_folder())
    await service.commit_base_model("tiny")
    registration = Registration(
        add_ModelsInternalServiceServicer_to_server, ModelsInternalServicer(service), NAME
    )
    authenticator = ServiceAuthenticator(ServiceCredentials.from_tokens({"lathe": "secret"}))
    server = build_server(
        [registration], RpcSettings(port=0, health_port=None), authenticator, Metrics("test")
    )
    channel = connect(f"127.0.0.1:{await server.start()}", "secret")
    yield RpcBaseModels(ModelsInternalServiceStub(channel))
    await channel.close()
    await server.stop(0)
    await db.close()


@pytest.fixture
def objects():
    return MemoryObjectStore()


@pytest.fixture(params=["fake", "grpc"])
async def base_models(request, tmp_path, objects):
    if request.param == "fake":
        fake = FakeBaseModels()
        await fake.add_tiny(objects)
        yield fake
    else:
        async with real(tmp_path, objects) as adapter:
            yield adapter


async def test_a_base_model_says_what_an_audit_needs(base_models, objects):
    base = await base_models.resolve("acme", "baseModels/tiny")
    assert (base.name, base.context_length, base.tunable) == ("baseModels/tiny", 512, True)
    assert len(base.tokenizer_digest) == len(base.template_digest) == 64
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.path for file in base.files}
    assert not {file.path for file in base.files} & {"model.safetensors", "README.md"}
    for file in base.files:
        assert await objects.head(file.object_key) is not None


async def test_an_unknown_base_model_is_not_found(base_models):
    with pytest.raises(NotFound):
        await base_models.resolve("acme", "baseModels/none")


async def test_models_away_is_unavailable(unused_tcp_port_factory):
    channel = connect(f"127.0.0.1:{unused_tcp_port_factory()}", "secret")
    with pytest.raises(Unavailable):
        await RpcBaseModels(ModelsInternalServiceStub(channel)).resolve("acme", "baseModels/tiny")
    await channel.close()
