"""MADA, all of whose coefficients are learned."""

from __future__ import annotations

from typing import Annotated, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, Unpack

from mada_optim.families import MADAFamily
from mada_optim.optimizers.named import NamedOptimizer
from mada_optim.optimizers.options import LearningOptions, StepOptions, with_options


class MADAStart(TypedDict, total=False):
    """Where MADA's coefficients start, beside the betas."""

    beta3: Annotated[float, 0.0]
    rho: Annotated[float, 1.0]
    c: Annotated[float, 1.0]
    gamma: Annotated[float, 1.0]


class LionOptions(TypedDict, total=False):
    """Lion's constants."""

    lion_betas: Annotated[tuple[float, float], (0.95, 0.98)]


class MADAOptions(MADAStart, LearningOptions, LionOptions, StepOptions, total=False):
    """The options of MADA, in the order in which they are shown."""


class MADA(NamedOptimizer, name="mada", hyper_delay=1):
    """Adam, AVGrad, Yogi, Adan and Lion in one update, whose coefficients are learned while the model trains.

    Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through hyper-gradient Descent", ICML 2024. The update is
    that of :class:`MADAFamily`, the hypergradient that of :mod:`mada_optim.learning.hypergradient`.

    Args:
        params: as in torch.optim.
        lr: learning rate η. Default: 1e-3.
        betas: where β1 and β2 start; groups have them as options while β1 is not learned. Default: (0.9, 0.999).
        eps: ε, added to the denominator. Default: 1e-8.
        weight_decay: decoupled weight decay λ. Default: 1e-2.
        beta3: where β3 starts, the share of Adan's gradient differences. Default: 0.0.
        rho: where ρ starts: 1 is Adam's second moment, 0 AVGrad's average of it. Default: 1.0.
        c: where c starts: 1 is Adam's second moment, 0 Yogi's. Default: 1.0.
        gamma: where γ starts: 1 is Adam's direction, 0 Lion's. Default: 1.0.
        lion_betas: κ, the two momentum coefficients of Lion, not learned. Default: (0.95, 0.98).
        hyper_lr: step sizes of the coefficients. None, the default: 5e-4 for β1, 0 for β2, 0.1 for the others. The
            authors learn β2 with 5e-4, too: ``load_optimizer("mada-paper")``. A number: one for all. A mapping,
            ``{"beta1": 5e-4, "rho": 0.1}``: coefficients that it does not name are frozen. 0.0: nothing is learned.
        hyper_delay: 1, the default: a hypergradient is used one step later, so a step is one pass over memory. 0: as in
            the paper, in two passes.
        bounds: boxes (low, high) of coefficients by name. The others keep theirs: β1 [0.01, 0.99], β2 [0.5, 0.999],
            β3 [0, 0.99], ρ, c and γ [0, 1].
        others: see :class:`HypergradientOptimizer`.

    >>> import torch
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = MADA(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    >>> optimizer.coefficients()
    {'beta1': 0.9, 'beta2': 0.95, 'beta3': 0.0, 'rho': 1.0, 'c': 1.0, 'gamma': 1.0}
    """

    family_type: ClassVar[type[MADAFamily]] = MADAFamily

    @with_options(MADAOptions)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[MADAOptions],
    ) -> None:
        super().__init__(params, self.family_type(), lr, weight_decay, betas=betas, eps=eps, **options)
