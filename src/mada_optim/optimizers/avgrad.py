"""AVGrad, a point of MADA's family of which the paper proves that it converges."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from mada_optim.optimizers.mada import MADA
from mada_optim.optimizers.options import StepOptions, with_options


class AVGrad(MADA, name="avgrad"):
    """AMSGrad with the maximum over past second moments replaced by their average (MADA, section 3.1).

    The direction is m̂_t / (√(v̄_t / (1-β2^t)) + ε) with v̄_t the mean of v_1, ..., v_t: MADA at ρ = 0, nothing learned.

    Args:
        params, lr, betas, eps, weight_decay: as in :class:`MADA`.
        others: see :class:`HypergradientOptimizer`.
    """

    @with_options(StepOptions)
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, rho=0.0, hyper_lr=0.0, **options)

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """See :meth:`HypergradientOptimizer.frozen_config`: the betas, as there are no other coefficients to set."""
        return {"betas": super().frozen_config(group)["betas"], **self._frozen_scale()}
