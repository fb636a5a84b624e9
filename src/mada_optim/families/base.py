"""What a family of optimizers is.

A family is a set of coefficients with the boxes they may move in, the names of the buffers it keeps for every
parameter, and one pure function that turns (buffers, gradient, coefficients) into (direction, new buffers). Everything
else follows from that function: the hypergradient is its derivative, the optimizers are points of it.

A coefficient reaches the function as a 0-dimensional tensor. Frozen at one of certain values (``frozen_at``) it is a
plain float instead, so that the function can leave out what that value makes superfluous (:func:`is_frozen_at`).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.warn import warn

Scalar = Tensor | float
Buffers = Mapping[str, Tensor]
# Names of buffers, and of each how its shape follows from the parameter's.
Shapes = Mapping[str, Callable[[torch.Size], Sequence[int]]]


@dataclass(frozen=True)
class Coefficient:
    """One learnable number of an update rule.

    Args:
        name: keyword under which users set it and the update function finds it.
        default: where it starts.
        box: closed interval in which learning keeps it.
        hyper_lr: default step size α of its gradient descent.
        domain: closed interval outside which the update makes no sense, learned or not.
        frozen_at: values at which, when it is frozen there, it leaves out a part of the update. It is handed to the
            update as a plain float then.
        normalized: its hypergradient is divided by the root of its own running mean square, so that ``hyper_lr`` means
            the same however loss, parameters and learning rate are scaled.
        symbol: how figures and tables call it, see :attr:`label`. Default: its name.
        meaning: what it is, in a few words, for the help of commands and for tables.
    """

    name: str
    default: float
    box: tuple[float, float]
    hyper_lr: float
    domain: tuple[float, float] = (-math.inf, math.inf)
    frozen_at: tuple[float, ...] = ()
    normalized: bool = False
    symbol: str = ""
    meaning: str = ""

    @property
    def label(self) -> str:
        """Its symbol, or else its name."""
        return self.symbol or self.name

    @property
    def special(self) -> tuple[float, ...]:
        """The former name of ``frozen_at``."""
        warn("Coefficient: special is called frozen_at now", DeprecationWarning)
        return self.frozen_at

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the attributes of a pickle, in which ``frozen_at`` may have its former name.

        Args:
            state: attributes by name.
        """
        self.__dict__.update({"frozen_at" if name == "special" else name: value for name, value in state.items()})


def _with_former_name(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor of :class:`Coefficient`, which takes ``special``, too."""

    @functools.wraps(init)
    def initialize(self: Coefficient, *args: Any, **arguments: Any) -> None:
        if "special" in arguments:
            warn("Coefficient: special is called frozen_at now", DeprecationWarning)
            arguments["frozen_at"] = arguments.pop("special")
        init(self, *args, **arguments)

    return initialize


Coefficient.__init__ = _with_former_name(Coefficient.__init__)  # type: ignore[method-assign]


def is_frozen_at(coefficient: Scalar, value: float) -> bool:
    """Return whether a coefficient is frozen at a value, so that the terms it switches off need not be computed.

    Args:
        coefficient: as the update gets it: a tensor where it is learned, a float where it is frozen at one of the
            values of ``frozen_at``.
        value: one of them.

    >>> is_frozen_at(1.0, 1.0), is_frozen_at(torch.tensor(1.0), 1.0)
    (True, False)
    """
    return not isinstance(coefficient, Tensor) and coefficient == value


class Family(ABC):
    """Base class of families; subclass it to define one.

    Attributes:
        coefficients: what can be learned.
        constants: numbers of the update that are not learned, with their defaults; parameter groups may override them.
        elementwise: whether every element of the direction depends on the same element of the inputs alone. The
            optimizer may then cut tensors into pieces or put several end to end. False: whole tensors are handed over.
        prepares: whether :meth:`prepare` is to be called.
    """

    coefficients: ClassVar[tuple[Coefficient, ...]]
    constants: ClassVar[Mapping[str, Any]] = {}
    elementwise: ClassVar[bool] = True
    prepares: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The family's name in checkpoints: the state of one family is never loaded into another."""
        return type(self).__name__

    @abstractmethod
    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the buffers that each parameter needs. All start at zero, with the parameter's shape.

        Args:
            q: as in :meth:`update`. Only which values are plain floats, and their values, may matter.
        """

    @abstractmethod
    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the update rule. Pure: no argument is changed.

        Args:
            state: the buffers, each with the shape of ``grad``; float32, or float64 for float64 parameters.
            grad: gradient g_t, in the dtype of the buffers.
            q: coefficients and constants, by name. Coefficients are 0-dimensional float64 tensors, or floats where
                :func:`is_frozen_at`.
            step: t = 1, 2, ..., a 0-dimensional float64 tensor. Both are float32 on devices without float64.

        Returns:
            The direction Δ_t, by which x_{t+1} = (1 - ηλ) x_t - η Δ_t, and the new buffers.
        """

    def statistics(self, q: Mapping[str, Any]) -> Shapes:  # noqa: ARG002
        """Further buffers, in shapes of their own, such as one number for each row of a matrix.

        Only :meth:`prepare` reads and writes them: :meth:`update` does not get them. They start at zero, in float32
        (float64 for float64 parameters) whatever ``state_dtype`` is. Where the parameter is a DTensor they are DTensors
        on its mesh, and each process has all of them.

        Args:
            q: as in :meth:`buffers`.

        Returns:
            Their names, and for each a function from the parameter's shape to its own.
        """
        return {}

    def prepare(
        self, states: Sequence[Buffers], grads: Sequence[Tensor], q: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Tensor]]:
        """Compute, before a step, what it needs to know of whole tensors: buffers that :meth:`update` only reads.

        Called once a step for the parameters of a group, where :attr:`prepares` says so, also by families that are
        elementwise otherwise. It may depend on constants, not on coefficients: it is not differentiated.

        Args:
            states: the buffers and :meth:`statistics` of each parameter. As everything here, DTensors where the
                parameters are.
            grads: gradients g_t, in their own dtype.
            q: as in :meth:`update`.

        Returns:
            For each parameter, buffers with their new values. Statistics may be plain tensors.
        """
        raise NotImplementedError

    def idle(self, constants: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the names of coefficients that change nothing in a group, so that they cost nothing there.

        Args:
            constants: the family's constants in the group, by name.
        """
        return ()

    def validate_constants(self, constants: Mapping[str, Any]) -> None:  # noqa: B027 (checks are optional)
        """Raise ValueError, naming constant and value, where a constant makes no sense.

        Args:
            constants: the family's constants in a group, by name.
        """
