"""A folder's files from rank 0 to the others, over the ranks' own process group.

The ranks may share no disk, and a checkpoint may be larger than the object store that Ray has: the files go in pieces,
and never lie in anybody's memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

# Names and sizes in bytes, in the order of their sending.
Listing = tuple[tuple[str, int], ...]
Broadcast = Callable[[Tensor], None]

PIECE_BYTES = 16 << 20


def listing(folder: Path) -> Listing:
    """The folder's files, not those of folders in it."""
    return tuple((path.name, path.stat().st_size) for path in sorted(folder.iterdir()) if path.is_file())


def send(folder: Path, files: Listing, broadcast: Broadcast, device: torch.device) -> None:
    """Rank 0's part. files: what the others were told of, however the folder is by now.

    Raises RankLost, and OSError when all has been sent, as far as it could be read.
    """
    failed: OSError | None = None
    for name, size in files:
        for start, count in _pieces(size):
            try:
                content = _read(folder / name, start, count)
            except OSError as error:
                failed, content = failed or error, bytes(count)
            broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device))
    if failed is not None:
        raise failed


@contextmanager
def receiving(files: Listing, broadcast: Broadcast, device: torch.device) -> Iterator[Path]:
    """The other ranks' part: a folder with the files, gone at the end.

    Raises RankLost, and OSError when all has come: the ranks that can write it wait for nobody.
    """
    with TemporaryDirectory() as name:
        failed: OSError | None = None
        for file, size in files:
            path = Path(name) / file
            for _, count in _pieces(size):
                piece = torch.zeros(count, dtype=torch.uint8, device=device)
                broadcast(piece)
                try:
                    with path.open("ab") as out:
                        out.write(piece.cpu().numpy().tobytes())
                except OSError as error:
                    failed = failed or error
            path.touch()
        if failed is not None:
            raise failed
        yield Path(name)


def _read(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(count)
    if len(content) < count:
        raise OSError(f"{path.name} has become shorter while it was sent")
    return content


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Where each begins, and its bytes."""
    for start in range(0, size, PIECE_BYTES):
        yield start, min(PIECE_BYTES, size - start)
