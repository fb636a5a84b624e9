"""Character-level language modelling: a GPT-2 with random weights on any text.

Without a file, the text is Python's own language reference, which the standard library carries
(``pydoc_data.topics``, about 465,000 characters). It differs a little between Python versions, which is why a run
records the version and a hash of the text.
"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mada_optim.tasks import InputError, require
from mada_optim.tasks.windows import WindowsConfig, WindowsTask

TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class LanguageConfig(WindowsConfig):
    """Text, model size and batch. The defaults are nanoGPT's recipe for the CPU: 0.8 million parameters.

    Args:
        data: path of a UTF-8 text file; None: the language reference of Python.
        layers, heads, width, context, batch, val_windows: see :class:`WindowsConfig`; each token is a character.
    """

    kind: ClassVar[str] = "language"

    def build(self) -> LanguageTask:
        return LanguageTask(self)


class LanguageTask(WindowsTask):
    """Predict the next character. The vocabulary is every character of the text; the last tenth is for validation."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.text = embedded_text() if config.data is None else read_text(config.data)
        self.vocabulary = sorted(set(self.text))
        codes = {character: code for code, character in enumerate(self.vocabulary)}
        tokens = np.array([codes[character] for character in self.text])
        train, validation = np.split(tokens, [int(TRAIN_SHARE * len(tokens))])
        if len(validation) <= config.context:
            raise InputError(
                f"data must have more than {10 * (config.context + 1)} characters for context={config.context}, "
                f"got {len(tokens)} in {config.data}"
            )
        super().__init__(config, len(self.vocabulary), train, validation)

    def describe(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "task": "language",
            "source": f"pydoc_data.topics of Python {platform.python_version()}" if data is None else Path(data).name,
            "sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "characters": len(self.text),
            "vocabulary": len(self.vocabulary),
        }


def embedded_text() -> str:
    """The topics of Python's language reference, sorted by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    try:
        # Line ends as they are: the text's hash must not depend on the platform.
        text = Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"data must be the path of a text file, got {path!r}, which does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"data must be a UTF-8 text file, got {path!r}, whose byte {error.start} is not UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"data must be a readable text file, got {path!r}: {error.strerror}") from None
    require(bool(text), "data", path, "a text file that is not empty")
    return text
