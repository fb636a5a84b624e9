"""Loads ``native.cpp``, compiled once for each combination of learned coefficients and dtypes."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files

from mada_optim.cpp.build import compiled
from mada_optim.kernels.native.layout import header
from mada_optim.warn import warn


@dataclass(frozen=True)
class Variant:
    """What a library is compiled for; native.cpp says what each means."""

    ADAPTIVE: bool
    SIGN: bool
    MEAN: bool
    DIFF: bool
    YOGI: bool
    ORTHO: bool
    ROWS: bool
    PARAM: str
    GRAD: str
    STATE: str
    REAL: str
    STOCHASTIC: bool


_SIMPLE = Variant(True, False, False, False, False, False, False, "float", "float", "float", "float", False)


@lru_cache(maxsize=256)
def why_unavailable(variant: Variant = _SIMPLE) -> str | None:
    """Why a variant cannot be compiled on this machine, or None if it can. Says so by a warning, once.

    Where the simplest cannot, none can; the others because compilers differ in the types that they know.
    """
    try:
        load(variant)
    except (OSError, RuntimeError) as error:
        compiler = "Install a C++17 compiler or name one in CXX"
        folder = "Set MADA_CACHE_DIR to a folder that only you can write to"
        warn(
            f"MADA's fused kernels cannot be built, the plain ones will be used, which are slower: {error}. "
            f"{folder if isinstance(error, OSError) else compiler}; fused=False avoids this warning."
        )
        return str(error)
    return None


@lru_cache(maxsize=256)
def load(variant: Variant) -> ctypes.CDLL:
    """The library for one variant, built if it is not in the cache.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: there is no folder to keep the library in, or it cannot be loaded from there.
    """
    source = header() + files("mada_optim.kernels.native").joinpath("native.cpp").read_text(encoding="utf-8")
    library = compiled("native", source, *(f"-D{name}={_text(value)}" for name, value in asdict(variant).items()))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "mada_complete": [pointer, pointer, count, pointer],
        "mada_advance": [pointer, pointer, count],
        "mada_step": [pointer, pointer, count],
        "mada_complete_and_step": [pointer, pointer, pointer, count, pointer],
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.mada_implements.restype = ctypes.c_char_p
    return library


def implemented() -> str:
    """The checksum of the definition that ``native.cpp`` says that it implements."""
    return str(load(_SIMPLE).mada_implements().decode())


def _text(value: bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else value
