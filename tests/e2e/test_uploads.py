"""Files in parts through the unmodified `openai` SDK, its Azure class too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import openai
import pytest

from tests.e2e.data import jsonl, lessons
from tests.e2e.sdk import ENDLESS, cancel, wait_for_file
from tests.fixtures.platforms import Platform


def test_a_file_in_parts(sdk: openai.OpenAI, tmp_path: Path) -> None:
    # More than one of the SDK's own parts of 64 MiB; another purpose, because it would take long to read so many rows.
    (tmp_path / "large.bin").write_bytes(uuid4().bytes * (65 * 2**20 // 16))
    done = sdk.uploads.upload_file_chunked(
        file=tmp_path / "large.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    assert (done.status, done.bytes) == ("completed", 65 * 2**20)
    assert done.file is not None
    assert wait_for_file(sdk, done.file.id).status == "processed"
    sdk.files.delete(done.file.id)


@pytest.mark.parametrize("azure", [False, True])
def test_rows_in_parts_train(sdk: openai.OpenAI, platform: Platform, base_model: str, azure: bool) -> None:
    content = jsonl(lessons())
    client: openai.OpenAI = sdk
    if azure:
        client = openai.AzureOpenAI(
            azure_endpoint=platform.http, api_key=platform.api_key, api_version="2025-03-01-preview"
        )
    done = client.uploads.upload_file_chunked(
        file=content,
        filename="lessons.jsonl",
        bytes=len(content),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=len(content) // 3,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert done.file is not None
    assert wait_for_file(sdk, done.file.id).status == "processed"
    assert client.files.content(done.file.id).read() == content
    job = sdk.fine_tuning.jobs.create(model=base_model, training_file=done.file.id, hyperparameters=ENDLESS)
    cancel(sdk, job.id)


def test_an_upload_that_is_given_up(sdk: openai.OpenAI) -> None:
    made = sdk.uploads.create(bytes=10, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    part = sdk.uploads.parts.create(made.id, data=b"0123456789")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.uploads.complete(made.id, part_ids=[part.id, part.id])
    assert refused.value.code == "duplicate_part"
    assert sdk.uploads.cancel(made.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.uploads.complete(made.id, part_ids=[part.id])
    assert refused.value.code == "upload_cancelled"
