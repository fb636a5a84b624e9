"""OMADA: MADA's family, Muon's direction for matrices and a factor of the learning rate, found by the hypergradient.

The name is Greek for a team.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from mada_optim.coefficients import Bounds, HyperLR
from mada_optim.engine import Group
from mada_optim.family import OMADAFamily
from mada_optim.matrices import matrix_parameters
from mada_optim.optimizer import HypergradientOptimizer
from mada_optim.points import WithBetas, split_betas


class OMADA(WithBetas, HypergradientOptimizer):
    """AdamW to begin with, which finds out by itself how much of Muon it wants to be, and how large its steps.

    The update is that of :class:`OMADAFamily`. Give it the model, and it sees which parameters are matrices
    (:func:`matrix_parameters`: weights of two and more dimensions, but for embeddings and the output layer)::

        optimizer = OMADA(model, lr=3e-3)

    Or say so by parameter group: ``[{"params": hidden, "matrices": True}, {"params": others}]``.

    Args:
        params: a model, or as in torch.optim.
        lr: learning rate η, which the learned factor κ multiplies. Default: 3e-3.
        betas: where β1 and β2 start. Default: (0.9, 0.99).
        eps, weight_decay, beta3, rho, c, gamma, lion_betas: as in :class:`MADA`.
        ortho: where ω starts, the weight of the orthogonalized direction in the step of a matrix. Default: 0.0.
        scale: where κ starts. Default: 0.1. From below it finds its way in some 50 steps after the warm-up; steps
            that are too large at first are not taken back.
        ortho_momentum: μ, the momentum of the orthogonalized direction. Default: 0.95.
        hyper_lr: step sizes of the coefficients, in the forms that :class:`MADA` takes. None, the default: 0.1 for ω
            and κ, 0 for the others. The hypergradients of ω and κ are normalized: 0.1 is the length of a step when all
            hypergradients agree; κ's step is a share of it. Both fall with the eighth power of the learning rate, once
            that falls. MADA's coefficients can be learned with them: ``{"ortho": 0.1, "scale": 0.1, "rho": 0.1}``.
        bounds: boxes (low, high) of coefficients by name. The others keep theirs: MADA's, ω [0, 1], κ [0.001, 1000].
        hyper_momentum, hyper_clip, hyper_warmup, hyper_every, hyper_per_group, foreach, maximize, capturable,
            differentiable, fused, state_dtype, stochastic_rounding: see :class:`HypergradientOptimizer`.

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
        scale: float = 0.1,
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
