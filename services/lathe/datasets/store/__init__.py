"""The database of datasets."""

from lathe.datasets.store.audits import Audits
from lathe.datasets.store.blobs import Blobs
from lathe.datasets.store.preparation import Preparation

__all__ = ["SqlDatasetStore"]


class SqlDatasetStore(Preparation, Blobs, Audits):
    """DatasetStore on a Database."""
