"""The tasks by name, and their options on the command line. A new task has a file, and its lines here.

Tasks are imported where they are used: ``mada --help`` lists their options without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mada_lab.errors import require

if TYPE_CHECKING:
    from mada_lab.tasks.base import TaskConfig

TASKS = {
    "language": "mada_lab.tasks.language.LanguageConfig",
    "tokens": "mada_lab.tasks.tokens.TokensConfig",
    "vision": "mada_lab.tasks.vision.VisionConfig",
}
DEFAULT = "language"


@dataclass(frozen=True)
class Option:
    """A field of tasks on the command line. ``kind`` is str, int, float or bool."""

    kind: type
    metavar: str
    help: str


# By the name of the field.
OPTIONS = {
    "data": Option(
        str,
        "FILE",
        "any UTF-8 text (default: Python's language reference); tokens: a folder that 'mada tokens' made; "
        "vision: a folder with CIFAR-10's parquet files (default: scikit-learn's digits)",
    ),
    "layers": Option(int, "N", "layers (default: 4; tokens: 12)"),
    "heads": Option(int, "N", "attention heads (default: 4; tokens: 12)"),
    "width": Option(
        int,
        "N",
        "width, a multiple of heads; vision: channels of the first layer (default: 128; tokens: 768; vision: 32)",
    ),
    "context": Option(int, "N", "characters or tokens that the model sees (default: 64; tokens: 1024)"),
    "batch": Option(int, "N", "windows or images in a batch (default: 12; tokens: 480; vision: 128)"),
    "val_windows": Option(int, "N", "windows to validate on (default: 256)"),
    "dropout": Option(float, "X", "language, tokens: share left out (default: 0)"),
    "size": Option(str, "NAME", "tokens: gpt2, gpt2-medium, ..., for layers, heads and width"),
    "init": Option(
        str,
        "RUN",
        "begin with the weights of an earlier run; tokens: also with published ones, in a folder or on the hub",
    ),
    "characters_of": Option(str, "FILE", "language: know the characters of this text, too, for a later run on it"),
    "wikitext": Option(str, "FOLDER", "tokens: measure the perplexity on its val.bin, too"),
    "lambada": Option(str, "FILE", "tokens: measure last words, too; text or JSON lines"),
    "model": Option(str, "NAME", "vision: cnn or resnet9 (default: cnn)"),
    "augment": Option(bool, "", "vision: shift and mirror (default: all but the digits)"),
    "autocast": Option(bool, "", "language, tokens: products in bfloat16 (default: no; tokens: where there is a GPU)"),
}


def task_type(kind: str) -> type[TaskConfig]:
    """Return the class of a task's configurations. Raise :class:`InputError` where there is no such task."""
    require(kind in TASKS, "task", kind, f"one of {', '.join(TASKS)}")
    module, _, name = TASKS[kind].rpartition(".")
    config: type[TaskConfig] = getattr(import_module(module), name)
    return config


def make_task(values: Mapping[str, Any]) -> TaskConfig:
    """Return the task of kind ``values["kind"]`` (default: language) with the other values as its arguments.

    >>> make_task({"kind": "language", "width": 64}).kind
    'language'
    """
    kind = values.get("kind", DEFAULT)
    config = task_type(kind)
    fields = [field.name for field in dataclasses.fields(config)]
    arguments = {name: value for name, value in values.items() if name != "kind"}
    for name in arguments:
        require(name in fields, f"argument of task {kind}", name, f"one of {', '.join(fields)}")
    return config(**arguments)


def without_paths(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a stored task without its paths, which mean nothing on another machine."""
    return {name: value for name, value in task.items() if name not in task_type(task["kind"]).paths}
