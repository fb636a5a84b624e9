"""An experiment: contenders over axes of a run's fields, and a second stage at each one's best learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from mada_lab.errors import require
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.optimizers.registry import find
from mada_lab.run.coefficients import scales_of
from mada_lab.run.config import RunConfig
from mada_lab.sweep.changes import changed
from mada_optim.history.notation import SCALE

Config = TypeVar("Config", bound=RunConfig)

LR, BETAS, SEED = "optimizer.lr", "optimizer.betas", "seed"
# What the tables tell apart: values of any other axis would count as further seeds.
AXES = (LR, BETAS, SEED)
Axes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Contender:
    """An optimizer, and what is different in its runs.

    Args:
        name, betas, weight_decay, options: as in :class:`OptimizerConfig`; None: as in the base, but for the betas of
            optimizers for which they mean something else.
        run: fields of :class:`RunConfig` in place of the base's; dots lead into parts: ``task.width``.
        axes: in place of the experiment's axes of the same name, or further ones.
        coefficients_from: label of another contender that learns its coefficients. This one starts at the means of
            their final values, at that one's best learning rate, and keeps them (``hyper_lr`` 0): the paper's MADA-FS.
        lr_from: label of another contender. This one is trained at the best learning rate of that one's first stage,
            in place of the axis of learning rates.
    """

    name: str
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    axes: Axes = field(default_factory=dict)
    coefficients_from: str | None = None
    lr_from: str | None = None

    @property
    def sources(self) -> list[str]:
        """Labels of the contenders whose runs must be over before this one's can begin."""
        return [label for label in (self.coefficients_from, self.lr_from) if label is not None]

    def __post_init__(self) -> None:
        optimizer = OptimizerConfig(self.name, betas=self.betas, weight_decay=self.weight_decay, options=self.options)
        for name in ("betas", "weight_decay", "options"):
            object.__setattr__(self, name, getattr(optimizer, name))


@dataclass(frozen=True)
class Confirm:
    """The second stage: each contender at its best learning rate of the first.

    Args:
        seeds: in place of the first stage's.
        run: fields of :class:`RunConfig` in place of the contender's.
    """

    seeds: Sequence[int]
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_values("confirm.seeds", self.seeds)


@dataclass(frozen=True)
class Experiment:
    """What is trained, and how often.

    Args:
        title: for people.
        base: what all runs have in common.
        contenders: by label, which names them in tables.
        axes: fields of :class:`RunConfig`, dotted, and the values that each contender is trained at, in all
            combinations: "optimizer.lr", "optimizer.betas", "seed". What differs in anything else is another contender.
        confirm: the second stage; None: there is none.
        threshold: final training loss below which a start of the betas counts as a good one. None: the median.
    """

    title: str
    base: RunConfig
    contenders: Mapping[str, Contender]
    axes: Axes
    confirm: Confirm | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.contenders), "contenders", list(self.contenders), "a table that is not empty")
        common = {LR: self.base.optimizer.lr, BETAS: self.base.optimizer.betas}
        _check_not_overruled("base", {name: value for name, value in common.items() if value is not None}, self.axes)
        for label, contender in self.contenders.items():
            require(bool(_slug(label)), "label", label, "a text with letters or digits")
            for name, values in self.axes_of(label).items():
                require(
                    name in AXES, f"axis of {label!r}", name, f"one of {', '.join(AXES)}; use contenders for others"
                )
                _check_values(name, values)
            betas = {} if contender.betas is None else {BETAS: contender.betas}
            _check_not_overruled(label, {**contender.run, **betas}, self.axes_of(label))
            if self.confirm is not None:
                _check_not_overruled("confirm", self.confirm.run, {**self.axes_of(label), LR: (), SEED: ()})
            self._check_sources(label, contender)
        # Some file systems do not tell upper from lower case.
        names = Counter(name.casefold() for runs in self._tuned.values() for name in runs)
        for name, count in names.items():
            require(count == 1, "runs", name, "told apart by their labels and values")

    def labels(self, texts: Sequence[str]) -> list[str]:
        """Return the labels in the texts of a command line: each by itself, or several with commas between."""
        return [label for text in texts for label in ([text] if text in self.contenders else text.split(","))]

    def axes_of(self, label: str) -> Axes:
        """Return the axes of a contender: the experiment's, and its own in their place.

        Those of a contender with ``lr_from`` have no learning rate but None, until it is known.
        """
        contender = self.contenders[label]
        return {**self.axes, **contender.axes, **({LR: [None]} if contender.lr_from else {})}

    def config(self, label: str) -> RunConfig:
        """Return the run of a contender before anything varies.

        What is None in it means something else for each optimizer.
        """
        contender, common = self.contenders[label], self.base.optimizer
        betas = None if find(contender.name).own_betas else common.betas
        optimizer = dataclasses.replace(
            common,
            name=contender.name,
            betas=contender.betas or betas,
            weight_decay=common.weight_decay if contender.weight_decay is None else contender.weight_decay,
            options={**common.options, **contender.options},
        )
        return changed(dataclasses.replace(self.base, optimizer=optimizer), contender.run)

    def tune(self, label: str, lr: float | None = None) -> dict[str, RunConfig]:
        """Return the runs of a contender in the first stage, by the name of their folder; at one learning rate."""
        if lr is not None:
            return _grid(label, self.config(label), {**self.axes_of(label), LR: [lr]})
        return self._tuned[label]

    @cached_property
    def _tuned(self) -> dict[str, dict[str, RunConfig]]:
        return {label: _grid(label, self.config(label), self.axes_of(label)) for label in self.contenders}

    def confirmed(self, label: str, lr: float | None) -> dict[str, RunConfig]:
        """Return the runs of a contender in the second stage, all at one learning rate."""
        assert self.confirm is not None
        config = changed(self.config(label), self.confirm.run)
        return _grid(label, config, {**self.axes_of(label), LR: [lr], SEED: self.confirm.seeds})

    def _check_sources(self, label: str, contender: Contender) -> None:
        others = [name for name, other in self.contenders.items() if not other.sources]
        for field_name, replaced, axes in (
            ("coefficients_from", BETAS, self.axes_of(label)),
            ("lr_from", LR, contender.axes),
        ):
            source = getattr(contender, field_name)
            if source is not None:
                allowed = f"one of {', '.join(map(repr, others))}"
                require(source in others, f"{field_name} of {label!r}", source, allowed)
                require(replaced not in axes, f"axes of {label!r}", replaced, f"without what {field_name} gives")


def fixed(config: Config, coefficients: Mapping[str, float]) -> Config:
    """Return ``config`` with an optimizer that starts at ``coefficients``, holds learned scales, and learns nothing."""
    scales = scales_of(coefficients)
    options: dict[str, Any] = {
        name: value
        for name, value in coefficients.items()
        if name not in ("beta1", "beta2") and not name.startswith(SCALE)
    }
    if scales:
        options["scale"] = scales
    optimizer = dataclasses.replace(
        config.optimizer,
        betas=(coefficients["beta1"], coefficients["beta2"]),
        options={**config.optimizer.options, **options, "hyper_lr": 0.0},
    )
    return dataclasses.replace(config, optimizer=optimizer)


def _grid(label: str, config: RunConfig, axes: Axes) -> dict[str, RunConfig]:
    """Return the run at each point of the axes, by the name of its folder. Seeds come last in it."""
    names = sorted(axes, key=lambda name: name == SEED)
    points = [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[name] for name in names))]
    return {_run_name(label, point): changed(config, point) for point in points}


def _run_name(label: str, point: Mapping[str, Any]) -> str:
    """Return the name of a run's folder.

    >>> _run_name("mada:rho=0", {"optimizer.lr": 0.1, "seed": 1})
    'mada+rho=0-lr0.1-seed1'
    """
    return "-".join([_slug(label), *(f"{name.rsplit('.')[-1]}{_text(value)}" for name, value in point.items())])


def _slug(label: str) -> str:
    """Return a label as a part of the name of a folder.

    >>> _slug("AdamW (0.9, 0.95)"), _slug("mada:rho=0")
    ('AdamW_0.9_0.95', 'mada+rho=0')
    """
    return re.sub(r"[^\w.=+-]+", "_", label.replace(":", "+")).strip("_.")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return _slug(str(value))


def _check_not_overruled(where: str, fields: Mapping[str, Any], axes: Axes) -> None:
    """Raise where a field has a value that an axis, or the stage, would replace without a word."""
    for name in _leaves(fields):
        allowed = "left out, for it is an axis or set by the stage"
        require(name not in axes, f"{name} of {where!r}", dict(fields), allowed)


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values.

    >>> list(_leaves({"optimizer": {"lr": 1.0}, "task.width": 8}))
    ['optimizer.lr', 'task.width']
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_values(name: str, values: Any) -> None:
    usable = isinstance(values, (list, tuple)) and bool(values)
    usable = usable and all(value not in values[:i] for i, value in enumerate(values))
    require(usable, name, values, "a list that is not empty and repeats nothing")
