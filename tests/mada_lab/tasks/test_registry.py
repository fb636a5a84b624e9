"""Tasks are known by their names, and each of their fields is an option of the command line."""

from __future__ import annotations

import dataclasses

import pytest

from mada_lab.errors import InputError
from mada_lab.tasks.base import TaskConfig
from mada_lab.tasks.registry import DEFAULT, KINDS, OPTIONS, TASKS, make_task, task_type


@pytest.mark.parametrize("kind", TASKS)
def test_a_task_is_known_by_the_name_that_it_stores(kind: str) -> None:
    assert issubclass(task_type(kind), TaskConfig)
    assert task_type(kind).kind == make_task({"kind": kind}).kind == kind
    assert kind in KINDS


def test_each_field_of_a_task_is_an_option() -> None:
    fields = {field.name for kind in TASKS for field in dataclasses.fields(task_type(kind))}
    assert fields == OPTIONS.keys()
    for kind in TASKS:
        for field in dataclasses.fields(task_type(kind)):
            assert str(field.type).removesuffix(" | None") == OPTIONS[field.name].kind.__name__


def test_the_default_task_and_an_unknown_one() -> None:
    assert make_task({}).kind == DEFAULT
    known = ", ".join(TASKS)
    with pytest.raises(InputError, match=f"task must be one of {known}, got 'music'"):
        make_task({"kind": "music"})
    with pytest.raises(InputError, match="argument of task vision must be one of .*, got 'layers'"):
        make_task({"kind": "vision", "layers": 2})
