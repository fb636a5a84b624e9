"""Texts for language models: files and data sets as documents, read bit by bit, however large they are."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mada_lab.errors import InputError, require

PIECE = 1 << 16  # characters

# What reads files with these ends: ourselves, or a loader of the library datasets, by its name.
_LOADERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".txt": "text",
    ".txt.gz": "text",
}
# GPT-2's tokens never go on after a character that is not white space into one that is.
_GAP = re.compile(r"(?<=\S)(?=[ \n])")


@dataclass(frozen=True)
class Piece:
    """Part of a document; ``begins``: its first. ``validation``: which of the two parts of the corpus it is for."""

    text: str
    begins: bool
    validation: bool = False


@dataclass(frozen=True)
class Corpus:
    """Where the texts are.

    Args:
        names: text files (.txt, .txt.gz), each one document; or files of a data set with a column "text" (.parquet,
            .arrow, .jsonl, .json), each row a document; or one folder of such files, all of which are read, whatever
            their names say of splits; or one name on the hub, as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT. The library
            ``datasets`` reads all but text files, streaming.
        join: rows are lines of one text, as in WikiText.

    Raises:
        InputError: there is nothing by these names, or files of several formats.
    """

    names: tuple[str, ...]
    join: bool = False

    def __post_init__(self) -> None:
        require(bool(self.names), "data", self.names, "files, a folder or a name on the hub")
        self.loader()

    def files(self) -> list[Path]:
        """Return all files, in the order in which they are read; none where the data are on the hub."""
        if len(self.names) == 1 and Path(self.names[0]).is_dir():
            readable = [path for path in sorted(Path(self.names[0]).iterdir()) if _loader(path) is not None]
            if not readable:
                raise InputError(f"data must be a folder with files {', '.join(_LOADERS)}, got {self.names[0]!r}")
            # Beside files of a data set, .json is a description: the library saves some, the hub has some.
            described = any(path.name.endswith((".parquet", ".arrow", ".jsonl", ".jsonl.gz")) for path in readable)
            return [path for path in readable if not (described and path.suffix == ".json")]
        missing = [name for name in self.names if not Path(name).is_file()]
        if not missing:
            return [Path(name) for name in self.names]
        on_hub = len(self.names) == 1 and not missing[0].endswith(tuple(_LOADERS)) and missing[0][:1] not in "./~"
        require(on_hub, "data", missing[0], "the path of a file or folder, or a name on the hub")
        return []

    def loader(self) -> str:
        """ "text"; the name of a loader of the library ``datasets``; or "", where the data are on the hub."""
        files = self.files()
        known = {_loader(path) for path in files}
        same = len(known) == (1 if files else 0) and None not in known
        require(same, "data", str(self), f"files of one format, {', '.join(_LOADERS)}")
        return min((name for name in known if name), default="")

    def documents(self) -> Iterator[Iterable[str]]:
        """Each row, or all of them where they are joined, as parts of a text; not for text files."""
        if self.join:
            yield self._rows()
        else:
            yield from ([text] for text in self._rows())

    def _rows(self) -> Iterator[str]:
        for row in _read_rows(self):
            text = row.get("text")
            if not isinstance(text, str):
                raise InputError(f"data must have a text in the column 'text', got the row {str(row)[:80]} in {self}")
            yield text

    def __str__(self) -> str:
        return ", ".join(self.names)


def split(corpus: Corpus, val_share: float) -> Iterator[Piece]:
    """All pieces of a corpus, in its order, those of the validation data marked.

    Of a text file, the last ``val_share`` of the characters are for validation; of a data set, that share of the
    rows, drawn at random, the same at every call.
    """
    if corpus.loader() == "text":
        for path in corpus.files():
            total = sum(map(len, _read(path)))
            end = int((1 - val_share) * total)
            yield from pieces(_between(_read(path), 0, end), validation=False)
            yield from pieces(_between(_read(path), end, total), validation=True)
        return
    random = np.random.default_rng(0)
    for document in corpus.documents():
        yield from pieces(document, validation=bool(random.random() < val_share))


def pieces(parts: Iterable[str], validation: bool = False, size: int = PIECE) -> Iterator[Piece]:
    """A document cut into pieces of at least ``size`` characters, but for the last, where no token is cut in two.

    >>> [piece.text for piece in pieces(["To be, or n", "ot to be"], size=5)]
    ['To be,', ' or not', ' to be']
    """
    begins, rest = True, ""
    for part in parts:
        begin, at = 0, max(size, len(rest))  # what is left from the part before has no gap
        rest += part
        while gap := _GAP.search(rest, at):
            yield Piece(rest[begin : gap.start()], begins, validation)
            begin, begins = gap.start(), False
            at = begin + size
        rest = rest[begin:]
    if rest:
        yield Piece(rest, begins, validation)


def open_text(path: Path) -> TextIO:
    """A UTF-8 text file, also compressed by gzip, its line ends as they are."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _read(path: Path) -> Iterator[str]:
    with open_text(path) as file:
        yield from iter(lambda: file.read(PIECE), "")


def _between(parts: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters from ``begin`` to before ``end``."""
    place = 0
    for part in parts:
        if place < end:
            yield part[max(0, begin - place) : end - place]
        place += len(part)


def _loader(path: Path) -> str | None:
    return next((name for end, name in _LOADERS.items() if path.name.endswith(end)), None)


def _read_rows(corpus: Corpus) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(f"datasets is missing, which reads {corpus}: pip install 'mada-optim[lab]'") from None
    if loader := corpus.loader():
        source: Any = {"path": loader, "data_files": [str(path) for path in corpus.files()]}
        split, allowed = "train", "files of a data set"
    else:
        name, _, rest = corpus.names[0].partition(":")
        config, _, split = rest.partition(":")
        source, allowed = {"path": name, "name": config or None}, "a path or a name on the hub"
    try:
        yield from datasets.load_dataset(**source, split=split or "train", streaming=True)
    # RuntimeError: where the data set is a program.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"data must be {allowed}, got {str(corpus)!r}: {reason}") from error
