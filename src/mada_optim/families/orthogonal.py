"""Mixtures of a family's direction with the orthogonalized momentum. OMADA's family mixes MADA's with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.families.base import Buffers, Coefficient, Family, Shapes, is_frozen_at
from mada_optim.families.mada import MADAFamily
from mada_optim.matrices import Layout, check_options, normalize_rows, orthogonalize_shared
from mada_optim.tensors.distributed import whole


def _share(name: str, symbol: str, meaning: str, default: float) -> Coefficient:
    unit = (0.0, 1.0)
    options: dict[str, Any] = {"domain": unit, "frozen_at": (0.0, 1.0), "normalized": True}
    return Coefficient(name, default, unit, 0.0, symbol=symbol, meaning=meaning, **options)


class OrthogonalMixture(Family):
    """The direction D_t of another family and the orthogonalized momentum O_t, mixed by ω; ν normalizes O_t's rows.

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
    as by the other family. Nothing is differentiated through orthogonalization and normalization:
    ∂Δ/∂ω = (1-ν) O_t + ν N_t - D_t and ∂Δ/∂ν = ω (N_t - O_t).

    Frozen at ν = 0, nothing of N_t is computed or kept. Frozen at ν = 1, ``ortho`` is N_t, and the numbers of the rows
    are all that is kept beside what Muon keeps.

    A subclass names the other family: ``class Mine(OrthogonalMixture): inner = MyFamily()``.

    Attributes:
        inner: the other family. Its coefficients are frozen by default.
        distribute: whether all ranks hold the same plain parameters and divide their orthogonalization.
    """

    inner: ClassVar[Family]
    prepares: ClassVar[bool] = True
    distribute: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "inner"):
            raise TypeError(f"{cls.__name__}: a mixture must name the family that it mixes, inner = MyFamily()")
        if "inner" not in vars(cls):
            return  # what a class inherits follows from the family of the one above
        derived = {
            "elementwise": cls.inner.elementwise,
            "coefficients": (
                # Learning them costs memory and gains nothing beside the orthogonalized direction.
                *(replace(coefficient, hyper_lr=0.0) for coefficient in cls.inner.coefficients),
                _share("ortho", "ω", "direction of matrices: 1 is Muon's", 1.0),
                _share("row_norm", "ν", "rows of Muon's direction: 1 normalizes them", 0.0),
            ),
            "constants": {
                **cls.inner.constants,
                "matrices": False,
                "split": None,
                "ortho_momentum": 0.95,
                "row_beta": 0.95,
                "ns_steps": None,
                "ns_coefficients": None,
                "adjust_lr_fn": "match_rms_adamw",
            },
        }
        for name, value in derived.items():
            if name not in vars(cls):
                setattr(cls, name, value)

    def buffers(self, q: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.buffers`.

        >>> adam = {"beta3": 0.0, "rho": 1.0, "gamma": 1.0}
        >>> OMADAFamily().buffers({**adam, "matrices": True, "ortho": 1.0, "row_norm": 0.0})
        ('ortho_exp_avg', 'ortho')
        """
        if not q["matrices"] or is_frozen_at(q["ortho"], 0.0):
            return self.inner.buffers(q)
        ours: tuple[str, ...] = ("ortho_exp_avg", "ortho")
        if not (is_frozen_at(q["row_norm"], 0.0) or is_frozen_at(q["row_norm"], 1.0)):
            ours += ("ortho_normalized",)
        return ours if is_frozen_at(q["ortho"], 1.0) else (*self.inner.buffers(q), *ours)

    def statistics(self, q: Mapping[str, Any]) -> Shapes:
        """See :meth:`Family.statistics`: r_t, unless ν is frozen at 0."""
        if not q["matrices"] or is_frozen_at(q["ortho"], 0.0) or is_frozen_at(q["row_norm"], 0.0):
            return {}
        return {"ortho_row_sq": Layout.read(q["split"]).row_shape}

    def idle(self, constants: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`Family.idle`: ω and ν where there are no matrices."""
        idle = self.inner.idle({name: constants[name] for name in self.inner.constants})
        return idle if constants["matrices"] else (*idle, "ortho", "row_norm")

    def prepare(
        self, states: Sequence[Buffers], grads: Sequence[Tensor], q: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Tensor]]:
        """See :meth:`Family.prepare`. Ranks over which matrices are spread divide the orthogonalization."""
        if not q["matrices"] or is_frozen_at(q["ortho"], 0.0):
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
        if is_frozen_at(q["row_norm"], 0.0):
            return {"ortho": o}
        n, squares = normalize_rows(o, whole(state["ortho_row_sq"]), q["row_beta"], layout, q["adjust_lr_fn"])
        kept = {"ortho": n} if is_frozen_at(q["row_norm"], 1.0) else {"ortho": o, "ortho_normalized": n}
        return {**kept, "ortho_row_sq": squares}

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        if "ortho" not in state:
            return self.inner.update(state, grad, q, step)
        weight, orthogonal = q["ortho"], state["ortho"]
        if "ortho_normalized" in state:
            orthogonal = (1 - q["row_norm"]) * orthogonal + q["row_norm"] * state["ortho_normalized"]
        if is_frozen_at(weight, 1.0):
            return orthogonal, {}
        direction, new = self.inner.update(state, grad, q, step)
        return (1 - weight) * direction + weight * orthogonal, new

    def validate_constants(self, constants: Mapping[str, Any]) -> None:
        """See :meth:`Family.validate_constants`."""
        self.inner.validate_constants({name: constants[name] for name in self.inner.constants})
        for name in ("ortho_momentum", "row_beta"):
            beta = constants[name]
            if not (isinstance(beta, (int, float)) and 0.0 <= beta < 1.0):
                raise ValueError(f"{name} must be a number in [0, 1), got {beta!r}")
        matrices = constants["matrices"]
        if not isinstance(matrices, bool):
            raise ValueError(f"matrices must be a bool, got {matrices!r}")
        Layout.read(constants["split"])
        check_options(**_muon_options(constants))


@dataclass(frozen=True)
class OMADAFamily(OrthogonalMixture):
    """MADA's direction and the orthogonalized momentum, mixed: see :class:`OrthogonalMixture`.

    Args:
        distribute: whether all ranks hold the same plain parameters and divide their orthogonalization. Default: False.
    """

    inner: ClassVar[Family] = MADAFamily()
    distribute: bool = False
    name: str = field(default="OMADA-2", init=False)  # the first learned a factor of the steps to come


def _muon_options(constants: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the orthogonalization."""
    return {name: constants[name] for name in ("ns_steps", "ns_coefficients", "adjust_lr_fn")}
