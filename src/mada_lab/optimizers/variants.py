"""MADA and OMADA with one thing changed, to see what that thing is worth."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mada_optim.families import Buffers, MADAFamily
from mada_optim.optimizers.mada import MADA
from mada_optim.optimizers.omada import OMADA, SEARCH, kind_of_group
from mada_optim.scale import LearnedScale, SearchSettings
from mada_optim.scale.search import Member, Search


@dataclass(frozen=True)
class MaximumFamily(MADAFamily):
    """AMSGrad's maximum over past second moments in the place of AVGrad's average."""

    name: str = field(default="MADA with AMSGrad's maximum", init=False)

    def _long_term(self, mean: Tensor, v: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return torch.maximum(mean, v)


@dataclass(frozen=True)
class ZeroedGradientFamily(MADAFamily):
    """The authors' public code, where zeroing the gradients in place zeroes the kept one too: d_t = g_t for t > 1."""

    name: str = field(default="MADA with a zeroed previous gradient", init=False)

    def update(
        self, state: Buffers, grad: Tensor, q: Mapping[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Family.update`."""
        if "previous_grad" in state:
            state = {**state, "previous_grad": torch.zeros_like(grad)}
        return super().update(state, grad, q, step)


class MaximumMADA(MADA):
    """MADA on :class:`MaximumFamily`."""

    family_type: ClassVar[type[MADAFamily]] = MaximumFamily


class ZeroedGradientMADA(MADA):
    """MADA on :class:`ZeroedGradientFamily`."""

    family_type: ClassVar[type[MADAFamily]] = ZeroedGradientFamily


class NextStepSearch(Search):
    """A search that scales the steps to come, not the way gone: x_{t+1} = x_t - κ η_t u_t, h_t = -κ ⟨g_{t+1}, η_t u_t⟩.

    This is the hypergradient descent of Almeida et al. (1998) and Baydin et al. (2018) with the rule of
    :class:`LearnedScale`. A search that is resumed passes over one hypergradient.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._previous: dict[Tensor, Tensor] = {}

    def _follow(self, members: Sequence[Member]) -> tuple[list[Hashable], Tensor]:
        self._applied = self.values
        measured: dict[Hashable, list[Tensor]] = {kind: [] for kind in self._applied}
        for member in members:
            for param in member.group["params"]:
                if param in self._previous and param.grad is not None:
                    gone = (self._previous[param] - param).flatten()
                    measured[member.kind].append(torch.dot(param.grad.flatten(), gone))
                self._previous[param] = param.detach().clone()
        return list(measured), torch.stack([sum(parts, torch.zeros(())) for parts in measured.values()])

    def hold(self, scales: Mapping[Hashable, float] | None = None) -> None:
        """See :meth:`Search.hold`."""
        super().hold(scales)
        self._previous.clear()


class NextStepScale(LearnedScale):
    """The learned scale with :class:`NextStepSearch`."""

    search_type: ClassVar[type[Search]] = NextStepSearch


def searching_omada(
    groups: Sequence[dict[str, Any]], *, one_scale: bool = False, next_step: bool = False, **options: Any
) -> OMADA:
    """Return OMADA with another search.

    Args:
        groups: parameter groups.
        one_scale: matrices and the rest share a scale, instead of having one each.
        next_step: see :class:`NextStepSearch`.
        **options: fields of :class:`SearchSettings`, and arguments of OMADA.
    """
    names = {item.name for item in fields(SearchSettings)}
    changes = {name: options.pop(name) for name in list(options) if name in names}
    optimizer = OMADA(groups, scale=False, **options)
    search = NextStepScale if next_step else LearnedScale
    optimizer.scale = search(optimizer, per=None if one_scale else kind_of_group, settings=replace(SEARCH, **changes))
    return optimizer
