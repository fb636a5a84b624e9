"""β1 and β2 as options of a parameter group, as AdamW's betas are.

While β1 is not learned, a group has "betas", a pair of floats. The second is None where β2 is learned. Users and
schedulers may write others there, for one group or for all: the next step uses them. While β1 is learned, the group has
no such key, and writing it is an error: the coefficients hold the values, and learning moves them.

The coefficients that groups share hold the betas of the first group. A pending step is completed with the betas with
which it was taken, "previous_betas".
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from mada_optim.arguments import to_python
from mada_optim.families import Family, MADAFamily
from mada_optim.learning import check_value

BETAS = ("beta1", "beta2")

Group = dict[str, Any]

BATCHES = 64  # for how many batches of a group kernels keep something


class ParameterGroup(dict[str, Any]):
    """A parameter group whose betas can be read, but not written, while β1 is learned.

    Args:
        options: what the group holds.
        family: of the optimizer.
    """

    def __init__(self, options: Mapping[str, Any], family: Family) -> None:
        super().__init__(options)
        self.family = family
        # What is kept from step to step is in no copy and no checkpoint.
        self.kinds: Any = None
        self._kept: dict[Hashable, dict[str, Any]] = {}

    def kept_for(self, batch: Hashable) -> dict[str, Any]:
        """What kernels keep for a batch of parameters.

        Args:
            batch: tells which parameters. What was kept for others is forgotten in the end.
        """
        kept = self._kept[batch] = self._kept.pop(batch, {})
        if len(self._kept) > BATCHES:
            del self._kept[next(iter(self._kept))]
        return kept

    def __missing__(self, key: str) -> Any:
        if key == "betas" and has_betas(self.family):
            return tuple(self["coefficients"][index].item() for index in _indices(self.family))
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "betas" and key not in self:
            if ignores_betas(self.family, self):
                raise ValueError(without_effect(value))
            if "beta1" in learned_betas(self):
                raise ValueError(_refusal("beta1", value))
        super().__setitem__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies are made as groups are: a group that another optimizer has taken over may have betas of its own.
        return ParameterGroup, (dict(self), self.family)


@lru_cache(maxsize=64)
def has_betas(family: Family) -> bool:
    """Whether a family has beta1 and beta2, whose values never change which terms of the update are computed."""
    frozen_at = {coefficient.name: coefficient.frozen_at for coefficient in family.coefficients}
    return all(frozen_at.get(name) == () for name in BETAS)


def ignores_betas(family: Family, group: Mapping[str, Any]) -> bool:
    """Whether betas change nothing in a group, which is at Lion's point: it has no such option then."""
    is_madas = isinstance(getattr(family, "inner", family), MADAFamily)
    return is_madas and group.get("special", {}).get("gamma") == 0.0


def without_effect(betas: Any) -> str:
    """Say that betas are not used."""
    return f"betas of a parameter group, set to {betas!r}, have no effect where gamma is frozen at 0: use lion_betas"


def split_betas(betas: Any) -> dict[str, Any]:
    """Return betas by name. Raise ValueError where they are not two."""
    pair = to_python(betas)
    if not isinstance(pair, tuple) or len(pair) != len(BETAS):
        raise ValueError(f"betas must be two numbers (beta1, beta2), got {betas!r}")
    return dict(zip(BETAS, pair, strict=True))


def fixed_betas(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the betas that a parameter group holds, by name, without those that are learned."""
    betas = split_betas(group["betas"]) if "betas" in group else {}
    return {name: value for name, value in betas.items() if value is not None}


def learned_betas(group: Mapping[str, Any]) -> list[str]:
    """Return which of β1 and β2 are learned in a parameter group."""
    step_sizes = group.get("hyper_lr")
    return [name for name in BETAS if step_sizes.get(name, 0.0) > 0.0] if isinstance(step_sizes, Mapping) else []


def start_betas(family: Family, group: Group, start: Mapping[str, float]) -> None:
    """Give a new parameter group its betas, unless β1 is learned or they have no effect.

    Args:
        family: of the optimizer.
        group: the group, which has the optimizer's defaults where it does not say otherwise.
        start: initial values of its coefficients, those that it names itself among them.
    """
    if has_betas(family):
        group.pop("betas", None)
        learned = learned_betas(group)
        if "beta1" not in learned and not ignores_betas(family, group):
            group["betas"] = tuple(None if name in learned else start[name] for name in BETAS)
            group["previous_betas"] = group["betas"]  # no step has been taken with others


def update_betas(family: Family, groups: Sequence[Group]) -> None:
    """Make what users wrote into parameter groups that share their coefficients ready for the next step.

    Betas are missing where learning has stopped since the last one, or where a checkpoint is older than they are.

    Raises:
        ValueError: a learned β was written, or one is not a number in its domain. Nothing has been changed then.
    """
    if not has_betas(family) or ignores_betas(family, groups[0]):
        return
    learned = learned_betas(groups[0])
    completed = {
        index: _complete(family, group, learned) for index, group in enumerate(groups) if not _is_ready(group, learned)
    }
    if "beta1" in learned:
        for index in completed:
            if groups[index].get("betas") != groups[0].get("betas"):
                raise ValueError(
                    f"betas of parameter group {index} are {groups[index].get('betas')!r}, and those of group 0 "
                    f"{groups[0].get('betas')!r}; to learn beta1, which all groups share, give them the same"
                )
    for index, betas in completed.items():
        if "beta1" in learned:
            groups[index].pop("betas", None)
            groups[index].pop("previous_betas", None)
        else:
            groups[index]["betas"] = betas
            groups[index].setdefault("previous_betas", betas)


def _is_ready(group: Group, learned: Sequence[str]) -> bool:
    """Whether a group's betas are those of the last step, and there for what is learned now."""
    if "beta1" in learned:
        return "betas" not in group
    if "betas" not in group or group["betas"] is not group.get("previous_betas", ()):
        return False
    return (group["betas"][1] is None) == ("beta2" in learned)


def _complete(family: Family, group: Group, learned: Sequence[str]) -> tuple[Any, ...]:
    """The betas of a group, None for those that are learned; learning may begin with those of the last step.

    Args:
        family: of the optimizer.
        group: parameter group whose betas are to be checked.
        learned: names of those that are learned.
    """
    in_use = group.get("previous_betas", (None, None))
    betas = split_betas(group["betas"]) if "betas" in group else dict.fromkeys(BETAS)
    for index, name in zip(_indices(family), BETAS, strict=True):
        value = betas[name]
        if name in learned:
            if value is not None and value != in_use[BETAS.index(name)]:
                raise ValueError(_refusal(name, group["betas"]))
            betas[name] = None
        elif value is None:
            betas[name] = group["coefficients"][index].item()
        else:
            check_value(family.coefficients[index], value)
            betas[name] = float(value)
    return tuple(betas.values())


def group_values(family: Family, groups: Sequence[Group], key: str) -> list[Tensor]:
    """The coefficients with which each of the groups that share them takes or took its step.

    Args:
        family: whose coefficients they are.
        groups: parameter groups that share them.
        key: "betas", or "previous_betas" for the last step.
    """
    shared, first = groups[0]["coefficients"], groups[0].get(key)
    betas = [group.get(key) for group in groups]
    return [shared if pair is None or pair == first else _replace(family, shared.clone(), pair) for pair in betas]


def take_up_betas(family: Family, groups: Sequence[Group]) -> None:
    """Put the betas of the first group into the coefficients that groups share; they are those of the step to come."""
    betas = groups[0].get("betas")
    if betas is not None and betas != groups[0].get("previous_betas"):
        _replace(family, groups[0]["coefficients"], betas)
    for group in groups:
        if "betas" in group:
            group["previous_betas"] = group["betas"]


def _replace(family: Family, values: Tensor, betas: Sequence[float | None]) -> Tensor:
    """Write betas into the values of all coefficients, in place and without waiting for the device."""
    for index, beta in zip(_indices(family), betas, strict=True):
        if beta is not None:
            values[index].fill_(beta)
    return values


@lru_cache(maxsize=64)
def _indices(family: Family) -> tuple[int, ...]:
    names = [coefficient.name for coefficient in family.coefficients]
    return tuple(names.index(name) for name in BETAS)


def _refusal(name: str, betas: Any) -> str:
    return (
        f"betas of a parameter group cannot be set to {betas!r}, since {name} is learned; pass cycle_momentum=False to "
        f"OneCycleLR or CyclicLR, or do not learn {name}: hyper_lr=0.0, or a mapping without it"
    )
