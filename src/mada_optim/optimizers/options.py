"""The keyword arguments of optimizers, each written once: its name, type and default.

Constructors take them as ``**options: Unpack[...]``, so that type checkers know their names and types. Each default
stands beside its type, ``Annotated[type, default]``. :func:`with_options` spells all of them out in the constructor's
signature, which ``help()``, completion and frameworks read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Annotated, Any, TypeVar

import torch
from typing_extensions import TypedDict, get_type_hints

from mada_optim.arguments import to_python
from mada_optim.learning import Bounds, HyperLR

Scale = bool | Mapping[str, float]
Constructor = TypeVar("Constructor", bound=Callable[..., None])


class LearningOptions(TypedDict, total=False):
    """How coefficients are learned."""

    hyper_lr: Annotated[HyperLR, None]
    hyper_momentum: Annotated[float, 0.0]
    hyper_clip: Annotated[float, 10.0]
    hyper_warmup: Annotated[int, 50]
    hyper_every: Annotated[int, 1]
    hyper_delay: Annotated[int, 0]
    bounds: Annotated[Bounds | None, None]
    hyper_per_group: Annotated[bool, False]


class StepOptions(TypedDict, total=False):
    """How parameters take their steps, whether or not coefficients are learned."""

    foreach: Annotated[bool | None, None]
    maximize: Annotated[bool, False]
    capturable: Annotated[bool, False]
    differentiable: Annotated[bool, False]
    fused: Annotated[bool | None, None]
    state_dtype: Annotated[torch.dtype | None, None]
    stochastic_rounding: Annotated[bool, False]
    scale: Annotated[Scale, False]


class Options(LearningOptions, StepOptions, total=False):
    """The options of every optimizer that can learn coefficients."""


def read_scale(scale: Any) -> Scale:
    """Return the argument ``scale``. Raises TypeError where it is neither a bool nor a mapping."""
    scale = to_python(scale)
    if not isinstance(scale, (bool, Mapping)):
        raise TypeError(
            "scale must be True, False, or a mapping from kinds of parameters to learning rates, as "
            f"frozen_config() returns it, got {scale!r}"
        )
    return scale


def with_options(options: type[Mapping[str, Any]], *, keep_rest: bool = False) -> Callable[[Constructor], Constructor]:
    """Return a decorator of a constructor that spells out options in its signature, in place of its ``**``.

    The constructor is called with every option, by default or as the user set it. It refuses unknown names.

    Args:
        options: a TypedDict whose types are ``Annotated[type, default]``.
        keep_rest: whether the constructor's ``**`` takes further names as well, which it checks itself.
    """

    def decorate(init: Constructor) -> Constructor:
        signature = inspect.signature(init)
        *arguments, rest = signature.parameters.values()
        arguments += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=hint.__metadata__[0], annotation=hint.__origin__)
            for name, hint in get_type_hints(options, include_extras=True).items()
        ]
        return _called_with_all(init, signature.replace(parameters=[*arguments, rest] if keep_rest else arguments))

    return decorate


def with_defaults(init: Constructor, defaults: Mapping[str, Any]) -> Constructor:
    """Return a constructor with other defaults, by name; their places among the arguments stay."""
    signature = inspect.signature(init)
    unknown = [name for name in defaults if name not in signature.parameters]
    if unknown:
        raise TypeError(f"no argument {unknown[0]!r}, whose default could be replaced")
    arguments = [
        argument.replace(default=defaults.get(argument.name, argument.default))
        for argument in signature.parameters.values()
    ]
    return _called_with_all(init, signature.replace(parameters=arguments))


def _called_with_all(init: Constructor, signature: Signature) -> Constructor:
    """Return a constructor with another signature, which calls ``init`` with a value for each of its arguments."""

    @functools.wraps(init)
    def initialize(self: object, *args: Any, **kwargs: Any) -> None:
        try:
            arguments = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            got = "got " if str(error).startswith(("multiple values", "too many")) else ""
            raise TypeError(f"{type(self).__name__}.__init__() {got}{error}") from None
        arguments.apply_defaults()
        init(*arguments.args, **arguments.kwargs)

    initialize.__signature__ = signature  # type: ignore[attr-defined]
    types = {argument.name: argument.annotation for argument in signature.parameters.values()}
    initialize.__annotations__ = {**{k: v for k, v in types.items() if k != "self"}, "return": None}
    return initialize  # type: ignore[return-value]
