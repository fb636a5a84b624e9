"""OMADA: MADA's family, Muon's direction for matrices and a factor of the learning rate, found by the hypergradient.

The name is Greek for a team.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from mada_optim.coefficients import Bounds, HyperLR
from mada_optim.engine import Group
from mada_optim.family import Buffers, Coefficient, MADAFamily, is_special
from mada_optim.matrices import matrix_parameters, orthogonalize
from mada_optim.optimizer import HypergradientOptimizer
from mada_optim.points import WithBetas, split_betas
from mada_optim.sharding import scatter_like, whole


@dataclass(frozen=True)
class OMADAFamily(MADAFamily):
    """MADA's direction D_t and the orthogonalized momentum O_t, mixed by a weight ω and times a factor κ.

    With μ = ``ortho_momentum``, for the parameters of groups with ``matrices=True``::

        M_t = μ M_{t-1} + (1-μ) g_t                                 ortho_exp_avg
        O_t = 0.2 √max(rows, columns) orthogonal(μ M_t + (1-μ) g_t)  ortho (Nesterov; see orthogonalize)
        Δ_t = κ ((1-ω) D_t + ω O_t)

    and for all others Δ_t = κ D_t. At ω = κ = 1 matrices are optimized as by torch.optim.Muon, at ω = 0, κ = 1 this is
    MADA. ∂Δ/∂ω = κ (O_t - D_t): nothing is differentiated through the orthogonalization. κ scales all steps alike, and
    is learned from all of them: its hypergradient is ⟨g_{t+1}, x_{t+1} - x_1⟩.
    """

    coefficients: ClassVar[tuple[Coefficient, ...]] = (
        *MADAFamily.coefficients,
        Coefficient("ortho", 0.0, (0.0, 1.0), 0.1, domain=(0.0, 1.0), special=(0.0, 1.0), normalized=True),
        Coefficient(
            "scale",
            1.0,
            (0.01, 100.0),
            0.03,
            domain=(0.0, math.inf),
            special=(1.0,),
            normalized=True,
            logarithmic=True,
            cumulative=True,
        ),
    )
    constants: ClassVar[Mapping[str, Any]] = {**MADAFamily.constants, "matrices": False, "ortho_momentum": 0.95}
    prepares: ClassVar[bool] = True
    name: str = field(default="OMADA", init=False)

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.buffers`.

        >>> adam = {"beta3": 0.0, "rho": 1.0, "gamma": 1.0}
        >>> OMADAFamily().buffers({**adam, "matrices": True, "ortho": 1.0})
        ('ortho_exp_avg', 'ortho')
        """
        if not q["matrices"] or is_special(q["ortho"], 0.0):
            return super().buffers(q)
        ours = ("ortho_exp_avg", "ortho")
        return ours if is_special(q["ortho"], 1.0) else (*super().buffers(q), *ours)

    def prepare(
        self, states: Sequence[Buffers], grads: Sequence[Tensor], q: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Tensor]]:
        """See :meth:`Family.prepare`. Matrices that are spread over processes are gathered; each process does all."""
        if not q["matrices"] or is_special(q["ortho"], 0.0):
            return [{} for _ in states]
        mu = q["ortho_momentum"]
        averages = [state["ortho_exp_avg"].to(g.dtype).lerp(g, 1 - mu) for state, g in zip(states, grads, strict=True)]
        ahead = [g.lerp(average, mu) for g, average in zip(grads, averages, strict=True)]
        found = orthogonalize([whole(tensor) for tensor in ahead])
        return [
            {"ortho_exp_avg": average, "ortho": scatter_like(o, average)}
            for average, o in zip(averages, found, strict=True)
        ]

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        weight, scale = q["ortho"], q["scale"]
        if "ortho" not in state:
            direction, new = super().update(state, grad, q, step)
        elif is_special(weight, 1.0):
            direction, new = state["ortho"], {}
        else:
            direction, new = super().update(state, grad, q, step)
            direction = (1 - weight) * direction + weight * state["ortho"]
        return direction if is_special(scale, 1.0) else scale * direction, new

    def validate_constants(self, constants: Mapping[str, Any]) -> None:
        """See :meth:`Family.validate_constants`."""
        super().validate_constants(constants)
        momentum, matrices = constants["ortho_momentum"], constants["matrices"]
        if not (isinstance(momentum, (int, float)) and 0.0 <= momentum < 1.0):
            raise ValueError(f"ortho_momentum must be a number in [0, 1), got {momentum!r}")
        if not isinstance(matrices, bool):
            raise ValueError(f"matrices must be a bool, got {matrices!r}")


class OMADA(WithBetas, HypergradientOptimizer):
    """AdamW to begin with, which finds out by itself how much of Muon it wants to be, and how large its steps.

    The update is that of :class:`OMADAFamily`. Give it the model, and it sees which parameters are matrices
    (:func:`matrix_parameters`: weights of two and more dimensions, but for embeddings and the output layer)::

        optimizer = OMADA(model, lr=3e-3)

    Or say so by parameter group: ``[{"params": hidden, "matrices": True}, {"params": others}]``.

    Args:
        params: a model, or as in torch.optim.
        lr: learning rate η, which the learned factor κ multiplies. Default: 3e-3.
        betas, eps, weight_decay, beta3, rho, c, gamma, lion_betas: as in :class:`MADA`.
        ortho: where ω starts, the weight of the orthogonalized direction in the step of a matrix. Default: 0.
        scale: where κ starts. Default: 1.
        ortho_momentum: μ. Default: 0.95.
        hyper_lr: as in :class:`MADA`. Defaults for ω and κ: 0.1 and 0.03; their hypergradients are normalized, so
            these are steps at most about so long, that of κ as a share of it.
        hyper_momentum, hyper_clip, hyper_warmup, hyper_every, bounds, hyper_per_group, foreach, maximize, capturable,
            differentiable, fused, state_dtype, stochastic_rounding: see :class:`HypergradientOptimizer`. Boxes: as
            MADA's, ω [0, 1], κ [0.01, 100].

    Raises:
        ValueError: a parameter of a group with ``matrices=True`` is not one.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> optimizer = OMADA(model, lr=1e-2)
    >>> optimizer.param_groups[0]["matrices"], len(optimizer.param_groups[0]["params"])
    (True, 1)
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        beta3: float = 0.0,
        rho: float = 1.0,
        c: float = 1.0,
        gamma: float = 1.0,
        ortho: float = 0.0,
        scale: float = 1.0,
        ortho_momentum: float = 0.95,
        hyper_lr: HyperLR = None,
        hyper_momentum: float = 0.0,
        hyper_clip: float = 10.0,
        hyper_warmup: int = 0,
        hyper_every: int = 1,
        bounds: Bounds | None = None,
        hyper_per_group: bool = False,
        lion_betas: tuple[float, float] = (0.95, 0.98),
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        start = {"beta3": beta3, "rho": rho, "c": c, "gamma": gamma, "ortho": ortho, "scale": scale}
        super().__init__(
            matrix_groups(params) if isinstance(params, nn.Module) else params,
            OMADAFamily(),
            lr,
            weight_decay,
            start={**split_betas(betas), **start},
            hyper_lr=hyper_lr,
            hyper_momentum=hyper_momentum,
            hyper_clip=hyper_clip,
            hyper_warmup=hyper_warmup,
            hyper_every=hyper_every,
            bounds=bounds,
            hyper_per_group=hyper_per_group,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            eps=eps,
            lion_betas=lion_betas,
            ortho_momentum=ortho_momentum,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["matrices"]:
            for param in group["params"]:
                tensor = param[1] if isinstance(param, tuple) else param
                if tensor.dim() < 2 or tensor.is_complex():
                    found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                    raise ValueError(
                        f"params: groups with matrices=True take real tensors of 2 or more dimensions, got {found}"
                    )


def matrix_groups(model: nn.Module) -> list[Group]:
    """Two parameter groups of a model: its matrices, marked so, and the other parameters. None of them is empty."""
    matrices = set(matrix_parameters(model))
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[Group] = [
        {"params": [pair for pair in named if (pair[1] in matrices) == wanted], "matrices": wanted}
        for wanted in (True, False)
    ]
    return [group for group in groups if group["params"]]
