"""What devices can hold, and where the numbers that belong to parameters are kept.

Coefficients, their hypergradients and learning rates are a handful of numbers. They are kept on the device of the
parameters, so that the program never waits for it: in float64, or in float32 where the device has no float64 (Apple's
MPS). Float32 costs little there: a coefficient near 1 loses changes of less than 3e-8 a step, which no training sees.
Numbers on the host would be exact, but each step would wait for the hypergradient, and files with float64 could not be
loaded with ``map_location="mps"``.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
WITHOUT_VALUES = frozenset({"meta"})
PINNED = frozenset({"cuda", "xpu"})  # copies from pinned memory do not make the program wait


def has_float64(device: torch.device) -> bool:
    """Whether tensors on a device may be float64. Some GPUs of Intel lack it."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type not in WITHOUT_FLOAT64


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now is recorded into a graph and not run."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    return (
        device.type == "xpu"
        and hasattr(torch.xpu, "is_current_stream_capturing")
        and torch.xpu.is_current_stream_capturing()
    )


def has_values(device: torch.device) -> bool:
    """Whether tensors on a device have values, which those on the meta device do not."""
    return device.type not in WITHOUT_VALUES


def number_dtype(device: torch.device) -> torch.dtype:
    """The precision of numbers that are kept on a device.

    >>> number_dtype(torch.device("cpu")), number_dtype(torch.device("mps"))
    (torch.float64, torch.float32)
    """
    return torch.float64 if has_float64(device) else torch.float32


def device_of(params: Iterable[Tensor]) -> torch.device:
    """The device of the first parameter; the host where there is none."""
    return next((param.device for param in params), torch.device("cpu"))


def device_with_values(params: Iterable[Tensor]) -> torch.device:
    """Return where numbers keep their values until the next step: with the parameters, or on the host for meta ones."""
    device = device_of(params)
    return device if has_values(device) else torch.device("cpu")


def move_numbers(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers on a device, in its precision: integers in int64, truth values as they are."""
    dtype = number_dtype(device) if numbers.dtype.is_floating_point else _integer_dtype(numbers.dtype)
    if numbers.dtype == dtype and numbers.device == device:
        return numbers
    # Each conversion on the side that has both dtypes.
    return numbers.to(device).to(dtype) if dtype == torch.float64 else numbers.to(dtype).to(device)


def _integer_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bool else torch.int64


def number_on(value: float | Tensor, device: torch.device) -> Tensor:
    """A number as a 0-dimensional tensor on a device, in its precision, without waiting for the device."""
    if isinstance(value, Tensor):
        number = move_numbers(value, device)
        return number.reshape(()) if number.dim() else number
    return torch.full((), value, dtype=number_dtype(device), device=device)


def send(tensor: Tensor, reader: Tensor) -> Tensor:
    """Return a tensor of the host on a device, for which the program does not wait.

    Args:
        tensor: to be copied; nobody may write to it afterwards.
        reader: a tensor on the device, with which the copy is used. A graph that is captured copies again at each
            replay, so what it copies from stays as long as this tensor does.
    """
    device = reader.device
    if is_capturing(device):
        tensor = _pinned_in_capture(tensor, device)
        weakref.finalize(reader, id, tensor).atexit = False  # id does nothing, but what it is to be called with stays
    elif device.type in PINNED:
        _provide(tensor)
        # torch gives the pinned memory to no other tensor before it has been read.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type in PINNED)


# Pinned memory for a capture, by dtype and shape: while a graph is captured, versions of torch refuse to allocate any.
_SPARE: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
_KINDS, _OF_A_KIND = 64, 8


def _provide(tensor: Tensor) -> None:
    """Provide memory for a capture, which sends tensors of the dtypes and shapes that the steps before it sent."""
    spare = _SPARE.setdefault((tensor.dtype, tensor.shape), [])
    if len(spare) < _OF_A_KIND:
        spare.append(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").pin_memory())
    if len(_SPARE) > _KINDS:
        del _SPARE[next(iter(_SPARE))]


def _pinned_in_capture(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type not in PINNED:
        return tensor
    spare = _SPARE.get((tensor.dtype, tensor.shape))
    return spare.pop().copy_(tensor) if spare else tensor.pin_memory()


def constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that makes the same tensor on the device of its first argument, a ``reader`` of :func:`send`.

    The tensor is made once for the same arguments, but anew in a graph that is captured: the graph's memory holds
    nothing until it is replayed, and the graph outlives what others may forget.

    Args:
        make: makes the tensor, on the host.
    """
    once = lru_cache(maxsize=64)(lambda device, *arguments: make(*arguments).to(device))

    @wraps(make)
    def on_device(reader: Tensor, *arguments: Any) -> Tensor:
        if is_capturing(reader.device):
            return send(make(*arguments), reader)
        tensor = once(reader.device, *arguments)
        if reader.device.type in PINNED:
            _provide(tensor)
        return tensor

    return on_device


def stream_on(device: torch.device) -> int | None:
    """Return which stream of a device is the current one, where it has streams. Memory belongs to one of them."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def as_floats(numbers: Tensor) -> list[float]:
    """The values of a vector; those of float32 as the shortest decimals that it tells apart.

    >>> as_floats(torch.tensor([0.9, 0.999], dtype=torch.float32))
    [0.9, 0.999]
    """
    values: list[float] = numbers.tolist()
    return [_shortest(value) for value in values] if numbers.dtype == torch.float32 else values


def _shortest(value: float) -> float:
    decimals = (float(f"{value:.{digits}g}") for digits in range(6, 9))
    return next((number for number in decimals if struct.unpack("f", struct.pack("f", number))[0] == value), value)
