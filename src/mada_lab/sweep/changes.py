"""A run's configuration with other values in its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mada_lab.errors import InputError, require, require_pair
from mada_lab.run.config import RunConfig

Config = TypeVar("Config", bound=RunConfig)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return ``config`` with other values in its fields; dots lead into parts.

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
        value = require_pair(name, value)
    try:
        return dataclasses.replace(part, **{first: value})
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None
