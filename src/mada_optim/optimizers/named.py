"""The base of optimizers that have a name, and the names."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from mada_optim.engine.betas import BETAS, has_betas, split_betas
from mada_optim.families import Family
from mada_optim.optimizers.base import HypergradientOptimizer
from mada_optim.optimizers.options import with_defaults

# The optimizers that :func:`load_optimizer` knows; classes enter themselves.
BY_NAME: dict[str, Any] = {}


class NamedOptimizer(HypergradientOptimizer):
    """The base of optimizers of one family, which take its coefficients by name, beta1 and beta2 as ``betas``.

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
        self, params: ParamsT, family: Family, lr: float | Tensor, weight_decay: float, **arguments: Any
    ) -> None:
        start = split_betas(arguments.pop("betas")) if has_betas(family) else {}
        for coefficient in family.coefficients:
            if coefficient.name in arguments:
                start[coefficient.name] = arguments.pop(coefficient.name)
        super().__init__(params, family, lr, weight_decay, start=start, **arguments)

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """See :meth:`HypergradientOptimizer.frozen_config`.

        >>> import torch
        >>> from mada_optim import MADA
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> MADA([weight], lr=1e-3, **MADA([weight], rho=0.5).frozen_config()).coefficients()["rho"]
        0.5
        """
        values: dict[str, Any] = self.coefficients(group)
        betas = {"betas": tuple(values.pop(name) for name in BETAS)} if has_betas(self.family) else {}
        return {**betas, **values, "hyper_lr": 0.0, **self._frozen_scale()}
