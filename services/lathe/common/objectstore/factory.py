"""The object store that the settings describe."""

from __future__ import annotations

import shutil

from lathe.common.errors import InvalidArgument
from lathe.common.objectstore.base import ObjectStore
from lathe.common.objectstore.folder import FolderStore
from lathe.common.settings import StoreSettings


def open_store(settings: StoreSettings) -> ObjectStore:
    """Open the folder or the bucket; nothing is contacted yet (see `ObjectStore.check`)."""
    if settings.kind == "folder":
        if settings.folder is None:
            raise InvalidArgument("A store of kind 'folder' needs the setting store.folder.")
        return FolderStore(settings.folder)
    if settings.endpoint is None or settings.bucket is None:
        raise InvalidArgument("A store of kind 's3' needs the settings store.endpoint and store.bucket.")
    # minio need not be there where a folder is used.
    from lathe.common.objectstore.s3 import S3Config, S3Store

    return S3Store(
        S3Config(
            endpoint=settings.endpoint,
            bucket=settings.bucket,
            access_key=settings.access_key,
            secret_key=settings.secret_key.get_secret_value() if settings.secret_key is not None else None,
            region=settings.region,
            secure=settings.secure,
            public_url=settings.public_url(),
        )
    )


def free_bytes(settings: StoreSettings) -> int | None:
    """Room on the disk below a folder; None for S3, which does not tell."""
    if settings.kind == "folder" and settings.folder is not None:
        return shutil.disk_usage(settings.folder).free
    return None
