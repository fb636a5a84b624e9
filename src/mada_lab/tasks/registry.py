"""The tasks by name, and their options on the command line. A new task has a file, and its lines here.

Tasks are imported where they are used: ``mada --help`` lists their options without torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mada_lab.errors import require

if TYPE_CHECKING:
    from mada_lab.tasks.base import TaskConfig

TASKS = {
    "language": "mada_lab.tasks.language.LanguageConfig",
    "tokens": "mada_lab.tasks.tokens.TokensConfig",
    "vision": "mada_lab.tasks.vision.VisionConfig",
    "tabular": "mada_lab.tasks.tabular.TabularConfig",
    "bandit": "mada_lab.tasks.bandit.BanditConfig",
    "gan": "mada_lab.tasks.gan.GanConfig",
}
KINDS = "language (characters), tokens, vision, tabular, bandit or gan"
DEFAULT = "language"


@dataclass(frozen=True)
class Option:
    """A field of tasks on the command line.

    Args:
        meaning: for people. Where it differs between tasks, it says so.
        kind: of its value: str, int, float or bool.
        metavar: stands for its value in a help text.
        defaults: the classes that declare a default to be shown, by the text in front of it.
    """

    meaning: str
    kind: type = str
    metavar: str = ""
    defaults: Mapping[str, str] = field(default_factory=dict)


_WINDOWS = {"": "mada_lab.tasks.windows:WindowsConfig"}
_GPT = {**_WINDOWS, "tokens: ": "mada_lab.tasks.tokens:TokensConfig"}
_VISION = "mada_lab.tasks.vision:VisionConfig"
_TABULAR = "mada_lab.tasks.tabular:TabularConfig"
_BANDIT, _GAN = "mada_lab.tasks.bandit:BanditConfig", "mada_lab.tasks.gan:GanConfig"
_ALL = {**_GPT, "vision: ": _VISION, "tabular: ": _TABULAR, "bandit: ": _BANDIT, "gan: ": _GAN}
OPTIONS = {
    "data": Option(
        "any UTF-8 text (default: Python's language reference); tokens: a folder that 'mada tokens' made; "
        "vision, bandit: a folder with CIFAR-10's parquet files (default: scikit-learn's digits); "
        "tabular: a file of comma-separated numbers, the target last",
        metavar="FILE",
    ),
    "layers": Option("layers", int, "N", {**_GPT, "tabular: ": _TABULAR}),
    "heads": Option("attention heads", int, "N", _GPT),
    "width": Option("width, a multiple of heads; vision, bandit: channels of the first layer", int, "N", _ALL),
    "context": Option("characters or tokens that the model sees", int, "N", _GPT),
    "batch": Option("windows, images, rows or points in a batch", int, "N", _ALL),
    "val_windows": Option("windows to validate on", int, "N", _WINDOWS),
    "dropout": Option("language, tokens: share left out", float, "X", _WINDOWS),
    "size": Option("tokens: gpt2, gpt2-medium, ..., for layers, heads and width", metavar="NAME"),
    "init": Option(
        "begin with the weights of an earlier run; tokens: also with published ones, in a folder or on the hub",
        metavar="RUN",
    ),
    "characters_of": Option("language: know the characters of this text, too, for a later run on it", metavar="FILE"),
    "wikitext": Option("tokens: measure the perplexity on its val.bin, too", metavar="FOLDER"),
    "lambada": Option("tokens: measure last words, too; text or JSON lines", metavar="FILE"),
    "adapt": Option("language, tokens, with init: train all of the model, a new head, or lora", metavar="WHAT"),
    "retained": Option("language, with init: text that the earlier run knows: what is forgotten?", metavar="FILE"),
    "table": Option("tabular: diabetes or digits", metavar="NAME", defaults={"": _TABULAR}),
    "model": Option("vision: cnn, resnet9 or vit", metavar="NAME", defaults={"": _VISION}),
    "augment": Option("vision: shift and mirror (default: all but the digits)", bool),
    "autocast": Option("language, tokens: products in bfloat16 (default: no; tokens: where there is a GPU)", bool),
}
"""Fields of tasks that are options of a command, by name."""


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
