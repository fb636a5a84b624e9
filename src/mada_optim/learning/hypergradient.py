"""The derivative of one optimizer step with respect to the coefficients of its family.

With everything of step t-1 held constant, x_{t+1} = (1 - η_t λ) x_t - η_t Δ_t(q_t) and therefore

    h_t = ∂f(x_{t+1})/∂q_t = -η_t ⟨g_{t+1}, ∂Δ_t/∂q_t⟩ = -η_t ∂/∂q_t ⟨g_{t+1}, Δ_t(q_t)⟩.

The last form is what is computed: g_{t+1} pulled back through Δ_t to a handful of numbers (MADA, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mada_optim.families import Buffers, Family


def align_and_advance(
    family: Family,
    state: Buffers,
    grad: Tensor,
    next_grad: Tensor,
    q: Mapping[str, Any],
    learned: Sequence[str],
    step: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ∂/∂q ⟨g_{t+1}, Δ_t(q)⟩ for one tensor, and its buffers after step t.

    Args:
        family: whose update is differentiated.
        state: buffers before step t.
        grad: g_t, same shape as the buffers.
        next_grad: g_{t+1}, same shape.
        q: coefficients and constants of step t, see :meth:`Family.update`.
        learned: names of the coefficients to differentiate by; their values in ``q`` are 0-dimensional tensors.
        step: t.

    Returns:
        Tensor of shape ``(len(learned),)``, in the order of ``learned`` and the dtype of their values; the new buffers.
    """

    def update(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return family.update(state, grad, {**q, **dict(zip(learned, values.unbind(), strict=True))}, step)

    result: tuple[Any, ...] = torch.func.vjp(update, torch.stack([q[k] for k in learned]), has_aux=True)
    _, pull_back, advanced = result
    return pull_back(next_grad)[0], advanced
