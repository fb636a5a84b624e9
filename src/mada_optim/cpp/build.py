"""C++ sources compiled by the machine's compiler, in about a second each, and loaded.

The compiler is ``CXX``, or else c++, g++ or clang++. Libraries stay in the folder of :mod:`mada_optim.cpp.cache`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

from mada_optim.cpp.cache import cached

# A line of the source, which g++ writes below an error.
_EXCERPT = re.compile(r"\s*\d*\s+\|")


def compiled(name: str, source: str, *definitions: str) -> ctypes.CDLL:
    """Return the library of a C++ source. Build it if it is not in the cache.

    Args:
        name: with which the library's file begins.
        source: text of the source.
        definitions: further words of the compiler's command.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: there is no folder to keep the library in, or it cannot be loaded from there.
    """
    command = [*_compiler(), *_flags(), *definitions]
    digest = hashlib.sha256("\0".join([source, *command, _machine(), torch.__version__]).encode()).hexdigest()[:20]
    return ctypes.CDLL(str(cached(f"{name}-{digest}.so", lambda folder: _build(command, source, folder))))


def _build(command: list[str], source: str, folder: Path) -> Path:
    (folder / "native.cpp").write_text(source, encoding="utf-8")
    built = folder / "native.so"
    problem: Exception | None = None
    for openmp in (["-fopenmp"], []):
        # Linked without it: the threads are those of the OpenMP library that torch has loaded.
        compiling = [*command, *openmp, "-c", "native.cpp", "-o", "native.o"]
        linking = [*command, "-shared", "native.o", "-o", built.name]
        try:
            for step in (compiling, linking):
                _compile(step, folder)
            ctypes.CDLL(str(built))
        except (RuntimeError, OSError) as error:
            problem = error
        else:
            return built
    assert problem is not None
    raise problem


def _compile(command: list[str], folder: Path) -> None:
    """Run a compiler. Raise RuntimeError with the last line that it writes if it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.splitlines() if line.strip() and not _EXCERPT.match(line)]
        raise RuntimeError(f"{command[0]}: {lines[-1] if lines else f'exit status {error.returncode}'}") from None
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from None


def _compiler() -> list[str]:
    """The command that compiles C++; CXX may hold more than one word, as in "ccache g++"."""
    given = shlex.split(os.environ.get("CXX", ""))
    for words in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(words[0])
        if path is not None:
            return [path, *words[1:]]
    raise RuntimeError(f"no C++ compiler found (looked for {' '.join(given) or 'c++, g++, clang++'})")


def _flags() -> list[str]:
    # Without errno and traps the compiler may compute both sides of a choice for several elements at once; with sums in
    # any order, it may add up several elements at once. Infinities and NaN are what they should be.
    flags = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fassociative-math", "-fno-signed-zeros"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        return [*flags, "-march=native", "-mprefer-vector-width=512"]
    return [*flags, "-mcpu=native"]


@lru_cache(maxsize=1)
def _machine() -> str:
    """What -march=native may depend on: a home folder can be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
