"""Texts as packed tokens: a folder that language models are trained on without reading all of it.

train.bin, val.bin   tokens as little-endian unsigned 16-bit numbers, one after the other
tokenizer.json       what made them, in the format of the library ``tokenizers``
meta.json            counts, SHA-256 sums, the source and the versions; written last
lock                 held by the process that packs
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

import mada_optim
from mada_lab.errors import InputError, require
from mada_lab.files import LOCK, TEMPORARY, locked, replacing, write_json
from mada_lab.tasks.corpus import Corpus, Piece, split
from mada_lab.tasks.windows import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
FORMAT = 1
DTYPE = np.dtype("<u2")
# What a kill may leave behind, beside the lock.
_UNFINISHED = [name + end for name in ("train.bin", "val.bin", "tokenizer.json") for end in ("", TEMPORARY)]
_UNFINISHED.append("meta.json" + TEMPORARY)
CHARACTERS = 1 << 21  # encoded at once; the encoder takes some 100 bytes for each

# By either pair of names GPT-2's tokenizer has been published.
_VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass(frozen=True)
class Packed:
    """A folder of packed tokens; the tokens are memory-mapped."""

    folder: Path
    meta: dict[str, Any]
    train: Tokens
    validation: Tokens

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.folder))


def read(folder: str, argument: str = "data") -> Packed:
    """What :func:`pack` wrote. Raises :class:`InputError`, naming ``argument``, where it is not there or not whole."""
    path = Path(folder)
    try:
        meta = json.loads((path / "meta.json").read_text("utf-8"))
        require(meta["format"] == FORMAT, f"format of {path}", meta["format"], str(FORMAT))
        train, validation = (_map(path / f"{part}.bin", meta[part]["tokens"]) for part in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{argument} must be a folder that 'mada tokens' made, got {folder!r}: {error}") from None
    return Packed(path, meta, train, validation)


def load_tokenizer(source: str) -> Tokenizer:
    """GPT-2's tokenizer, or another with at most 65,536 tokens and a token <|endoftext|>.

    Args:
        source: a folder with ``tokenizer.json``, ``vocab.json`` and ``merges.txt``, or ``encoder.json`` and
            ``vocab.bpe``; or a name on the hub, as ``gpt2``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(source)
    pairs = [(folder / one, folder / two) for one, two in _VOCABULARIES]
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif files := next((pair for pair in pairs if all(path.is_file() for path in pair)), None):
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        elif folder.is_dir():
            raise ValueError("it holds no tokenizer")
        else:
            tokenizer = Tokenizer.from_pretrained(source)
    except Exception as error:  # the library raises nothing more precise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"tokenizer must be a folder with tokenizer.json, {' or '.join('+'.join(pair) for pair in _VOCABULARIES)}, "
            f"or a name on the hub, got {source!r}: {reason}"
        ) from error
    size = tokenizer.get_vocab_size()
    require(size <= 2**16, "tokenizer", source, f"one of at most 65,536 tokens (it has {size})")
    require(_end(tokenizer) >= 0, "tokenizer", source, f"one with a token {END}")
    # A document that spells the end of a document does not end there.
    tokenizer.encode_special_tokens = True
    # A fine-tuned model's tokenizer is stored with those that it was last used with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@dataclass
class Part:
    """What has been written of train.bin or val.bin."""

    file: BinaryIO
    tokens: int = 0
    documents: int = 0
    characters: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def add(self, piece: Piece, codes: list[int], end: int) -> None:
        """The tokens of a piece, after that which separates its document from the one before it."""
        separator = [end] if piece.begins and self.documents else []
        data = np.array(separator + codes, dtype=DTYPE).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.tokens += len(data) // DTYPE.itemsize
        self.documents += piece.begins
        self.characters += len(piece.text)

    def describe(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("tokens", "documents", "characters")}
        return {**counts, "sha256": self.sha256.hexdigest()}


def pack(
    corpus: Corpus,
    out: str | Path,
    tokenizer: str = "gpt2",
    *,
    val_share: float = 0.1,
    val: Corpus | None = None,
    on_batch: Callable[[Part, Part], None] | None = None,
) -> dict[str, Any]:
    """Tokenize texts into a folder, a few megabytes at a time, on all cores; documents are separated by <|endoftext|>.

    meta.json, without which the folder is of no use, is written last; after a kill, begin again.

    Args:
        corpus: the texts.
        out: a folder that is not there yet, or is empty, or where this was killed.
        tokenizer: see :func:`load_tokenizer`.
        val_share: see :func:`mada_lab.tasks.corpus.split`.
        val: validation texts; ``val_share`` is then not used.
        on_batch: called as it goes on, with what has been written to train.bin and val.bin.

    Returns:
        What is in meta.json.

    Raises:
        InputError: an argument is not usable, or the texts cannot be read; nothing is left of them in the folder then.
    """
    out = Path(out)
    require(0 <= val_share <= 1, "val_share", val_share, "a number from 0 to 1")
    whole = val_share in (0, 1) or val is not None or not corpus.join
    require(whole, "val_share", val_share, "0 or 1 where rows are joined to one text")
    _check_free(out)
    encoder = load_tokenizer(tokenizer)
    end = _end(encoder)
    if val is None:
        stream: Iterable[Piece] = split(corpus, val_share)
    else:
        stream = chain(split(corpus, 0.0), split(val, 1.0))
    try:
        with _alone_in(out):
            with replacing(out / "train.bin") as train_file, replacing(out / "val.bin") as val_file:
                parts = Part(train_file), Part(val_file)
                for batch in _batches(stream):
                    encoded = encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
                    for piece, codes in zip(batch, encoded, strict=True):
                        parts[piece.validation].add(piece, codes.ids, end)
                    if on_batch is not None:
                        on_batch(*parts)
            with replacing(out / "tokenizer.json") as file:
                file.write(encoder.to_str(pretty=True).encode())
            meta = {
                "format": FORMAT,
                "source": list(corpus.names),
                "val_source": f"{val_share:g} of the source" if val is None else list(val.names),
                "tokenizer": tokenizer,
                "tokenizer_sha256": hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest(),
                "vocabulary": encoder.get_vocab_size(),
                "train": parts[0].describe(),
                "val": parts[1].describe(),
                "versions": _versions(),
            }
            write_json(out / "meta.json", meta)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{corpus} cannot be packed into {out}: {reason}") from error
    return meta


def _end(tokenizer: Tokenizer) -> int:
    """Return the number of the token that separates documents; -1 where there is none."""
    number = tokenizer.token_to_id(END)
    return -1 if number is None else number


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in stream:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _check_free(out: Path) -> None:
    """Raise unless it is new, empty, or a folder in which packing was killed. A tokenizer alone is not ours."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    killed = LOCK in names and names <= {LOCK, *_UNFINISHED}
    free = not out.exists() or (out.is_dir() and (killed or not names))
    require(free, "out", str(out), "a new or empty folder")


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Let nobody else pack into a folder, and leave nothing in it of what an error ends, or a kill ended before."""
    new = not out.exists()
    with locked(out):
        _check_free(out)  # another process may have finished since
        _forget(out)
        try:
            yield
        except BaseException:
            _forget(out)
            if new:
                shutil.rmtree(out, ignore_errors=True)
            raise


def _forget(out: Path) -> None:
    for name in _UNFINISHED:
        (out / name).unlink(missing_ok=True)


def _map(path: Path, count: int) -> Tokens:
    size = path.stat().st_size
    if size != count * DTYPE.itemsize:
        raise ValueError(f"{path.name} has {size} bytes, not the {count * DTYPE.itemsize} that meta.json says")
    return np.memmap(path, DTYPE, "r") if count else np.zeros(0, DTYPE)


def _versions() -> dict[str, str]:
    import tokenizers

    return {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "mada_optim": mada_optim.__version__,
    }
