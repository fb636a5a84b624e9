"""Optimizers by name, and the base of those that have betas."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from mada_optim.engine.betas import split_betas
from mada_optim.families import Family
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.optimizers.options import with_defaults

# The optimizers that :func:`load_optimizer` knows; classes enter themselves.
BY_NAME: dict[str, Any] = {}


class WithBetas(HypergradientOptimizer):
    """Optimizers of families with beta1 and beta2, which users give as ``betas``.

    A subclass may have a name, under which :func:`load_optimizer` knows it, and other defaults of the constructor's
    arguments: ``class Yogi(MADA, name="yogi", c=0.0, hyper_lr=0.0)``.
    """

    def __init_subclass__(cls, name: str | None = None, **defaults: Any) -> None:
        super().__init_subclass__()
        if name is not None:
            BY_NAME[name] = cls
        if defaults:
            cls.__init__ = with_defaults(cls.__init__, defaults)  # type: ignore[method-assign]

    def __init__(
        self,
        params: ParamsT,
        family: Family,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **options: Any,
    ) -> None:
        start = split_betas(betas)
        for coefficient in family.coefficients:
            if coefficient.name in options:
                start[coefficient.name] = options.pop(coefficient.name)
        super().__init__(params, family, lr, weight_decay, start=start, eps=eps, **options)

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """See :meth:`HypergradientOptimizer.frozen_config`.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> MADA([weight], lr=1e-3, **MADA([weight], rho=0.5).frozen_config()).coefficients()["rho"]
        0.5
        """
        values = self.coefficients(group)
        return {"betas": (values.pop("beta1"), values.pop("beta2")), **values, "hyper_lr": 0.0, **self._frozen_scale()}
