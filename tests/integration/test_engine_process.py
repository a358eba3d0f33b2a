"""An engine as its own process against fake jobs: killed, drained, orphaned, and asked to sample."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from lathe.engine.model import Outcome
from lathe.v1 import engine_pb2, engine_pb2_grpc, models_pb2
from tests.fakes.worker_jobs import FakeJob
from tests.fixtures.engine_process import DIGEST, EPOCHS, ROOT, STEPS, TOKEN, Place, engine_place


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with engine_place(tmp_path) as made:
        yield made


async def test_killed_and_resumed_ends_with_the_same_bytes_as_undisturbed(place: Place) -> None:
    engine = await place.start("eng-1")
    place.jobs.offer(place.attempt("whole", 1))
    await place.until(lambda: bool(place.jobs.job.outcomes))
    whole = await place.weights()
    assert sorted(place.jobs.job.metrics) == list(range(1, STEPS + 1))
    losses = [place.jobs.job.metrics[step].train_loss for step in (1, STEPS)]
    assert losses[1] < losses[0]

    place.jobs.job = FakeJob()
    place.jobs.offer(place.attempt("parts", 1))
    await place.until(lambda: bool(place.jobs.job.checkpoints))
    engine.send_signal(signal.SIGKILL)
    await engine.wait()
    assert not place.jobs.job.outcomes
    place.jobs.offer(place.attempt("parts", 2))
    second = await place.start("eng-2")
    await place.until(lambda: bool(place.jobs.job.outcomes))
    assert place.jobs.job.outcomes == [Outcome.SUCCEEDED]
    assert sorted(place.jobs.job.metrics) == list(range(1, STEPS + 1))
    assert len(place.jobs.job.checkpoints) == EPOCHS
    assert await place.weights() == whole
    log = (place.folder / "eng-2.log").read_text()
    assert "goes on from step" in log
    assert "Warning" not in log

    await _sample(place)
    second.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(second.wait(), 60) == 0
    assert place.jobs.deregistered == ["eng-2"]
    assert not (place.folder / "cache" / "work" / "eng-1").exists()


async def _sample(place: Place) -> None:
    """The tuned adapter, through the engine's own port."""
    address = place.jobs.registered[-1].address
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    assert place.jobs.job.final is not None
    adapter = models_pb2.AdapterObject(
        prefix=place.jobs.job.final.prefix, manifest_sha256=place.jobs.job.final.manifest_sha256
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stub = engine_pb2_grpc.EngineServiceStub(channel)
        request = engine_pb2.SampleRequest(
            base_digest=DIGEST,
            adapter=adapter,
            prompt_tokens=[(11 * 3 + place) % 300 for place in range(8)],
            params=engine_pb2.SamplingParams(max_tokens=16, top_logprobs=1),
        )
        first, cached = await _tokens(stub, request)
        again, cached_again = await _tokens(stub, request)
        assert first == again
        assert (len(first), cached, cached_again > 0) == (16, 0, True)
        base = engine_pb2.SampleRequest()
        base.CopyFrom(request)
        base.ClearField("adapter")
        assert (await _tokens(stub, base))[0] != first
        status = await stub.GetEngineStatus(
            engine_pb2.GetEngineStatusRequest(), metadata=metadata, timeout=20
        )
        assert (status.adapters_loaded, status.dtype, status.threads) == (1, "float32", 1)
        loaded = await stub.LoadAdapter(
            engine_pb2.LoadAdapterRequest(adapter=adapter), metadata=metadata, timeout=20
        )
        assert not loaded.loaded
        for wrong, code in (
            ({"base_digest": "0" * 64}, grpc.StatusCode.FAILED_PRECONDITION),
            ({"prompt_tokens": [1] * 600}, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            bad = engine_pb2.SampleRequest()
            bad.CopyFrom(request)
            for name in wrong:
                bad.ClearField(name)
            bad.MergeFrom(engine_pb2.SampleRequest(**wrong))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in stub.Sample(bad, metadata=metadata, timeout=20):
                    pass
            assert refused.value.code() == code


async def _tokens(
    stub: engine_pb2_grpc.EngineServiceStub, request: engine_pb2.SampleRequest
) -> tuple[list[int], int]:
    """What was sampled, and how many prompt tokens were cached; the likeliest token is the sampled one."""
    metadata = (("authorization", f"Bearer {TOKEN}"),)
    messages = [message async for message in stub.Sample(request, metadata=metadata, timeout=20)]
    tokens = [token for message in messages for token in message.tokens]
    assert all(token.top_logprobs[0].token_id == token.token_id for token in tokens)
    assert messages[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH
    return [token.token_id for token in tokens], messages[0].cached_prompt_tokens


async def lathe_engine_drain(place: Place, port: str) -> tuple[int | None, str]:
    """The command as a container's preStop runs it: (exit code, what it said)."""
    settings = {
        "LATHE_ENGINE_RPC__PORT": port,
        "LATHE_RPC__HOST": "0.0.0.0",
        "LATHE_RPC__SERVICE_TOKEN_FILE": str(place.folder / "token"),
        "LATHE_ENGINE_ENGINE_ID": "what the engine reads too",
        "PYTHONPATH": str(ROOT / "services"),
    }
    command = (sys.executable, "-m", "lathe.cli.main", "engine", "drain", "--grace", "20")
    process = await asyncio.create_subprocess_exec(
        *command, env=dict(os.environ) | settings, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, said.decode()


async def test_drain_gives_the_attempt_back_and_ends_the_process(place: Place) -> None:
    engine = await place.start("eng-1")
    # Far longer than the command takes to start, on any machine.
    place.jobs.offer(place.attempt("job", 1, n_epochs=100 * EPOCHS))
    await place.until(lambda: bool(place.jobs.job.metrics))
    port = place.jobs.registered[-1].address.rpartition(":")[2]
    assert await lathe_engine_drain(place, port) == (0, "The engine is drained.\n")
    assert await asyncio.wait_for(engine.wait(), 60) == 0
    assert place.jobs.job.outcomes == [Outcome.RELEASED]
    assert place.jobs.deregistered == ["eng-1"]
    # Nothing is there any more, and that is no error.
    assert await lathe_engine_drain(place, port) == (0, f"No engine answers on port {port}.\n")


async def test_an_engine_ends_also_while_it_waits_for_its_base_model(
    place: Place, unused_tcp_port_factory: Callable[[], int]
) -> None:
    port = str(unused_tcp_port_factory())
    store = {"kind": "s3", "endpoint": f"127.0.0.1:{unused_tcp_port_factory()}", "bucket": "away"}
    rpc = {"port": int(port), "health_port": None, "service_token_file": str(place.folder / "token")}
    changes = {"LATHE_ENGINE_STORE": json.dumps(store), "LATHE_ENGINE_RPC": json.dumps(rpc)}
    log = place.folder / "eng-1.log"
    engine = await place.start("eng-1", registers=False, LATHE_ENGINE_STORE__KIND="s3", **changes)
    await place.until(lambda: "cannot be fetched yet" in log.read_text())
    assert (await lathe_engine_drain(place, port))[0] == 0
    assert await asyncio.wait_for(engine.wait(), 60) == 0
    assert "Stopped before it answered." in log.read_text()


async def test_an_engine_whose_parent_is_gone_leaves(place: Place) -> None:
    engine = await place.start("eng-1", registers=False, LATHE_ENGINE_PARENT_PID="1")
    assert await asyncio.wait_for(engine.wait(), 60) == 0
    assert "has died" in (place.folder / "eng-1.log").read_text()
