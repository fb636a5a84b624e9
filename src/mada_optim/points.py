"""MADA, AVGrad, and the other named points and subspaces of MADA's family."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mada_optim.betas import split_betas
from mada_optim.coefficients import Bounds, HyperLR
from mada_optim.family import MADAFamily
from mada_optim.optimizer import HypergradientOptimizer, Scale

if TYPE_CHECKING:
    from mada_optim.omada import OMADA

# The optimizers that :func:`load_optimizer` knows; classes enter themselves.
_BY_NAME: dict[str, Any] = {}


class WithBetas(HypergradientOptimizer):
    """Optimizers of families with beta1 and beta2, which users give as ``betas``.

    A subclass may have a name, under which :func:`load_optimizer` knows it, and other defaults of the constructor's
    arguments: ``class Yogi(MADA, name="yogi", c=0.0, hyper_lr=0.0)``.
    """

    def __init_subclass__(cls, name: str | None = None, **defaults: Any) -> None:
        super().__init_subclass__()
        if name is not None:
            _BY_NAME[name] = cls
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


class MADA(WithBetas, name="mada"):
    """Adam, AVGrad, Yogi, Adan and Lion in one update, whose coefficients are learned while the model trains.

    Source: Ozkara et al., "MADA: Meta-Adaptive Optimizers through hyper-gradient Descent", ICML 2024. The update is
    that of :class:`MADAFamily`, the hypergradient that of :mod:`mada_optim.hypergradient`.

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
        bounds: boxes (low, high) of coefficients by name. The others keep theirs: β1 [0.01, 0.99], β2 [0.5, 0.999],
            β3 [0, 0.99], ρ, c and γ [0, 1].
        hyper_momentum, hyper_clip, hyper_warmup, hyper_every, hyper_per_group, foreach, maximize, capturable,
            differentiable, fused, state_dtype, stochastic_rounding, scale: see :class:`HypergradientOptimizer`.

    >>> import torch
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = MADA(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    >>> optimizer.coefficients()
    {'beta1': 0.9, 'beta2': 0.95, 'beta3': 0.0, 'rho': 1.0, 'c': 1.0, 'gamma': 1.0}
    """

    family_type: ClassVar[type[MADAFamily]] = MADAFamily

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        beta3: float = 0.0,
        rho: float = 1.0,
        c: float = 1.0,
        gamma: float = 1.0,
        hyper_lr: HyperLR = None,
        hyper_momentum: float = 0.0,
        hyper_clip: float = 10.0,
        hyper_warmup: int = 50,
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
        scale: Scale = False,
    ) -> None:
        super().__init__(
            params,
            self.family_type(),
            lr,
            weight_decay,
            start={**split_betas(betas), "beta3": beta3, "rho": rho, "c": c, "gamma": gamma},
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
            scale=scale,
            eps=eps,
            lion_betas=lion_betas,
        )


class AVGrad(MADA, name="avgrad"):
    """AMSGrad with the maximum over past second moments replaced by their average (MADA, section 3.1).

    The direction is m̂_t / (√(v̄_t / (1-β2^t)) + ε) with v̄_t the mean of v_1, ..., v_t: MADA at ρ = 0, nothing learned.

    Args:
        params, lr, betas, eps, weight_decay, foreach, maximize, capturable, differentiable, fused, state_dtype,
            stochastic_rounding, scale: as in :class:`MADA`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        scale: Scale = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            rho=0.0,
            hyper_lr=0.0,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            scale=scale,
        )

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """See :meth:`HypergradientOptimizer.frozen_config`: the betas, as there are no other coefficients to set."""
        return {"betas": super().frozen_config(group)["betas"], **self._frozen_scale()}


# The step sizes of Ozkara et al. for language models.
_PAPER_HYPER_LR = {"beta1": 5e-4, "beta2": 5e-4, "beta3": 0.1, "rho": 0.1, "c": 0.1, "gamma": 0.1}


class Adam(MADA, name="adam", weight_decay=0.0, hyper_lr=0.0):
    """Adam: AdamW without weight decay."""


class AdamW(MADA, name="adamw", hyper_lr=0.0):
    """AdamW, the point at which MADA begins, with nothing learned."""


class Adan(MADA, name="adan", betas=(0.98, 0.99), beta3=0.92, hyper_lr=0.0):
    """Adan, without the debiasing of its average of differences."""


class HyperAdam(MADA, name="hyperadam", hyper_lr={"beta1": 5e-4, "beta2": 5e-4}):
    """Adam that learns β1 and β2 alone."""


class Lion(MADA, name="lion", lr=1e-4, gamma=0.0, hyper_lr=0.0):
    """Lion, with decoupled weight decay; its betas are ``lion_betas``."""


class MADAPaper(MADA, name="mada-paper", hyper_lr=_PAPER_HYPER_LR):
    """MADA as in the paper: all six coefficients are learned."""


class Yogi(MADA, name="yogi", c=0.0, hyper_lr=0.0):
    """Yogi, with decoupled weight decay and buffers that start at zero."""


def available_optimizers() -> tuple[str, ...]:
    """Names that :func:`load_optimizer` knows.

    >>> available_optimizers()
    ('adam', 'adamw', 'adan', 'avgrad', 'hyperadam', 'lion', 'mada', 'mada-paper', 'omada', 'yogi')
    """
    return tuple(sorted(_BY_NAME))


@overload
def load_optimizer(name: Literal["omada"]) -> type[OMADA]: ...


@overload
def load_optimizer(name: str) -> type[MADA] | type[OMADA]: ...


def load_optimizer(name: str) -> Any:
    """Return the class of an optimizer by name: a fixed point of the family, a subspace, MADA itself, or OMADA.

    It takes the parameters and :class:`MADA`'s arguments (:class:`AVGrad`'s for ``"avgrad"``), with defaults that make
    it that optimizer. ``"hyperadam"`` learns β1 and β2 only, ``"mada"`` all but β2, ``"mada-paper"`` all six.
    ``"omada"`` takes the model in place of its parameters and finds its learning rate, see :class:`OMADA`. The others
    learn nothing. Yogi's and Lion's weight decay is decoupled, as AdamW's; ``"adam"`` is ``"adamw"`` without weight
    decay.

    Args:
        name: one of :func:`available_optimizers`.

    Raises:
        ValueError: there is no optimizer of that name.

    >>> import torch
    >>> load_optimizer("yogi")([torch.nn.Parameter(torch.zeros(2))], lr=1e-2).coefficients()["c"]
    0.0
    """
    if name not in _BY_NAME:
        raise ValueError(f"name must be one of {', '.join(available_optimizers())}, got {name!r}")
    return _BY_NAME[name]
