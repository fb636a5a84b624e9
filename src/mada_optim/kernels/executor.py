"""The interface of a backend, which runs passes, and how it stores their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.passes import Pass
from mada_optim.learning.rule import call
from mada_optim.tensors.rounding import round_stochastically


class Executor(ABC):
    """Carries out passes over the parameters of a batch. Everything is changed in place."""

    @abstractmethod
    def run(self, task: Pass, batch: Batch, values: Tensor) -> Tensor | None:
        """Carry out a pass.

        Args:
            task: the pass.
            batch: parameters whose step is pending, or that have a gradient, as the pass needs.
            values: coefficients of the step that is completed or taken, shape (K,), or of both, shape (2 K,), see
                :class:`Numbers`; in the precision of their device.

        Returns:
            ⟨g_{t+1}, ∂Δ_t/∂q⟩ for all K coefficients, 0 where the pass does not differentiate, with ``values``' dtype
            and device. None where nothing is differentiated.
        """

    counts_each: ClassVar[bool] = False
    """Whether parameters of one batch may have numbers of steps of their own: see ``Batch.counts``."""

    run_on_numbers: ClassVar[Callable[..., None]] = staticmethod(call)
    """How a function of a few numbers is called best, which changes some of them in place."""


def to_store(
    batch: Batch, values: Mapping[str, Tensor], stored: Mapping[str, Tensor], seed: int | Tensor
) -> dict[str, Tensor]:
    """Return new values as they are to be stored, in any order: rounded, and not in memory that is overwritten.

    Args:
        batch: to which they belong.
        values: by role.
        stored: tensors that they go to, by role.
        seed: of the noise of stochastic rounding.
    """
    unknown = [name for name in values if name not in stored]
    if unknown:
        name = batch.update.family.name
        raise RuntimeError(f"update of {name} returned {unknown[0]!r}, which its buffers() does not name")
    overwritten = {stored[name].untyped_storage()._cdata for name in values}
    ready = {}
    for place, (name, value) in enumerate(values.items()):
        if _is_rounded_stochastically(batch, name, stored[name].dtype):
            value = round_stochastically(value.float(), seed + place)
        elif value is not stored[name] and value.untyped_storage()._cdata in overwritten:
            # A family may hand a buffer on as another one.
            value = value.clone()
        ready[name] = value
    return ready


def _is_rounded_stochastically(batch: Batch, name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of that role and stored dtype is rounded stochastically.

    Buffers in bfloat16 always: an average that moves by less than half a unit in the last place would stand still.
    """
    return bool(dtype == torch.bfloat16 and (name != "param" or batch.group["stochastic_rounding"]))
