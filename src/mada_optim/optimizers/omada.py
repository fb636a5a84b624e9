"""OMADA: Muon's direction for matrices, AdamW's for the rest, at learning rates that it finds by itself.

The name is Greek for a team.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import TypedDict, Unpack

from mada_optim.arguments import as_list, tensor_of, to_python
from mada_optim.engine.coefficient_set import Group
from mada_optim.families import OMADAFamily
from mada_optim.matrices import Layout, Parameter, classify, may_be_matrix
from mada_optim.matrices.groups import by_layout
from mada_optim.optimizers.mada import LionOptions, MADAStart
from mada_optim.optimizers.named import NamedOptimizer
from mada_optim.optimizers.options import LearningOptions, Scale, StepOptions, with_options
from mada_optim.scale import LearnedScale
from mada_optim.scale.rule import ADAPTIVE
from mada_optim.warn import warn

# Muon's best rate was at most 0.03 in all experiments here. Small noisy runs may wander up to whatever the bound is.
SEARCH = replace(ADAPTIVE, bounds=(1e-8, 0.1))


class OrthoOptions(TypedDict, total=False):
    """The orthogonalized direction: where its coefficients start, and its constants."""

    ortho: Annotated[float, 1.0]
    ortho_momentum: Annotated[float, 0.95]
    row_norm: Annotated[float, 0.0]
    row_beta: Annotated[float, 0.95]
    ns_steps: Annotated[int | None, None]
    ns_coefficients: Annotated[Sequence[float] | None, None]
    adjust_lr_fn: Annotated[str, "match_rms_adamw"]


class ModelOptions(TypedDict, total=False):
    """Which parameters are matrices, and who orthogonalizes them."""

    matrices: Annotated[Mapping[str, bool] | None, None]
    split: Annotated[Mapping[str, Any] | None, None]
    distribute: Annotated[bool, False]


class OMADAOptions(MADAStart, OrthoOptions, LearningOptions, LionOptions, StepOptions, ModelOptions, total=False):
    """The options of OMADA, in the order in which they are shown."""


class OMADA(NamedOptimizer, name="omada", hyper_warmup=0, scale=True):
    """Muon for matrices and AdamW for the rest, at learning rates that are found in the first steps, and then held.

    The update is that of :class:`OMADAFamily`, the search that of :class:`LearnedScale`, with a scale for matrices and
    another for the rest. Give it the model, and it sees which parameters are matrices: weights that map activations to
    activations, each expert's of a stack and each part of a fused projection by itself. :func:`mada_optim.describe`
    prints what it sees::

        optimizer = OMADA(model)
        ...  # after 150 steps
        optimizer.scale.values  # {'matrices': 0.0091, 'rest': 0.0089}, for example

    Your word is last. By patterns of names: ``OMADA(model, matrices={"*.gate.weight": False}, split={"*.qkv.weight":
    3})``. Or by parameter group: ``[{"params": hidden, "matrices": True, "split": 3}, {"params": others}]``. Groups
    written for Muon, with ``use_muon`` in place of ``matrices``, are understood. Parameters of the model that are added
    later, once they are unfrozen, need no mark: :meth:`add_param_group` knows them.

    Args:
        params: a model, or as in torch.optim. Without any mark no parameter is a matrix, which is warned of.
        lr: learning rate η. It gives the shape of the schedule; how large it is does not matter, unless ``scale`` is
            False. Default: 3e-3.
        betas: where β1 and β2 start. Default: (0.9, 0.99).
        eps, weight_decay, beta3, rho, c, gamma, lion_betas: as in :class:`MADA`.
        ortho: ω, the weight of the orthogonalized direction in the step of a matrix. Default: 1.0, Muon's step.
        ortho_momentum: μ, the momentum of the orthogonalized direction. Default: 0.95.
        row_norm: ν, how much of the orthogonalized direction has its rows divided by the root of their running second
            moment. 1.0 is NorMuon's step and keeps one number more for each row. Default: 0.0, Muon's step.
        row_beta: β, by which the second moment of the rows decays. Default: 0.95.
        ns_steps, ns_coefficients, adjust_lr_fn: conventions of torch.optim.Muon, see :func:`orthogonalize`. Default:
            None, None, "match_rms_adamw".
        matrices: which parameters of the model are matrices, True or False by patterns of names (``fnmatch``). The last
            pattern that matches holds. Each has to match a parameter. Default: as :func:`mada_optim.describe` says.
        split: how several matrices lie in one parameter of the model, by patterns of names. A number: as many of the
            same size along the rows (12: the heads of a projection). A sequence: their relative sizes, such as
            (4, 1, 1). A mapping: ``stacked`` (the first dimension counts matrices), ``dim`` (1: along the columns),
            ``parts``, ``repeats``. Parameters with a split are matrices. Groups have the same option.
        scale: True, the default: learning rates are found in the first steps. False: ``lr`` is the learning rate. A
            mapping: rates that were found, ``{"matrices": 0.009, "rest": 0.009}``, as :meth:`frozen_config` returns it.
        distribute: whether the ranks of ``DistributedDataParallel`` divide the orthogonalization of plain matrices:
            each does its share, and all gather the directions. Set it only where all ranks of the job train the same
            model and take the same steps; a rank that skips a step leaves the others waiting. Ranks always divide
            DTensors, with either value. Default: False.
        hyper_lr: step sizes of the coefficients, in the forms that :class:`MADA` takes. None, the default: 0, nothing
            is learned but the scale. ``{"ortho": 0.1}`` with ``ortho=0.0`` learns how much of Muon to be. ω's
            hypergradient is normalized: 0.1 is the length of a step when all hypergradients agree.
        bounds: boxes (low, high) of coefficients by name. The others keep theirs: MADA's, ω and ν [0, 1].
        others: see :class:`HypergradientOptimizer`.

    Raises:
        ValueError: a parameter of a group with ``matrices=True`` is not one, or ``use_muon`` says otherwise; a pattern
            matches no parameter; ``matrices`` or ``split`` without a model.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> optimizer = OMADA(model, lr=1e-2)
    >>> optimizer.param_groups[0]["matrices"], len(optimizer.param_groups[0]["params"])
    (True, 1)
    """

    @with_options(OMADAOptions)
    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[OMADAOptions],
    ) -> None:
        matrices, split, distribute = options.pop("matrices"), options.pop("split"), options.pop("distribute")
        if not isinstance(distribute, bool):
            raise TypeError(f"distribute must be a bool, got {distribute!r}")
        # The parameters of the model that the optimizer was made from.
        self._of_model: dict[Tensor, Parameter] = {}
        self._frozen: list[Tensor] = []  # those that were left out, since they were frozen
        groups: Any = params
        if isinstance(params, nn.Module):
            self._of_model = classify(params, matrices, split)
            named = [(name, param) for name, param in params.named_parameters() if param.requires_grad]
            self._frozen = [param for param in self._of_model if not param.requires_grad]
            groups = by_layout({"params": named}, self._layouts())
        elif matrices is not None or split is not None:
            raise ValueError(
                "matrices and split are patterns of names in a model, so params must be the model; without one, "
                "give parameter groups with the options matrices and split"
            )
        elif not isinstance(params, Tensor):
            groups = list(params)
            _warn_of_missing_marks(groups)
        super().__init__(groups, OMADAFamily(distribute), lr, weight_decay, betas=betas, eps=eps, **options)

    def _take_step(self) -> None:
        if any(param.grad is not None for param in self._frozen):
            self._warn_of_unfrozen()
        super()._take_step()

    def _warn_of_unfrozen(self) -> None:
        """Say once which parameters have a gradient now and are in no parameter group."""
        known = {param for group in self.param_groups for param in group["params"]}
        outside = [
            self._of_model[param].name for param in self._frozen if param.grad is not None and param not in known
        ]
        self._frozen = []
        if outside:
            warn(
                f"OMADA was made while {outside[0]!r}{f' and {len(outside) - 1} more' if outside[1:] else ''} did not "
                "require a gradient, so it does not train what has a gradient now: call "
                "optimizer.add_param_group({'params': ...}), or make the optimizer after unfreezing"
            )

    def _learn_scale(self, scale: Scale) -> LearnedScale:
        return LearnedScale(
            self, per=kind_of_group, settings=SEARCH, held=scale if isinstance(scale, Mapping) else None
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters; see torch.optim.Optimizer.add_param_group.

        An optimizer that was made from a model knows which of its parameters are matrices. Where a group does not say,
        and has both, it becomes two: the matrices come last. Parameters need no names.

        Args:
            param_group: ``params`` and the options of the group. What it does not name is the optimizer's.
        """
        before = len(self.param_groups)
        try:
            for part in self._parts(param_group):
                super().add_param_group(part)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _parts(self, param_group: Any) -> list[Any]:
        """Split a parameter group as the user wrote it into one or more groups with names and marks."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            return [param_group]  # refused further on
        group: Group = {**param_group, "params": as_list(param_group["params"])}
        if "use_muon" in group:
            group["matrices"] = _read_mark(group)
        if "split" in group:
            group["split"] = Layout.read(group["split"]).plain()
            if group["split"] is not None:
                group.setdefault("matrices", True)
        if not self._of_model:
            return [group]
        if self.param_groups and "param_names" in self.param_groups[0]:
            group["params"] = [self._named(index, param) for index, param in enumerate(group["params"])]
        if "matrices" in group:
            return [group]
        if any(tensor_of(param) not in self._of_model for param in group["params"]):
            _warn_of_missing_marks([group])
        return by_layout(group, self._layouts(), rest_first=True) or [group]

    def _layouts(self) -> dict[Tensor, Layout | None]:
        """Return how matrices lie in the parameters of the model that the optimizer was made from."""
        return {param: parameter.layout for param, parameter in self._of_model.items()}

    def _named(self, index: int, param: Any) -> Any:
        """Return a parameter with its name in the model, or with a name that says where it is."""
        if isinstance(param, tuple):
            return param
        known = self._of_model.get(param)
        return known.name if known else f"param_groups.{len(self.param_groups)}.{index}", param

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["matrices"]:
            for tensor in map(tensor_of, group["params"]):
                if tensor.dim() < 2 or tensor.is_complex():
                    raise ValueError(
                        "params: groups with matrices=True take real tensors of 2 or more dimensions, "
                        f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                    )
                Layout.read(group["split"]).check(tensor.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_of_model": self._of_model, "_frozen": self._frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_of_model", {})
        self.__dict__.setdefault("_frozen", [])
        super().__setstate__(state)


def kind_of_group(group: Group) -> str:
    """Return which of the two learned scales a parameter group has."""
    return "matrices" if group["matrices"] else "rest"


def _read_mark(group: Group) -> bool:
    """Return whether a group with ``use_muon`` has matrices."""
    use_muon = to_python(group["use_muon"])
    if not isinstance(use_muon, bool):
        raise ValueError(f"use_muon of a parameter group must be a bool, got {use_muon!r}")
    if group.get("matrices", use_muon) != use_muon:
        raise ValueError(
            f"parameter group: matrices={group['matrices']!r} and use_muon={use_muon!r} contradict each other; "
            "give one of them"
        )
    return use_muon


def _warn_of_missing_marks(groups: list[Any]) -> None:
    """Warn where nothing says which of the parameters are matrices, and some may be."""
    marks = ("matrices", "use_muon", "split")
    if any(isinstance(group, dict) and not group.keys().isdisjoint(marks) for group in groups):
        return
    params = [
        param
        for group in groups
        for param in (as_list(group.get("params", ())) if isinstance(group, dict) else [group])
    ]
    if any(isinstance(tensor, Tensor) and may_be_matrix(tensor) for tensor in map(tensor_of, params)):
        warn(
            "params: no parameter group has matrices=True, so OMADA takes none of these parameters for a matrix and "
            "orthogonalizes nothing; pass the model itself, OMADA(model), or mark groups, {'params': hidden, "
            "'matrices': True}. For the Trainer of transformers there is "
            "mada_optim.integrations.transformers.OMADATrainer"
        )
