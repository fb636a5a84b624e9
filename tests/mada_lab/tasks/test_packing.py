"""mada tokens: what it packs is what the tokenizer makes of the whole, whatever the source and however it ends."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import filelock
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.files import locked
from mada_lab.tasks import packing
from mada_lab.tasks.corpus import Corpus, pieces
from mada_lab.tasks.language import embedded_text
from mada_lab.tasks.packing import DTYPE, load_tokenizer, pack, read

ROWS = [
    "One day.",
    " Another\n\nday, <|endoftext|> not the end.",
    "",
    "Третий день.",
    *(f"Day {i}." for i in range(60)),
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(bpe: Path) -> Tokenizer:
    """The library's own way to the same tokenizer."""
    tokenizer = Tokenizer(models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def separated(encoder: Tokenizer, rows: list[str]) -> list[int]:
    codes: list[int] = []
    for row in filter(None, rows):
        codes += ([0] if codes else []) + encoder.encode(row).ids
    return codes


@given(st.lists(st.text("ab,' \n\r\t\u00a0é1", max_size=12)), st.integers(1, 9))
def test_pieces_are_cut_between_tokens(parts: list[str], size: int) -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    cut = list(pieces(parts, size=size))
    assert "".join(piece.text for piece in cut) == "".join(parts)
    assert [piece.begins for piece in cut] == [True, *[False] * (len(cut) - 1)][: len(cut)]
    assert cut == list(pieces(["".join(parts)], size=size))
    words = [word for piece in cut for word, _ in split(piece.text)]
    assert words == [word for word, _ in split("".join(parts))]


def test_a_text(bpe: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    text = embedded_text()[:200_000].replace("\n", "\r\n", 20) + "конец"
    (tmp_path / "text.txt").write_bytes(text.encode())
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    metas = [
        pack(Corpus((str(tmp_path / name),)), tmp_path / f"{name}-out", str(bpe))
        for name in ("text.txt", "text.txt.gz")
    ]
    cut = int(0.9 * len(text))
    for name, meta in zip(("text.txt", "text.txt.gz"), metas, strict=True):
        packed = read(str(tmp_path / f"{name}-out"))
        assert packed.meta == meta
        for part, tokens, expected in (("train", packed.train, text[:cut]), ("val", packed.validation, text[cut:])):
            assert tokens.tolist() == encoder.encode(expected).ids
            content = (tmp_path / f"{name}-out" / f"{part}.bin").read_bytes()
            assert len(content) == 2 * meta[part]["tokens"]
            assert hashlib.sha256(content).hexdigest() == meta[part]["sha256"]
            assert (meta[part]["documents"], meta[part]["characters"]) == (1, len(expected))
        assert packed.tokenizer().encode(text).ids == encoder.encode(text).ids
        assert not list(tmp_path.glob("*.tmp"))


def save(rows: list[str], folder: Path, ending: str) -> None:
    data = datasets.Dataset.from_dict({"text": rows, "other": list(range(len(rows)))})
    folder.mkdir()
    if ending == "saved":
        data.save_to_disk(folder)
    elif ending == "parquet":
        half = len(rows) // 2
        for number, part in enumerate((range(half), range(half, len(rows)))):
            data.select(part).to_parquet(folder / f"{number}.parquet")
    else:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


@pytest.mark.parametrize("ending", ["saved", "parquet", "jsonl"])
def test_rows_are_documents(ending: str, bpe: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    save(ROWS, tmp_path / "in", ending)
    corpus = Corpus((str(tmp_path / "in"),))
    pack(corpus, tmp_path / "all", str(bpe), val_share=0.0)
    packed = read(str(tmp_path / "all"))
    assert packed.train.tolist() == separated(encoder, ROWS)
    assert len(packed.validation) == 0
    assert packed.meta["train"]["documents"] == len(ROWS) - 1

    metas = [pack(corpus, tmp_path / f"split{i}", str(bpe), val_share=0.3) for i in range(2)]
    assert metas[0] == metas[1]
    packed = read(str(tmp_path / "split0"))
    documents = []
    for tokens in (packed.train, packed.validation):
        ends = np.flatnonzero(tokens == 0)
        documents += [packed.tokenizer().decode(part[part != 0].tolist()) for part in np.split(tokens, ends)]
    assert sorted(documents) == sorted(filter(None, ROWS))
    assert 0.15 < metas[0]["val"]["documents"] / (len(ROWS) - 1) < 0.45


def test_joined_rows_are_one_text(bpe: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    save([" = A = \n", "", " one , two \n", " \n"], tmp_path / "in", "parquet")
    corpus = Corpus((str(tmp_path / "in"),), join=True)
    pack(corpus, tmp_path / "out", str(bpe), val_share=1.0)
    assert read(str(tmp_path / "out")).validation.tolist() == encoder.encode(" = A = \n one , two \n \n").ids
    with pytest.raises(InputError, match="val_share must be 0 or 1 where rows are joined to one text, got 0.1"):
        pack(corpus, tmp_path / "other", str(bpe))


def test_validation_data_of_their_own(bpe: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    for name, text in (("a.txt", "Some text."), ("b.txt", "More text."), ("c.txt", "Held out.")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    assert (
        main(["tokens", "--data", a, b, "--val-data", c, "--tokenizer", str(bpe), "--out", str(tmp_path / "out")]) == 0
    )
    packed = read(str(tmp_path / "out"))
    assert packed.train.tolist() == separated(encoder, ["Some text.", "More text."])
    assert packed.validation.tolist() == encoder.encode("Held out.").ids


def test_the_two_names_of_the_files(bpe: Path, tmp_path: Path) -> None:
    for name, other in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / other).write_bytes((bpe / name).read_bytes())
    assert load_tokenizer(str(tmp_path)).to_str() == load_tokenizer(str(bpe)).to_str()


KILLED = """
import os, signal, sys
from mada_lab.tasks import packing
from mada_lab.tasks.corpus import Corpus
packing.CHARACTERS = 1
packing.pack(Corpus((sys.argv[1],)), sys.argv[2], sys.argv[3], on_batch=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_after_a_kill_the_same_call_makes_it_whole(bpe: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(embedded_text()[:100_000], encoding="utf-8")
    command = [sys.executable, "-c", KILLED, str(text), str(out), str(bpe)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert "meta.json" not in os.listdir(out)
    assert len(os.listdir(out)) > 1
    with pytest.raises(InputError, match="data must be a folder that 'mada tokens' made"):
        read(str(out))
    pack(Corpus((str(text),)), out, str(bpe))
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "out"}
    assert set(os.listdir(out)) - {"lock"} == {"meta.json", "tokenizer.json", "train.bin", "val.bin"}
    assert read(str(out)).meta["train"]["characters"] == 90_000


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_folder_that_is_there_or_behind_a_link(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    pack(Corpus((str(tmp_path / "text.txt"),)), tmp_path / "link", str(bpe))
    assert read(str(tmp_path / "empty")).meta["train"]["documents"] == 1


def test_nothing_that_is_not_ours_is_deleted(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    corpus = Corpus((str(tmp_path / "text.txt"),))
    load_tokenizer(str(bpe)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine" / "tokenizer.json")
    with pytest.raises(InputError, match="out must be a new or empty folder"):
        pack(corpus, tmp_path / "mine", str(bpe))
    assert os.listdir(tmp_path / "mine") == ["tokenizer.json"]
    (tmp_path / "busy").mkdir()
    with locked(tmp_path / "busy"), pytest.raises(InputError, match="another process is writing into .*busy"):
        pack(corpus, tmp_path / "busy", str(bpe))


def test_what_another_process_finishes_meanwhile_stays(
    bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    corpus = Corpus((str(tmp_path / "text.txt"),))
    with monkeypatch.context() as patch:

        def slow(source: str) -> Tokenizer:
            patch.undo()
            pack(corpus, tmp_path / "out", source)
            return load_tokenizer(source)

        patch.setattr(packing, "load_tokenizer", slow)
        with pytest.raises(InputError, match="out must be a new or empty folder"):
            pack(corpus, tmp_path / "out", str(bpe))
    assert read(str(tmp_path / "out")).meta["train"]["documents"] == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="without locks"), locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_tokenizer_stored_with_truncation_and_padding(bpe: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 9)
    pack(Corpus((str(tmp_path / "text.txt"),)), tmp_path / "out", str(tmp_path / "tokenizer"), val_share=0)
    expected = encoder.encode((tmp_path / "text.txt").read_text()).ids
    assert read(str(tmp_path / "out")).train.tolist() == expected
    assert len(expected) > 5


def test_a_folder_with_files_of_several_formats(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Some text."))
    assert [path.name for path in Corpus((str(tmp_path),)).files()] == ["a.txt", "b.txt.gz"]
    (tmp_path / "data.json").touch()
    with pytest.raises(InputError, match="data must be files of one format"):
        Corpus((str(tmp_path),))
    for name in ("a.txt", "b.txt.gz"):
        (tmp_path / name).unlink()
    assert [path.name for path in Corpus((str(tmp_path),)).files()] == ["data.json"]
    (tmp_path / "c.parquet").touch()
    assert [path.name for path in Corpus((str(tmp_path),)).files()] == ["c.parquet"]  # the other describes it


@pytest.mark.parametrize(
    "error", [RuntimeError("Dataset scripts are no longer supported"), datasets.exceptions.DatasetsError("no\nmore")]
)
def test_data_sets_that_cannot_be_read(
    error: Exception, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    command = ["tokens", "--data", "some/ds", "--tokenizer", str(bpe), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    message = str(error).splitlines()[0]
    assert f"data must be a path or a name on the hub, got 'some/ds': {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors(bpe: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("Some text.")
    cases = {
        "data must be the path of a file or folder, or a name on the hub, got 'nowhere.txt'": ["nowhere.txt"],
        "data must be files of one format": [str(good), __file__],
        "data must be a folder with files .parquet": [str(tmp_path / "empty")],
    }
    (tmp_path / "empty").mkdir()
    for message, names in cases.items():
        with pytest.raises(InputError, match=message):
            Corpus(tuple(names))
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-9])
    (tmp_path / "bad.jsonl").write_text('{"words": "x"}\n')
    for name, message in (
        ("bad.txt", "cannot be packed into .*codec"),
        ("bad.txt.gz", "cannot be packed into .*end-of-stream"),
        ("bad.jsonl", "data must have a text in the column 'text', got the row {'words': 'x'}"),
    ):
        with pytest.raises(InputError, match=message):
            pack(Corpus((str(tmp_path / name),)), tmp_path / "out", str(bpe))
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ({"out": tmp_path / "full"}, "out must be a new or empty folder"),
        (
            {"tokenizer": str(tmp_path / "empty")},
            "tokenizer must be a folder with tokenizer.json, .*holds no tokenizer",
        ),
        ({"val_share": 1.5}, "val_share must be a number from 0 to 1, got 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            pack(Corpus((str(good),)), **{"out": tmp_path / "out", "tokenizer": str(bpe), **arguments})


def test_a_folder_that_is_not_whole(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text.")
    pack(Corpus((str(tmp_path / "text.txt"),)), tmp_path / "out", str(bpe))
    with (tmp_path / "out" / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="data must be a folder that 'mada tokens' made, .*train.bin has"):
        read(str(tmp_path / "out"))
    with pytest.raises(InputError, match="wikitext must be a folder that 'mada tokens' made"):
        read(str(tmp_path), "wikitext")


def test_tiny_shakespeare_in_gpt2_tokens(tiny_shakespeare: Path, tmp_path: Path) -> None:
    tokenizer = tiny_shakespeare.parent / "gpt2"
    if not tokenizer.is_dir():
        pytest.skip("GPT-2's tokenizer is not beside tiny_shakespeare.txt, in the folder gpt2")
    meta = pack(Corpus((str(tiny_shakespeare),)), tmp_path / "out", str(tokenizer))
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == (301_966, 36_059)
    assert np.fromfile(tmp_path / "out" / "train.bin", DTYPE).max() < meta["vocabulary"] == 50_257
