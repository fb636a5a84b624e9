"""How files are written and read: whole or not at all, by one process at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from mada_lab.errors import InputError

CONFIG, CHECKPOINT, RESULT = "config.json", "checkpoint.pt", "result.json"
LOCK, TEMPORARY = "lock", ".tmp"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# What reading a damaged checkpoint may raise.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made: two would each undo what the other wrote.

    A kill lets go of it. A file system that has no locks gives none, with a warning.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"another process is writing into {folder}; wait for its end, or end it") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
        warnings.warn(f"{folder} is on a file system without locks: let one process write into it", stacklevel=3)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` when all of it is on the disk, and is gone after any error."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prepare_file(path: Path) -> None:
    """Make the folder of a file that will be written, before what is to stand in it is computed.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: a file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"out must be a file that can be written, got {str(path)!r}: {error.strerror}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON."""
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of JSON. Raise :class:`InputError` where it cannot be read."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return values


def finite(value: float) -> float | None:
    """Return None in place of NaN and infinity, which JSON does not know."""
    return value if math.isfinite(value) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state that was saved, on the CPU. Raises ValueError, which says why, where it is not whole."""
    try:
        # torch.load does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
            raise ValueError("it does not hold a step, a model and an optimizer")
    except _UNREADABLE as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
    return state
