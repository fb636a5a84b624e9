"""Which parameters of a model are matrices, and how these lie in their tensors: by the rules, or as the user says."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mada_optim.matrices.layout import Layout
from mada_optim.matrices.outputs import output_layers
from mada_optim.matrices.rules import LIMITS, RULES, UNKNOWN, Rule, Site
from mada_optim.matrices.uses import Use, walk
from mada_optim.warn import warn


@dataclass(frozen=True)
class Parameter:
    """What a parameter of a model is to an optimizer.

    Args:
        name: in the model.
        shape: of its tensor.
        what: "matrix", "embedding", "output layer", "norm", "bias", ...
        why: the reason, in a few words.
        layout: how its matrices lie in the tensor; None: it has none.
        trained: whether it requires a gradient.
    """

    name: str
    shape: tuple[int, ...]
    what: str
    why: str
    layout: Layout | None
    trained: bool

    @property
    def is_matrix(self) -> bool:
        """Whether its direction is orthogonalized."""
        return self.layout is not None


def classify(
    model: nn.Module, matrices: Mapping[str, bool] | None = None, split: Mapping[str, Any] | None = None
) -> dict[Tensor, Parameter]:
    """What each parameter of a model is, in the order of ``model.named_parameters()``.

    Args:
        model: any module.
        matrices: whether parameters are matrices, by patterns of names (``fnmatch``). The last that matches holds.
        split: how matrices lie in parameters, by patterns of names; see :meth:`Layout.read`. These are matrices, where
            ``matrices`` does not say otherwise.

    Raises:
        ValueError: a pattern matches no parameter, a parameter cannot be what the user says, or has no shape yet.
    """
    walked = walk(model)
    outputs = output_layers(walked)
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    marks = _by_pattern("matrices", matrices or {}, names, walked.uses)
    splits = _by_pattern("split", split or {}, names, walked.uses)
    layouts = {param: Layout.read(value) for param, value in splits.items()}
    parameters: dict[Tensor, Parameter] = {}
    for param, name in names.items():
        sites = [Site(use, outputs) for use in walked.uses[param]]
        rule, site = next((rule, site) for rule in RULES for site in sites if rule.matches(site))
        layout = rule.layout(site) if rule.layout else None
        if param in marks or param in layouts:
            what, why = ("matrix" if marks.get(param, True) else "no matrix"), "as you say"
            layout = _as_said(name, param, marks.get(param), layouts.get(param), layout)
        else:
            what, why, layout = _judge(rule, site, sites, layout)
        parameters[param] = Parameter(name, tuple(param.shape), what, why, layout, param.requires_grad)
    unknown = [parameter.name for parameter in parameters.values() if parameter.what == UNKNOWN]
    if unknown:
        warn(
            f"model: {unknown[0]!r}{f' and {len(unknown) - 1} more' if unknown[1:] else ''} are taken for no matrices, "
            "since modules that were scripted or exported do not say what they are; pass the model as it was before, "
            "whose parameters are the same, or say which are: matrices={'*.fc.weight': True}"
        )
    return parameters


def matrix_parameters(
    model: nn.Module, matrices: Mapping[str, bool] | None = None, split: Mapping[str, Any] | None = None
) -> list[Tensor]:
    """The parameters of a model that are matrices: weights that map activations to activations.

    The rule that optimizers with an orthogonalized direction share (K. Jordan, "Muon: An optimizer for hidden layers in
    neural networks", 2024): of a hidden matrix or convolution the whole spectrum counts; an embedding is a table of
    rows, and the output layer another. :func:`mada_optim.describe` prints what each parameter is taken for, and why.

    Args:
        model: any module. Frozen parameters count as well.
        matrices, split: the user's word, by patterns of names; see :class:`mada_optim.OMADA`.

    Returns:
        Each parameter once, in the order of ``model.parameters()``.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 10))
    >>> [tuple(weight.shape) for weight in matrix_parameters(model)]
    [(8, 4)]
    """
    return [param for param, parameter in classify(model, matrices, split).items() if parameter.is_matrix]


def may_be_matrix(param: Tensor) -> bool:
    """Whether a parameter has the shape and the type of a matrix; embeddings have, too."""
    if param.is_complex() or param.dim() < 2:
        return False
    rows = param.size(0)
    return min(rows, param.numel() // max(rows, 1)) > 1


def _judge(rule: Rule, site: Site, sites: list[Site], layout: Layout | None) -> tuple[str, str, Layout | None]:
    """What a parameter is, why, and its layout, by a rule and the limits."""
    why = rule.why if isinstance(rule.why, str) else rule.why(site)
    if rule.what == "embedding" and any(other.output for other in sites):
        why += ", also the output layer"
    if layout is not None:
        shapes = layout.shapes(site.use.param.shape)
        for limit in LIMITS:
            if rule.any_ratio and limit.what == "too thin":
                continue
            if all(limit.matches(rows, columns) for _, rows, columns in shapes):
                return limit.what, limit.why, None
    return rule.what, why, layout


def _as_said(name: str, param: Tensor, mark: bool | None, said: Layout | None, layout: Layout | None) -> Layout | None:
    """The layout of a parameter of which the user says whether it is a matrix, or how several lie in it, or both."""
    if mark is False:
        return None
    if not param.is_floating_point() or param.dim() < 2:
        raise ValueError(
            f"{'matrices' if said is None else 'split'}: {name!r} is {param.dtype} of shape {tuple(param.shape)}; "
            "matrices are real and have 2 or more dimensions"
        )
    chosen = said or layout or Layout()
    try:
        chosen.check(param.shape)
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from None
    return chosen


def _by_pattern(
    argument: str, values: Mapping[str, Any], names: Mapping[Tensor, str], uses: Mapping[Tensor, list[Use]]
) -> dict[Tensor, Any]:
    """Return values by parameter. Names match the patterns with or without the names of wrappers."""
    by_param: dict[Tensor, Any] = {}
    for pattern, value in values.items():
        if argument == "matrices" and not isinstance(value, bool):
            raise ValueError(f"matrices: values must be True or False, got {value!r} for {pattern!r}")
        matching = [
            param
            for param, name in names.items()
            if any(fnmatch.fnmatchcase(each, pattern) for each in (name, *(use.clean_name for use in uses[param])))
        ]
        if not matching:
            raise ValueError(
                f"{argument}: no parameter's name matches {pattern!r}; mada_optim.describe(model) prints all names"
            )
        by_param.update(dict.fromkeys(matching, value))
    return by_param
