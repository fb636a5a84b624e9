"""The folder of compiled libraries. Only the user can write to it, since libraries are executed.

The folder is ``MADA_CACHE_DIR`` (default: ``$XDG_CACHE_HOME/mada-optim`` or ``~/.cache/mada-optim``). If it cannot be
used, the libraries go to a folder of the user's own under the temporary directory.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from mada_optim.warn import warn

_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FALLBACKS_WARNED_OF: set[Path] = set()


def cached(name: str, make: Callable[[Path], Path]) -> Path:
    """Return a file of the cache. Make it if it is missing, or if another user may have written it.

    Args:
        name: of the file.
        make: makes the file in an empty folder, and returns its path.

    Raises:
        OSError: no folder can be used. The message says why.
    """
    problems: list[str] = []
    for choose_folder in (cache_dir, _fallback_dir):
        try:
            folder = choose_folder()
            _make_private(folder)
            path = folder / name
            if not (path.is_file() and _why_not_private(path) is None):
                with tempfile.TemporaryDirectory(dir=folder) as empty:
                    made = make(Path(empty))
                    made.chmod(stat.S_IRWXU)
                    made.replace(path)  # atomic: several processes may make it at once
        except OSError as error:
            problems.append(str(error))
        else:
            if problems:
                _warn_of_fallback(folder, problems[0])
            return path
    raise OSError("; ".join(problems))


def cache_dir() -> Path:
    """Return the folder to use if possible. Raise OSError if the user has no home and named no folder."""
    named = os.environ.get("MADA_CACHE_DIR")
    if named:
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mada-optim"
    except RuntimeError:
        raise FileNotFoundError("HOME is not set, and the user has no home folder") from None


def _fallback_dir() -> Path:
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    return Path(tempfile.gettempdir()) / f"mada-optim-{user}"


def _make_private(folder: Path) -> None:
    """Make a folder if there is none. Raise OSError if it is not this user's alone."""
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    problem = _why_not_private(folder)
    if problem is not None:
        raise PermissionError(f"{folder} {problem}")


def _why_not_private(path: Path) -> str | None:
    """Why another user may have written to a file or folder, or None."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if not hasattr(os, "geteuid"):  # Windows keeps other users out of home and temporary folders by other means
        return None
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to user {os.geteuid()}"
    return "may be written by others (chmod go-w)" if status.st_mode & _OTHERS_MAY_WRITE else None


def _warn_of_fallback(folder: Path, problem: str) -> None:
    if folder not in _FALLBACKS_WARNED_OF:
        _FALLBACKS_WARNED_OF.add(folder)
        warn(
            f"MADA's compiled kernels are kept in {folder}, where they may not last: {problem}. "
            "Set MADA_CACHE_DIR to a folder that only you can write to."
        )
