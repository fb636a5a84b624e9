"""Parameter groups by what the parameters are: matrices, one group for each way in which they lie, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mada_optim.arguments import tensor_of
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.which import classify

Group = dict[str, Any]


def matrix_groups(
    model: nn.Module, matrices: Mapping[str, bool] | None = None, split: Mapping[str, Any] | None = None
) -> list[Group]:
    """Parameter groups of a model: its matrices, marked so, and the other parameters. None of them is empty.

    Matrices that are alone in their parameters come first. Each other layout has a group of its own, with the option
    ``split``. The other parameters are the last group. Frozen parameters are in none.

    Args:
        model: any module.
        matrices, split: the user's word, by patterns of names; see :class:`mada_optim.OMADA`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    >>> [(group["matrices"], [name for name, _ in group["params"]]) for group in matrix_groups(model)]
    [(True, ['0.weight']), (False, ['0.bias', '1.weight', '1.bias'])]
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return by_layout({"params": named}, layouts_of(model, matrices, split))


def layouts_of(
    model: nn.Module, matrices: Mapping[str, bool] | None = None, split: Mapping[str, Any] | None = None
) -> dict[Tensor, Layout | None]:
    """How matrices lie in each parameter of a model; None: it has none. Arguments as of :func:`matrix_groups`."""
    return {param: parameter.layout for param, parameter in classify(model, matrices, split).items()}


def by_layout(group: Group, layouts: Mapping[Tensor, Layout | None], rest_first: bool = False) -> list[Group]:
    """A parameter group as several, by how matrices lie in the parameters.

    Args:
        group: with a list of parameters, which may have names.
        layouts: of parameters; None, or no entry: no matrix.
        rest_first: whether the other parameters come first, and the matrices that are alone come last.
    """
    members: dict[Layout | None, list[Any]] = {Layout(): []}
    for param in group["params"]:
        members.setdefault(layouts.get(tensor_of(param)), []).append(param)
    members[None] = members.pop(None, [])
    groups: list[Group] = [
        {**group, "params": params, "matrices": layout is not None, **_option(layout)}
        for layout, params in members.items()
        if params
    ]
    return groups[::-1] if rest_first else groups


def _option(layout: Layout | None) -> Group:
    plain = layout.plain() if layout is not None else None
    return {} if plain is None else {"split": plain}
