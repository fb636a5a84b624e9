"""Optimizers by name, and the base of those that have betas."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mada_optim.optimizers.base import HypergradientOptimizer

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
            cls.__init__ = _with_defaults(cls.__init__, defaults)  # type: ignore[method-assign]

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """See :meth:`HypergradientOptimizer.frozen_config`.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> MADA([weight], lr=1e-3, **MADA([weight], rho=0.5).frozen_config()).coefficients()["rho"]
        0.5
        """
        values = self.coefficients(group)
        return {"betas": (values.pop("beta1"), values.pop("beta2")), **values, "hyper_lr": 0.0, **self._frozen_scale()}


def _with_defaults(init: Callable[..., None], defaults: dict[str, Any]) -> Callable[..., None]:
    """A constructor with other defaults, by name; their places among the arguments stay."""
    signature = inspect.signature(init)
    unknown = [name for name in defaults if name not in signature.parameters]
    if unknown:
        raise TypeError(f"no argument {unknown[0]!r}, whose default could be replaced")
    replaced = [one.replace(default=defaults.get(one.name, one.default)) for one in signature.parameters.values()]
    signature = signature.replace(parameters=replaced)

    @functools.wraps(init)
    def initialize(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        init(*arguments.args, **arguments.kwargs)

    initialize.__signature__ = signature  # type: ignore[attr-defined]
    return initialize
