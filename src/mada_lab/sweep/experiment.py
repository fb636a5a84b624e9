"""Experiments as files: contenders over axes of a run's fields, and a second stage at each one's best learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mada_lab.optimizers.registry import find
from mada_lab.run.config import OptimizerConfig, RunConfig, make_task, pair
from mada_lab.tasks import InputError, require
from mada_optim.history.notation import SCALE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
    """

    name: str
    betas: tuple[float, float] | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    axes: Axes = field(default_factory=dict)
    coefficients_from: str | None = None

    def __post_init__(self) -> None:
        given = OptimizerConfig(self.name, betas=self.betas, weight_decay=self.weight_decay, options=self.options)
        for name in ("betas", "weight_decay", "options"):
            object.__setattr__(self, name, getattr(given, name))


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
            self._check_source(label, contender)
        # Some file systems do not tell upper from lower case.
        names = Counter(name.casefold() for label in self.contenders for name in self.tune(label))
        for name, count in names.items():
            require(count == 1, "runs", name, "told apart by their labels and values")

    def labels(self, given: Sequence[str]) -> list[str]:
        """Labels as they are given on a command line: each by itself, or several with commas between."""
        return [label for text in given for label in ([text] if text in self.contenders else text.split(","))]

    def axes_of(self, label: str) -> Axes:
        return {**self.axes, **self.contenders[label].axes}

    def config(self, label: str) -> RunConfig:
        """The run of a contender before anything varies. What is None in it means something else for each optimizer."""
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

    def tune(self, label: str) -> dict[str, RunConfig]:
        """Runs of a contender in the first stage, by the name of their folder."""
        return _grid(label, self.config(label), self.axes_of(label))

    def confirmed(self, label: str, lr: float | None) -> dict[str, RunConfig]:
        """Runs of a contender in the second stage."""
        assert self.confirm is not None
        config = changed(self.config(label), self.confirm.run)
        return _grid(label, config, {**self.axes_of(label), LR: [lr], SEED: self.confirm.seeds})

    def _check_source(self, label: str, contender: Contender) -> None:
        source = contender.coefficients_from
        if source is None:
            return
        others = [name for name, other in self.contenders.items() if other.coefficients_from is None]
        require(source in others, f"coefficients_from of {label!r}", source, f"one of {', '.join(map(repr, others))}")
        require(BETAS not in self.axes_of(label), f"axes of {label!r}", BETAS, "without what coefficients_from gives")


def fixed(config: RunConfig, coefficients: Mapping[str, float]) -> RunConfig:
    """``config`` with an optimizer that starts at ``coefficients``, holds learned scales, and learns nothing."""
    scales = {name.removeprefix(SCALE): value for name, value in coefficients.items() if name.startswith(SCALE)}
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


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """``config`` with other values in its fields.

    >>> config = changed(RunConfig(), {"steps": 5, "optimizer.betas": [0.5, 0.9], "task": {"width": 64}})
    >>> config.steps, config.optimizer.betas, config.task.width
    (5, (0.5, 0.9), 64)
    >>> changed(config, {"optimizer.options.hyper_lr.rho": 0.1}).optimizer.options
    {'hyper_lr': {'rho': 0.1}}
    """
    for name, value in changes.items():
        config = _changed(config, name.split("."), value, name)
    return config


def _changed(part: Any, path: Sequence[str], value: Any, name: str) -> Any:
    first, *rest = path
    if isinstance(part, Mapping):
        return {**part, first: _changed(part.get(first, {}), rest, value, name) if rest else value}
    known = [item.name for item in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    require(first in known, "field", name, f"one of a run's{': ' if known else ''}{', '.join(known)}")
    old = getattr(part, first)
    if rest:
        value = _changed(old, rest, value, name)
    elif dataclasses.is_dataclass(old):
        require(isinstance(value, Mapping), name, value, "a table of fields")
        for key, inner in value.items():
            if key == "kind" and first == "task":
                require(inner == old.kind, f"{name}.kind", inner, f"the base's, {old.kind}")  # type: ignore[union-attr]
                continue
            old = _changed(old, key.split("."), inner, f"{name}.{key}")
        value = old
    elif name.endswith("betas") and value is not None:
        value = pair(name, value)
    try:
        return dataclasses.replace(part, **{first: value})
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None


def _grid(label: str, config: RunConfig, axes: Axes) -> dict[str, RunConfig]:
    names = sorted(axes, key=lambda name: name == SEED)
    return {
        "-".join(
            [_slug(label), *(f"{name.rsplit('.')[-1]}{_text(v)}" for name, v in zip(names, values, strict=True))]
        ): (changed(config, dict(zip(names, values, strict=True))))
        for values in itertools.product(*(axes[name] for name in names))
    }


def _slug(label: str) -> str:
    """As the name of a folder.

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
    """Dotted names of all values.

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


# Files.


def load(path: str | Path, data_root: str | Path = ".") -> Experiment:
    """The experiment that a TOML file describes; ``docs/experiments.md`` shows what may stand in one.

    Args:
        path: of the file. It may name another one beside it, ``like = "other.toml"``, which it changes and adds to.
        data_root: folder in which relative paths of data are looked up.

    Raises:
        InputError: the file cannot be read, or something in it is not known or not allowed.
    """
    values = _read(Path(path))
    try:
        _check_keys("file", values, Experiment)
        return _experiment(values, Path(data_root), Path(path).stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(path: Path, readers: Sequence[str] = ()) -> dict[str, Any]:
    """What stands in a file, on top of the file that it is like; ``readers`` are the files on top of this one."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"file must be an experiment in TOML, got {str(path)!r}: {error}") from None
    like = values.pop("like", None)
    if like is None:
        return values
    readers = (*readers, path.name)
    require(isinstance(like, str) and like not in readers, f"like of {path}", like, "the name of another file")
    return _merged(_read(path.parent / like, readers), values)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with the values of ``new``. Tables are merged, but for a ``task`` of another kind.

    >>> _merged({"base": {"steps": 1, "task": {"width": 8}}}, {"base": {"task": {"kind": "vision"}}})
    {'base': {'steps': 1, 'task': {'kind': 'vision'}}}
    """
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if (
            isinstance(before, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind") in (None, before.get("kind"))
        ):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _experiment(values: Mapping[str, Any], data_root: Path, stem: str) -> Experiment:
    base = _table("base", values)
    task = make_task(_table("task", base))
    # ``init`` is no data: it is the folder of a run, as ``--out`` is, or a name on the hub.
    paths = {name: getattr(task, name) for name in task.paths if name != "init"}
    found: dict[str, Any] = {name: str(data_root / path) for name, path in paths.items() if path is not None}
    task = dataclasses.replace(task, **found)
    rest = {name: value for name, value in base.items() if name != "task"}
    contenders = {}
    for label, given in _table("contenders", values).items():
        require(isinstance(given, Mapping), f"contenders.{label}", given, "a table")
        _check_keys(f"contenders.{label}", given, Contender)
        require("name" in given, f"contenders.{label}", dict(given), "a table with a name")
        for name in ("options", "run", "axes"):
            _table(name, given)
        betas = pair("betas", given["betas"]) if "betas" in given else None
        contenders[label] = Contender(**{**given, "betas": betas})
    confirm = None
    if "confirm" in values:
        given = dict(_table("confirm", values))
        require("seeds" in given, "confirm", given, "a table with seeds")
        confirm = Confirm(given.pop("seeds"), given)
    return Experiment(
        values.get("title", stem),
        changed(RunConfig(task), rest),
        contenders,
        _table("axes", values),
        confirm,
        values.get("threshold"),
    )


def _table(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    table = values.get(name, {})
    require(isinstance(table, Mapping), name, table, "a table")
    return table  # type: ignore[no-any-return]


def _check_keys(where: str, values: Mapping[str, Any], kind: type[Any]) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        require(name in known, f"key of {where}", name, f"one of {', '.join(known)}")
