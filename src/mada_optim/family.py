"""What a family of optimizers is, and the families of MADA and OMADA: the updates, written once.

A family is a set of coefficients with the boxes they may move in, the names of the buffers it keeps for every
parameter, and one pure function that turns (buffers, gradient, coefficients) into (direction, new buffers). Everything
else follows from that function: the hypergradient is its derivative, the optimizers are points of it.

A coefficient reaches the function as a 0-dimensional tensor. Frozen at one of its *special* values it is a plain float
instead, so that the function can leave out what that value makes superfluous (:func:`is_special`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.matrices import Layout, check_options, normalize_rows, orthogonalize_shared
from mada_optim.sharding import whole

Scalar = Tensor | float
Buffers = Mapping[str, Tensor]
# Names of buffers, and of each how its shape follows from the parameter's.
Shapes = Mapping[str, Callable[[torch.Size], Sequence[int]]]

BELOW_ONE = math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Coefficient:
    """One learnable number of an update rule.

    Args:
        name: keyword under which users set it and the update function finds it.
        default: where it starts.
        box: closed interval in which learning keeps it.
        hyper_lr: default step size α of its gradient descent.
        domain: closed interval outside which the update makes no sense, learned or not.
        special: values at which, when frozen, it is handed to the update as a plain float.
        normalized: its hypergradient is divided by the root of its own running mean square, so that ``hyper_lr`` means
            the same however loss, parameters and learning rate are scaled.
    """

    name: str
    default: float
    box: tuple[float, float]
    hyper_lr: float
    domain: tuple[float, float] = (-math.inf, math.inf)
    special: tuple[float, ...] = ()
    normalized: bool = False


def is_special(coefficient: Scalar, value: float) -> bool:
    """Return whether a coefficient is frozen at a value, so that the terms it switches off need not be computed.

    Args:
        coefficient: as the update gets it: a tensor where it is learned, a float where it is frozen at a special value.
        value: one of the coefficient's ``special`` values.

    >>> is_special(1.0, 1.0), is_special(torch.tensor(1.0), 1.0)
    (True, False)
    """
    return not isinstance(coefficient, Tensor) and coefficient == value


def root(x: Tensor) -> Tensor:
    """Return the square root, with a derivative of 0 at 0: elements that never saw a gradient must not yield NaN.

    Args:
        x: any shape, not negative.

    >>> torch.func.grad(root)(torch.tensor(0.0))
    tensor(0.)
    """
    nonzero = x != 0
    return torch.where(nonzero, torch.sqrt(torch.where(nonzero, x, 1.0)), 0.0)


def cut(grad: Tensor) -> Tensor:
    """Gradients whose square, or what is computed from it, would overflow, cut to the largest one that is safe.

    That is 7.2e16 in float32. What is not finite becomes NaN, so that it is seen.

    >>> cut(torch.tensor([1.0, -1e30, float("inf")]))
    tensor([ 1.0000e+00, -7.2058e+16,         nan])
    """
    largest = math.sqrt(torch.finfo(grad.dtype).max) / 256
    return grad.clamp(-largest, largest) + 0 * grad


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
        """Recorded in checkpoints, so that the state of one family is never loaded into another."""
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
            q: coefficients (0-dimensional float64 tensors, or floats where :func:`is_special`) and constants, by name.
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


def _beta(name: str, default: float, box: tuple[float, float], hyper_lr: float, **kwargs: Any) -> Coefficient:
    return Coefficient(name, default, box, hyper_lr, domain=(0.0, BELOW_ONE), **kwargs)


def _weight(name: str, special: tuple[float, ...]) -> Coefficient:
    return Coefficient(name, 1.0, (0.0, 1.0), 0.1, domain=(0.0, 1.0), special=special)


@dataclass(frozen=True)
class MADAFamily(Family):
    """The family of MADA, which contains Adam, AVGrad, Yogi, Adan and Lion (Ozkara et al., ICML 2024, section 3).

    With g the gradient and d_t = g_t - g_{t-1} its change (d_1 = 0)::

        m_t = β1 m_{t-1} + (1-β1) g_t                                   exp_avg
        n_t = β3 n_{t-1} + (1-β3) d_t                                   exp_avg_diff
        ĝ_t = g_t + β3 d_t
        y_t = v_{t-1} + sign(ĝ_t² - v_{t-1}) ĝ_t²                       Yogi's target
        v_t = β2 v_{t-1} + (1-β2) (c ĝ_t² + (1-c) y_t)                  exp_avg_sq
        v̄_t = v̄_{t-1} + (v_t - v̄_{t-1})/t                               mean_exp_avg_sq
        V_t = (ρ v_t + (1-ρ) v̄_t) / (1-β2^t)
        a_t = (m_t/(1-β1^t) + β3 n_t) / (√V_t + ε)
        u_t = κ1 l_{t-1} + (1-κ1) g_t ;  l_t = κ2 l_{t-1} + (1-κ2) g_t   lion_exp_avg
        Δ_t = γ a_t + (1-γ) sign(u_t)

    Elements of g_t beyond ±7.2e16 (in float32) count as that, see :func:`cut`. (torch's AdamW never moves an element
    again once its squared gradient has overflowed.)

    Buffers that no learned or non-neutral coefficient needs are neither kept nor computed: at Adam's point
    (β3 = 0, ρ = c = γ = 1, frozen) two are left, at Lion's (γ = 0) one.
    """

    coefficients: ClassVar[tuple[Coefficient, ...]] = (
        _beta("beta1", 0.9, (0.01, 0.99), 5e-4),
        # Not learned unless the user wants it: measured, that costs what the others gain.
        _beta("beta2", 0.999, (0.5, 0.999), 0.0),
        _beta("beta3", 0.0, (0.0, 0.99), 0.1, special=(0.0,)),
        _weight("rho", special=(1.0,)),
        _weight("c", special=(1.0,)),
        _weight("gamma", special=(0.0, 1.0)),
    )
    constants: ClassVar[Mapping[str, Any]] = {"eps": 1e-8, "lion_betas": (0.95, 0.98)}
    name: str = field(default="MADA", init=False)

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.buffers`.

        >>> MADAFamily().buffers({"beta3": 0.0, "rho": 1.0, "gamma": 1.0})
        ('exp_avg', 'exp_avg_sq')
        """
        names: list[str] = []
        if not is_special(q["gamma"], 0.0):
            names += ["exp_avg", "exp_avg_sq"]
            if not is_special(q["rho"], 1.0):
                names += ["mean_exp_avg_sq"]
            if not is_special(q["beta3"], 0.0):
                names += ["exp_avg_diff", "previous_grad"]
        if not is_special(q["gamma"], 1.0):
            names += ["lion_exp_avg"]
        return tuple(names)

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        gamma, grad = q["gamma"], cut(grad)
        if is_special(gamma, 1.0):
            return self._adaptive(state, grad, q, step)
        if is_special(gamma, 0.0):
            return self._sign(state, grad, q)
        adaptive, adaptive_state = self._adaptive(state, grad, q, step)
        sign, sign_state = self._sign(state, grad, q)
        return gamma * adaptive + (1 - gamma) * sign, adaptive_state | sign_state

    def _adaptive(self, state: Buffers, g: Tensor, q: Mapping[str, Any], t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """a_t: Adam, AVGrad, Yogi and Adan."""
        beta1, beta2, beta3, rho, c = (q[name] for name in ("beta1", "beta2", "beta3", "rho", "c"))
        new: dict[str, Tensor] = {}

        m = new["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        numerator = m / (1 - beta1**t)
        lookahead = g
        if "exp_avg_diff" in state:
            d = torch.where(t > 1, g - state["previous_grad"], 0.0)
            n = new["exp_avg_diff"] = beta3 * state["exp_avg_diff"] + (1 - beta3) * d
            new["previous_grad"] = g
            numerator = numerator + beta3 * n
            lookahead = g + beta3 * d

        v = state["exp_avg_sq"]
        square = lookahead * lookahead
        target = square
        if not is_special(c, 1.0):
            yogi = v + torch.sign(square - v) * square
            target = c * square + (1 - c) * yogi
        v = new["exp_avg_sq"] = beta2 * v + (1 - beta2) * target
        if "mean_exp_avg_sq" in state:
            mean = new["mean_exp_avg_sq"] = self._long_term(state["mean_exp_avg_sq"], v, t)
            v = rho * v + (1 - rho) * mean
        return numerator / (root(v / (1 - beta2**t)) + q["eps"]), new

    def _long_term(self, mean: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """v̄_t: AVGrad's average over all second moments so far."""
        return mean + (v - mean) / t

    def _sign(self, state: Buffers, g: Tensor, q: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """sign(u_t): Lion."""
        momentum = state["lion_exp_avg"]
        kappa1, kappa2 = q["lion_betas"]
        u = kappa1 * momentum + (1 - kappa1) * g
        # torch.sign(NaN) is 0, which would hide it.
        return torch.sign(u) + 0 * u, {"lion_exp_avg": kappa2 * momentum + (1 - kappa2) * g}

    def validate_constants(self, constants: Mapping[str, Any]) -> None:
        """See :meth:`Family.validate_constants`."""
        eps, lion_betas = constants["eps"], constants["lion_betas"]
        if not (isinstance(eps, (int, float)) and 0.0 <= eps < math.inf):
            raise ValueError(f"eps must be a finite number >= 0, got {eps!r}")
        if not (
            isinstance(lion_betas, (tuple, list))
            and len(lion_betas) == 2
            and all(isinstance(beta, (int, float)) and 0.0 <= beta <= 1.0 for beta in lion_betas)
        ):
            raise ValueError(f"lion_betas must be two numbers in [0, 1], got {lion_betas!r}")


@dataclass(frozen=True)
class OMADAFamily(MADAFamily):
    """MADA's direction D_t and the orthogonalized momentum O_t, mixed by a weight ω; ν normalizes the rows of O_t.

    With μ = ``ortho_momentum`` and β = ``row_beta``, for the parameters of groups with ``matrices=True``, each of which
    is one matrix or several, as ``split`` says (:meth:`Layout.read`)::

        M_t = μ M_{t-1} + (1-μ) g_t                                 ortho_exp_avg
        U_t = orthogonal(μ M_t + (1-μ) g_t)                         Nesterov; see orthogonalize
        O_t = 0.2 √max(rows, columns) U_t                           ortho; the factor: ``adjust_lr_fn``
        r_t = β r_{t-1} + (1-β) mean of U_t² over each row          ortho_row_sq, one number a row
        N_t = O_t / (√r_t + 1e-8), rescaled to O_t's norm           ortho_normalized
        Δ_t = (1-ω) D_t + ω ((1-ν) O_t + ν N_t)

    and for all others Δ_t = D_t. (``ns_steps``, ``ns_coefficients``, ``adjust_lr_fn``: conventions of torch.optim.Muon,
    see :func:`orthogonalize`.) At ω = 1 matrices are optimized as by torch.optim.Muon (ν = 0) or by NorMuon (ν = 1;
    Z. Li et al., "NorMuon: Making Muon more efficient and scalable", 2025, https://arxiv.org/abs/2510.05491), at ω = 0
    this is MADA. Nothing is differentiated through orthogonalization and normalization:
    ∂Δ/∂ω = (1-ν) O_t + ν N_t - D_t and ∂Δ/∂ν = ω (N_t - O_t).

    Frozen at ν = 0, nothing of N_t is computed or kept. Frozen at ν = 1, ``ortho`` is N_t, and the numbers of the rows
    are all that is kept beside what Muon keeps.

    Args:
        distribute: whether all ranks hold the same plain parameters and divide their orthogonalization. Default: False.
    """

    coefficients: ClassVar[tuple[Coefficient, ...]] = (
        # Frozen by default: learning them costs memory and gains nothing beside the orthogonalized direction.
        *(replace(coefficient, hyper_lr=0.0) for coefficient in MADAFamily.coefficients),
        Coefficient("ortho", 1.0, (0.0, 1.0), 0.0, domain=(0.0, 1.0), special=(0.0, 1.0), normalized=True),
        Coefficient("row_norm", 0.0, (0.0, 1.0), 0.0, domain=(0.0, 1.0), special=(0.0, 1.0), normalized=True),
    )
    constants: ClassVar[Mapping[str, Any]] = {
        **MADAFamily.constants,
        "matrices": False,
        "split": None,
        "ortho_momentum": 0.95,
        "row_beta": 0.95,
        "ns_steps": None,
        "ns_coefficients": None,
        "adjust_lr_fn": "match_rms_adamw",
    }
    prepares: ClassVar[bool] = True
    distribute: bool = False
    name: str = field(default="OMADA-2", init=False)  # the first learned a factor of the steps to come

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.buffers`.

        >>> adam = {"beta3": 0.0, "rho": 1.0, "gamma": 1.0}
        >>> OMADAFamily().buffers({**adam, "matrices": True, "ortho": 1.0, "row_norm": 0.0})
        ('ortho_exp_avg', 'ortho')
        """
        if not q["matrices"] or is_special(q["ortho"], 0.0):
            return super().buffers(q)
        ours: tuple[str, ...] = ("ortho_exp_avg", "ortho")
        if not (is_special(q["row_norm"], 0.0) or is_special(q["row_norm"], 1.0)):
            ours += ("ortho_normalized",)
        return ours if is_special(q["ortho"], 1.0) else (*super().buffers(q), *ours)

    def statistics(self, q: Mapping[str, Any]) -> Shapes:
        """See :meth:`Family.statistics`: r_t, unless ν is frozen at 0."""
        if not q["matrices"] or is_special(q["ortho"], 0.0) or is_special(q["row_norm"], 0.0):
            return {}
        return {"ortho_row_sq": Layout.read(q["split"]).row_shape}

    def idle(self, constants: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.idle`: ω and ν where there are no matrices."""
        return () if constants["matrices"] else ("ortho", "row_norm")

    def prepare(
        self, states: Sequence[Buffers], grads: Sequence[Tensor], q: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Tensor]]:
        """See :meth:`Family.prepare`. Ranks over which matrices are spread divide the orthogonalization."""
        if not q["matrices"] or is_special(q["ortho"], 0.0):
            return [{} for _ in states]
        mu, layout = q["ortho_momentum"], Layout.read(q["split"])
        wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in grads]
        averages = [state["ortho_exp_avg"].to(g.dtype).lerp(g, 1 - mu) for state, g in zip(states, wide, strict=True)]
        ahead = [g.lerp(average, mu) for g, average in zip(wide, averages, strict=True)]
        directions = orthogonalize_shared(ahead, layout, self.distribute, **_muon_options(q))
        return [
            {"ortho_exp_avg": average, **self._normalize(o, state, q, layout)}
            for average, o, state in zip(averages, directions, states, strict=True)
        ]

    def _normalize(self, o: Tensor, state: Buffers, q: Mapping[str, Any], layout: Layout) -> dict[str, Tensor]:
        """O_t and N_t, as far as they are kept, and r_t."""
        if is_special(q["row_norm"], 0.0):
            return {"ortho": o}
        n, squares = normalize_rows(o, whole(state["ortho_row_sq"]), q["row_beta"], layout, q["adjust_lr_fn"])
        kept = {"ortho": n} if is_special(q["row_norm"], 1.0) else {"ortho": o, "ortho_normalized": n}
        return {**kept, "ortho_row_sq": squares}

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        if "ortho" not in state:
            return super().update(state, grad, q, step)
        weight, orthogonal = q["ortho"], state["ortho"]
        if "ortho_normalized" in state:
            orthogonal = (1 - q["row_norm"]) * orthogonal + q["row_norm"] * state["ortho_normalized"]
        if is_special(weight, 1.0):
            return orthogonal, {}
        direction, new = super().update(state, grad, q, step)
        return (1 - weight) * direction + weight * orthogonal, new

    def validate_constants(self, constants: Mapping[str, Any]) -> None:
        """See :meth:`Family.validate_constants`."""
        super().validate_constants(constants)
        for name in ("ortho_momentum", "row_beta"):
            beta = constants[name]
            if not (isinstance(beta, (int, float)) and 0.0 <= beta < 1.0):
                raise ValueError(f"{name} must be a number in [0, 1), got {beta!r}")
        matrices = constants["matrices"]
        if not isinstance(matrices, bool):
            raise ValueError(f"matrices must be a bool, got {matrices!r}")
        Layout.read(constants["split"])
        check_options(**_muon_options(constants))


def _muon_options(constants: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the orthogonalization."""
    return {name: constants[name] for name in ("ns_steps", "ns_coefficients", "adjust_lr_fn")}
