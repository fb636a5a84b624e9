"""Experiments as files in TOML; ``docs/experiments.md`` shows what may stand in one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mada_lab.errors import InputError, require, require_pair
from mada_lab.run.config import RunConfig
from mada_lab.sweep.changes import changed
from mada_lab.sweep.experiment import Confirm, Contender, Experiment
from mada_lab.tasks.registry import make_task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load(path: str | Path, data_root: str | Path = ".", changes: Sequence[str] = ()) -> Experiment:
    """Read an experiment.

    Args:
        path: of the file. It may name another one beside it, ``like = "other.toml"``, which it changes and adds to.
        data_root: folder in which relative paths of data are looked up.
        changes: fields of the base that have other values than in the file: "steps=50", "task.width=64".

    Raises:
        InputError: the file cannot be read, or something in it is not known or not allowed.
    """
    values = _read(Path(path))
    for change in changes:
        values = _merged(values, {"base": _assignment(change)})
    try:
        _check_keys("file", values, Experiment)
        return _experiment(values, Path(data_root), Path(path).stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(path: Path, readers: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is in a file, on top of the file that it is like; ``readers`` are the files on top of this one."""
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


def _assignment(text: str) -> dict[str, Any]:
    """Return the tables that an assignment on the command line stands for.

    >>> _assignment("task.width=64")
    {'task': {'width': 64}}
    """
    try:
        return tomllib.loads(text)
    except ValueError:
        raise InputError(
            f'set must be FIELD=VALUE as in TOML, like steps=50 or dtype="float64", got {text!r}'
        ) from None


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` with the values of ``new``. Tables are merged; a ``task`` of another kind replaces the old one.

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
    rooted: dict[str, Any] = {name: str(data_root / path) for name, path in paths.items() if path is not None}
    changes = {name: value for name, value in base.items() if name != "task"}
    return Experiment(
        values.get("title", stem),
        changed(RunConfig(dataclasses.replace(task, **rooted)), changes),
        {label: _contender(label, table) for label, table in _table("contenders", values).items()},
        _table("axes", values),
        _confirm(_table("confirm", values)) if "confirm" in values else None,
        values.get("threshold"),
    )


def _contender(label: str, table: Any) -> Contender:
    where = f"contenders.{label}"
    require(isinstance(table, Mapping), where, table, "a table")
    _check_keys(where, table, Contender)
    require("name" in table, where, dict(table), "a table with a name")
    for name in ("options", "run", "axes"):
        _table(name, table)
    betas = require_pair("betas", table["betas"]) if "betas" in table else None
    return Contender(**{**table, "betas": betas})


def _confirm(table: Mapping[str, Any]) -> Confirm:
    require("seeds" in table, "confirm", dict(table), "a table with seeds")
    return Confirm(table["seeds"], {name: value for name, value in table.items() if name != "seeds"})


def _table(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    table = values.get(name, {})
    require(isinstance(table, Mapping), name, table, "a table")
    return table  # type: ignore[no-any-return]


def _check_keys(where: str, values: Mapping[str, Any], kind: type[Any]) -> None:
    known = [item.name for item in dataclasses.fields(kind)]
    for name in values:
        require(name in known, f"key of {where}", name, f"one of {', '.join(known)}")
