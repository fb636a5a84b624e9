"""Products of matrices, many of one shape at a time: by torch, and on the CPU by ``products.cpp``, which is faster."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor

from mada_optim.cpp.build import compiled


def multiply(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    added: Tensor | None = None,
    beta: float = 0.0,
    diagonal: float = 0.0,
    symmetric: bool = False,
) -> Tensor:
    """Return α A B + β C + δ I for each of many matrices.

    ``products.cpp`` computes float32 on the CPU where a C++ compiler is found. There a symmetric product costs little
    more than half, and a matrix gives the same bits whatever batch it is in and however many threads there are.

    Args:
        a, b: shapes (N, rows, inner) and (N, inner, columns), of one dtype.
        alpha: α.
        added: C, contiguous, shape (N, rows, columns).
        beta, diagonal: β and δ.
        symmetric: whether the result is known to be symmetric.

    >>> multiply(torch.ones(1, 2, 3), torch.ones(1, 3, 2), diagonal=1.0).tolist()
    [[[4.0, 3.0], [3.0, 4.0]]]
    """
    # products.cpp writes through pointers, and autograd would not know of it.
    followed = torch.is_grad_enabled() and any(x.requires_grad for x in (a, b, added) if x is not None)
    library = _library() if a.is_cpu and a.dtype == torch.float32 and not followed else None
    if library is None:
        out = torch.baddbmm(a.new_zeros(1, 1, 1) if added is None else added, a, b, beta=beta, alpha=alpha)
        if diagonal:
            out.diagonal(dim1=1, dim2=2).add_(diagonal)
        return out
    out = a.new_empty(a.size(0), a.size(1), b.size(2))
    product = _Product(
        _operand(a),
        _operand(b),
        None if added is None else added.data_ptr(),
        out.data_ptr(),
        *out.shape,
        a.size(2),
        alpha,
        beta,
        diagonal,
        symmetric,
        torch.get_num_threads(),
    )
    if library.mada_multiply(ctypes.byref(product)):
        raise MemoryError("no memory for a product of matrices")
    return out


class _Operand(ctypes.Structure):
    """products.cpp's Operand."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("matrix", "row", "column")))


class _Product(ctypes.Structure):
    """products.cpp's Product."""

    _fields_ = (
        *((name, _Operand) for name in ("a", "b")),
        *((name, ctypes.c_void_p) for name in ("added", "out")),
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns", "inner")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "diagonal")),
        *((name, ctypes.c_int32) for name in ("symmetric", "threads")),
    )


def _operand(tensor: Tensor) -> _Operand:
    return _Operand(tensor.data_ptr(), *tensor.stride())


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """``products.cpp``, compiled, or None where that cannot be done: the step's own kernels then warn of the reason."""
    source = files("mada_optim.matrices").joinpath("products.cpp").read_text(encoding="utf-8")
    try:
        library = compiled("products", source)
    except (OSError, RuntimeError):
        return None
    library.mada_multiply.argtypes = [ctypes.c_void_p]
    library.mada_multiply.restype = ctypes.c_int
    return library
