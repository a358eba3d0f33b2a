"""Uploads in parts as OpenAI's JSON. Pure."""

from __future__ import annotations

from lathe.common.errors import NotFound
from lathe.common.names import last_id
from lathe.gateway.http.answers import Json, stamp
from lathe.gateway.http.files_json import FIELDS as FILE_FIELDS
from lathe.gateway.http.files_json import file_json
from lathe.v1 import datasets_pb2 as pb

FIELDS = (("in_parts.size_bytes", "bytes"), ("dataset.display_name", "filename"), *FILE_FIELDS)
_STATUS = {
    pb.UPLOAD_SESSION_STATE_PENDING: "pending",
    pb.UPLOAD_SESSION_STATE_COMPLETED: "completed",
    pb.UPLOAD_SESSION_STATE_CANCELLED: "cancelled",
    pb.UPLOAD_SESSION_STATE_EXPIRED: "expired",
}


def upload_json(session: pb.UploadSession) -> Json:
    """OpenAI's upload object; `file` is there once it is completed."""
    return {
        "id": upload_id_of(session.name),
        "object": "upload",
        "bytes": session.size_bytes,
        "created_at": stamp(session, "create_time"),
        "expires_at": stamp(session, "expire_time"),
        "filename": session.display_name,
        "purpose": session.purpose,
        "status": _STATUS[session.state],
        "file": file_json(session.dataset) if session.HasField("dataset") else None,
    }


def upload_id_of(dataset_name: str) -> str:
    """`upload_<x>` for the dataset `file-<x>`: an upload makes one file."""
    return f"upload_{last_id(dataset_name).removeprefix('file-')}"


def file_id_of(upload_id: str) -> str:
    """The id of the file that an upload makes. Raises NotFound for what is no upload's id."""
    prefix, _, own = upload_id.partition("_")
    if prefix != "upload" or not own:
        raise NotFound(f"The upload {upload_id[:100]!r} was not found.")
    return f"file-{own}"
