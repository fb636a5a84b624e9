"""The families of MADA and OMADA on the CPU: builds, loads and calls ``native.cpp``.

The source is compiled once for each combination of learned coefficients and dtypes, in about a second, with the C++
compiler of the machine (``CXX``, or c++, g++, clang++), and kept in ``MADA_CACHE_DIR`` (default:
``$XDG_CACHE_HOME/mada-optim`` or ``~/.cache/mada-optim``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.resources import files
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mada_optim import horizon
from mada_optim.kernels.base import Batch, coefficients_and_constants
from mada_optim.kernels.blocks import Roles
from mada_optim.kernels.plain import PlainKernels
from mada_optim.kernels.rounding import mix

_TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "_Float16"}
_STATE_ROLES = ("exp_avg", "exp_avg_sq", "mean_exp_avg_sq", "exp_avg_diff", "previous_grad", "lion_exp_avg", "ortho")
# In the order of native.cpp's Role; of what else a state holds it knows nothing.
_BUFFERS = ("pending_grad", *_STATE_ROLES)
_ROLES = ("param", "grad", *_BUFFERS, *horizon.BUFFERS)
# By which native.cpp differentiates, in its order.
_DIFFERENTIATED = ("beta1", "beta2", "beta3", "rho", "c", "gamma", "ortho")


class _Settings(ctypes.Structure):
    """native.cpp's Settings."""

    _fields_ = (
        *((name, ctypes.c_double) for name in (*_DIFFERENTIATED, "scale")),
        *((name, ctypes.c_double) for name in ("eps", "kappa1", "kappa2", "t", "lr", "weight_decay")),
        *((name, ctypes.c_double) for name in ("mean_decay", "swing_share")),
        *((name, ctypes.c_int32) for name in ("maximize", "keep", "stored", "threads")),
    )


@dataclass(frozen=True)
class Variant:
    """What a library is compiled for; native.cpp says what each means."""

    ADAPTIVE: bool
    SIGN: bool
    MEAN: bool
    DIFF: bool
    YOGI: bool
    ORTHO: bool
    SCALED: bool
    PARAM: str
    GRAD: str
    STATE: str
    REAL: str
    STOCHASTIC: bool


class NativeKernels(PlainKernels):
    """MADA's family in closed form. Parameters that are not dense in memory are left to the plain kernels."""

    def settle(self, batch: Batch, values: Tensor, learned: Sequence[str], keep: bool) -> Tensor | None:
        """See :meth:`Kernels.settle`."""
        part, rest = self._split(batch)
        total = super().settle(rest, values, learned, keep) if rest else None
        if part is None:
            return total
        native, variant = part
        library, settings = load(variant), self._settings(native, values, native.step, keep)
        rows = _Rows(native, native.step)
        if not (learned and native.has_grad):
            library.mada_advance(ctypes.byref(settings), rows.pointer, len(rows))
        else:
            sums = (ctypes.c_double * len(_DIFFERENTIATED))()
            library.mada_settle(ctypes.byref(settings), rows.pointer, len(rows), sums)
            by_name = dict(zip(_DIFFERENTIATED, sums, strict=True))
            used = [by_name[c.name] if c.name in learned else 0.0 for c in self.family.coefficients]
            aligned = torch.tensor(used, dtype=values.dtype, device=values.device)
            total = aligned if total is None else total + aligned
        if variant.DIFF:
            for state in native.states:
                state["previous_grad"], state["pending_grad"] = state["pending_grad"], state["previous_grad"]
            batch.refresh()
        return total

    def step(self, batch: Batch, values: Tensor, keep: bool) -> None:
        """See :meth:`Kernels.step`."""
        part, rest = self._split(batch)
        if rest is not None:
            super().step(rest, values, keep)
        if part is not None:
            native, variant = part
            settings = self._settings(native, values, native.step + 1, keep)
            rows = _Rows(native, native.step + 1)
            load(variant).mada_step(ctypes.byref(settings), rows.pointer, len(rows))

    def follow(self, batch: Batch, values: Tensor, wanted: bool) -> Tensor | None:
        """See :meth:`Kernels.follow`."""
        part, rest = self._split(batch)
        total = super().follow(rest, values, wanted) if rest else None
        if part is None:
            return total
        native, variant = part
        settings = self._settings(native, values, native.step + 1, keep=False)
        rows, h = _Rows(native, native.step + 1), (ctypes.c_double * 1)()
        load(variant).mada_follow(ctypes.byref(settings), rows.pointer, len(rows), h if wanted else None)
        if not wanted:
            return None
        found = torch.tensor(h[0], dtype=values.dtype, device=values.device)
        return found if total is None else total + found

    def _split(self, batch: Batch) -> tuple[tuple[Batch, Variant] | None, Batch | None]:
        """The parameters that a library can work on, with what it is compiled for, and the others."""
        dense = [_is_dense(roles) for roles in batch.roles]
        native, rest = (_part(batch, [flag == wanted for flag in dense]) for wanted in (True, False))
        if native is None:
            return None, rest
        variant = self._variant(native)
        return (None, batch) if why_unavailable(variant) is not None else ((native, variant), rest)

    def _settings(self, batch: Batch, values: Tensor, t: float | Tensor, keep: bool) -> _Settings:
        group = batch.group
        q: dict[str, Any] = coefficients_and_constants(self.family, group, values)
        names = self.family.buffers(q)
        numbers = dict(zip((c.name for c in self.family.coefficients), values.tolist(), strict=True))
        return _Settings(
            *(numbers.get(name, 0.0) for name in _DIFFERENTIATED),
            numbers.get("scale", 1.0),
            q["eps"],
            *q["lion_betas"],
            float(t),
            float(group["lr"]),
            group["weight_decay"] * float(self.family.decay_factor(q)),
            horizon.DECAY,
            horizon.SWING_SHARE,
            group["maximize"],
            keep,
            # With differences of gradients, settle() stores the gradient where that costs least.
            batch.pending and "exp_avg_diff" in names,
            torch.get_num_threads(),
        )

    def _variant(self, batch: Batch) -> Variant:
        group, roles = batch.group, batch.roles[0]
        names = self.family.buffers(coefficients_and_constants(self.family, group, group["coefficients"]))
        learned_scale = any(one.name == "scale" for one in self.family.coefficients) and "scale" not in group["special"]
        state = next(tensor for role, tensor in roles.items() if role in _BUFFERS)
        return Variant(
            ADAPTIVE="exp_avg" in names,
            SIGN="lion_exp_avg" in names,
            MEAN="mean_exp_avg_sq" in names,
            DIFF="exp_avg_diff" in names,
            YOGI="exp_avg" in names and "c" not in group["special"],
            ORTHO="ortho" in names,
            SCALED=learned_scale,
            PARAM=_TYPES[roles["param"].dtype],
            GRAD=_TYPES[roles["grad"].dtype if "grad" in roles else roles["param"].dtype],
            STATE=_TYPES[state.dtype],
            REAL=_TYPES[batch.dtype],
            STOCHASTIC=group["stochastic_rounding"],
        )


def _part(batch: Batch, wanted: Sequence[bool]) -> Batch | None:
    """Of these parameters; None where there are none."""
    if all(wanted):
        return batch
    params, states = list(compress(batch.params, wanted)), list(compress(batch.states, wanted))
    return replace(batch, params=params, states=states, found={}) if params else None


class _Rows:
    """The tensors of a batch as native.cpp's Row, which must not outlive the batch; ``step`` tells the noise."""

    def __init__(self, batch: Batch, step: float | Tensor) -> None:
        self._kept: list[Tensor] = []
        self._table = array("q")
        for number, roles in enumerate(batch.roles):
            self._table.append(roles["param"].numel())
            self._table.append(mix(batch.index, number, int(step)))
            for role in _ROLES:
                tensor = self._gradient(roles) if role == "grad" else roles.get(role)
                self._table.append(0 if tensor is None else tensor.data_ptr())
        self.pointer = ctypes.c_void_p(self._table.buffer_info()[0])
        self._count = len(batch.params)

    def __len__(self) -> int:
        return self._count

    def _gradient(self, roles: Roles) -> Tensor | None:
        """Gradients may come in a layout of their own."""
        param, grad = roles["param"], roles.get("grad")
        if (
            grad is not None
            and not (grad.is_contiguous() and param.is_contiguous())
            and grad.stride() != param.stride()
        ):
            grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            self._kept.append(grad)
        return grad


def _is_dense(roles: Roles) -> bool:
    """Whether parameter and buffers are the same elements in the same order in memory, without gaps.

    Raises:
        RuntimeError: one of them has another shape than the parameter, whose memory must not be touched then.
    """
    param = roles["param"]
    if param.is_neg():  # its memory holds the opposite
        return False
    for role, tensor in roles.items():
        if tensor.shape != param.shape:
            raise RuntimeError(f"{role} has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}")
    buffers = [tensor for role, tensor in roles.items() if role in _BUFFERS]
    if any(tensor.dtype != buffers[0].dtype or tensor.device != param.device for tensor in buffers):
        return False
    followed = [roles[name] for name in horizon.BUFFERS if name in roles]
    # native.cpp takes their types from the parameter's, which may have changed since they were made.
    if followed and [tensor.dtype for tensor in followed] != list(horizon.dtypes(param)):
        return False
    buffers += followed
    if param.is_contiguous():
        return all(tensor.is_contiguous() for tensor in buffers)
    if any(tensor.stride() != param.stride() for tensor in buffers):
        return False
    expected = 1
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# ---- Building.


_SIMPLE = Variant(True, False, False, False, False, False, False, "float", "float", "float", "float", False)


@lru_cache(maxsize=256)
def why_unavailable(variant: Variant = _SIMPLE) -> str | None:
    """Why a variant cannot be compiled on this machine, or None if it can. Says so by a warning, once.

    Where the simplest cannot, none can; the others because compilers differ in the types that they know.
    """
    try:
        load(variant)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"MADA's fused kernels cannot be built, the plain ones will be used, which are slower: {error}. "
            "Install a C++17 compiler or name one in CXX; fused=False avoids this warning.",
            stacklevel=2,
        )
        return str(error)
    return None


@lru_cache(maxsize=256)
def load(variant: Variant) -> ctypes.CDLL:
    """The library for one variant, built if it is not in the cache.

    Raises:
        RuntimeError: there is no compiler, or it failed.
        OSError: the library cannot be loaded.
    """
    source = files("mada_optim.kernels").joinpath("native.cpp").read_text(encoding="utf-8")
    command = [*_compiler(), *_flags(), *(f"-D{name}={_text(value)}" for name, value in asdict(variant).items())]
    digest = hashlib.sha256("\0".join([source, *command, _machine(), torch.__version__]).encode()).hexdigest()[:20]
    path = cache_dir() / f"native-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = _build(command, source, Path(folder))
            built.replace(path)  # atomic: several processes may build it at once
    library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.mada_settle.argtypes = library.mada_follow.argtypes = [pointer, pointer, count, pointer]
    library.mada_advance.argtypes = library.mada_step.argtypes = [pointer, pointer, count]
    for function in (library.mada_settle, library.mada_advance, library.mada_follow, library.mada_step):
        function.restype = None
    return library


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    given = os.environ.get("MADA_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mada-optim"


def _build(command: list[str], source: str, folder: Path) -> Path:
    (folder / "native.cpp").write_text(source, encoding="utf-8")
    built = folder / "native.so"
    problem = ""
    for openmp in (["-fopenmp"], []):
        # Linked without it: the threads are those of the OpenMP library that torch has loaded.
        compiling = [*command, *openmp, "-c", "native.cpp", "-o", "native.o"]
        linking = [*command, "-shared", "native.o", "-o", built.name]
        try:
            for step in (compiling, linking):
                subprocess.run(step, cwd=folder, check=True, capture_output=True, text=True)
            ctypes.CDLL(str(built))
        except subprocess.CalledProcessError as error:
            problem = f"{' '.join(error.cmd)}: {error.stderr.strip()[-500:]}"
        except OSError as error:
            problem = str(error)
        else:
            return built
    raise RuntimeError(problem)


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


def _text(value: bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else value
