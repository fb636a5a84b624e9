"""Character-level language modelling: a GPT-2 on any text, with random weights or those of an earlier run.

Without a file, the text is Python's own language reference, which the standard library carries
(``pydoc_data.topics``, about 465,000 characters). It differs a little between Python versions, which is why a run
records the version and a hash of the text.
"""

from __future__ import annotations

import hashlib
import platform
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mada_lab.errors import InputError, require
from mada_lab.tasks.corpus import open_text
from mada_lab.tasks.initial import Initial, from_run
from mada_lab.tasks.windows import Tokens, WindowsConfig, WindowsTask

TRAIN_SHARE = 0.9
CODE_POINTS = 0x110000  # of Unicode
PIECE = 1 << 22  # characters looked at together: some 50 MB


@dataclass(frozen=True)
class LanguageConfig(WindowsConfig):
    """Text, model size and batch. The defaults are nanoGPT's recipe for the CPU: 0.8 million parameters.

    Args:
        data: path of a UTF-8 text file, compressed by gzip where it ends with .gz; None: Python's language reference.
        layers, heads, width, context, batch, val_windows, dropout, autocast: see :class:`WindowsConfig`. Each token is
            a character. Autocast is off by default, so that results on a GPU are those on a CPU.
        init: see there. The vocabulary is that of the earlier run, and has all characters of the text.
        characters_of: path of another text. Its characters are in the vocabulary, too: a later run on it may begin
            with the weights of this one.
        retained: path of a text that the earlier run knows. All of it is validated on, too: ``retained_loss`` shows
            what is forgotten.
    """

    kind: ClassVar[str] = "language"
    paths: ClassVar[tuple[str, ...]] = ("data", "init", "characters_of", "retained")
    autocast: bool | None = False
    characters_of: str | None = None
    retained: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        begun = self.retained is None or self.init is not None
        require(begun, "retained", self.retained, "left out without init: there is nothing to forget")
        alone = self.init is None or self.characters_of is None
        require(alone, "characters_of", self.characters_of, "left out with init, whose vocabulary is kept")

    def build(self) -> LanguageTask:
        return LanguageTask(self)


class LanguageTask(WindowsTask):
    """Predict the next character. The last tenth of the text is for validation.

    The vocabulary is every character of the text and of ``characters_of``, or that of the run ``init``.
    """

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        text = embedded_text() if config.data is None else read_text(config.data)
        initial = None if config.init is None else from_run(config.init, config.kind)
        known = characters(text)
        if initial is None:
            others = "" if config.characters_of is None else read_text(config.characters_of, "characters_of")
            self.vocabulary = characters(known + others)
        else:
            self.vocabulary = _vocabulary(initial)
            missing = "".join(sorted(set(known) - set(self.vocabulary)))
            where = "Python's language reference" if config.data is None else config.data
            allowed = f"a text of characters that init={config.init} knows, as it would with characters_of"
            require(not missing, "data", where, f"{allowed} (it lacks {missing[:20]!r})")
        self._sha256 = hashlib.sha256(text.encode()).hexdigest()
        tokens = encode(text, self.vocabulary)
        train, validation = np.split(tokens, [int(TRAIN_SHARE * len(tokens))])
        if len(validation) <= config.context:
            raise InputError(
                f"data must have more than {10 * (config.context + 1)} characters for context={config.context}, "
                f"got {len(tokens)} in {config.data}"
            )
        super().__init__(config, len(self.vocabulary), train, validation, initial)
        self._retained = None if config.retained is None else self._known_text(config.retained)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        values = super().validate(model)
        if self._retained is not None:
            starts = self.validation_starts(self._retained)
            values["retained_loss"] = self.mean_loss(model, self._retained, starts)
        return values

    def _known_text(self, path: str) -> Tokens:
        """Read another text of the same characters."""
        text = read_text(path, "retained")
        missing = "".join(sorted(set(characters(text)) - set(self.vocabulary)))
        long_enough = len(text) > self.config.context
        require(not missing, "retained", path, f"a text of characters that the model knows (it lacks {missing[:20]!r})")
        require(long_enough, "retained", path, f"a text of more than {self.config.context} characters")
        return encode(text, self.vocabulary)

    def describe(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "task": "language",
            "source": f"pydoc_data.topics of Python {platform.python_version()}" if data is None else Path(data).name,
            "sha256": self._sha256,
            "characters": len(self.train) + len(self.validation),
            "vocabulary": self.vocabulary,
            **self.describe_initial(),
        }


def _vocabulary(initial: Initial) -> str:
    vocabulary = initial.data.get("vocabulary")
    known = isinstance(vocabulary, str) and len(vocabulary) == initial.vocabulary_size
    require(known, "init", initial.source, "a run that has stored its vocabulary")
    return str(vocabulary)


def embedded_text() -> str:
    """The topics of Python's language reference, sorted by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str, argument: str = "data") -> str:
    try:
        # Line ends as they are: the text's hash must not depend on the platform.
        with open_text(Path(path)) as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{argument} must be the path of a text file, got {path!r}, which does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{argument} must be a UTF-8 text file, got {path!r}, whose byte {error.start} is not UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{argument} must be a readable text file, got {path!r}: {reason}") from None
    require(bool(text), argument, path, "a text file that is not empty")
    return text


def characters(text: str) -> str:
    """Each character of a text once, sorted.

    >>> characters("to be, or not")
    ' ,benort'
    """
    seen = np.zeros(CODE_POINTS, bool)
    for points in _pieces(text):
        seen[points] = True
    return "".join(map(chr, np.flatnonzero(seen)))


def encode(text: str, vocabulary: str) -> Tokens:
    """The place of each character in the vocabulary, in the smallest numbers that hold it.

    >>> encode("to be", " beot")
    array([4, 3, 0, 1, 2], dtype=uint8)
    """
    codes = np.zeros(CODE_POINTS, np.min_scalar_type(len(vocabulary) - 1))
    codes[_code_points(vocabulary)] = np.arange(len(vocabulary))
    return np.concatenate([codes[points] for points in _pieces(text)])


def _pieces(text: str) -> Iterator[npt.NDArray[np.uint32]]:
    return (_code_points(text[begin : begin + PIECE]) for begin in range(0, len(text), PIECE))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")
