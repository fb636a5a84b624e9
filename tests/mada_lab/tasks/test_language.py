from __future__ import annotations

import gzip
import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mada_lab.errors import InputError
from mada_lab.tasks import language
from mada_lab.tasks.language import LanguageConfig, LanguageTask, embedded_text

TINY = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "val_windows": 8}


def _task(data: Path | None = None) -> LanguageTask:
    return LanguageConfig(data=None if data is None else str(data), **TINY).build()


def test_embedded_text_is_there() -> None:
    text = embedded_text()
    assert len(text) > 300_000
    assert "generator" in text


def test_batches_and_models_are_functions_of_their_arguments() -> None:
    one, other = _task(), _task()
    other.batch(5, 9)
    torch.manual_seed(17)
    for tensors in zip(one.batch(0, 3), other.batch(0, 3), strict=True):
        assert torch.equal(*tensors)
    assert not torch.equal(one.batch(0, 3)[0], one.batch(0, 4)[0])
    assert not torch.equal(one.batch(0, 3)[0], one.batch(1, 3)[0])
    before = torch.random.get_rng_state()
    models = [task.model(1).state_dict() for task in (one, other)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_targets_are_inputs_shifted_by_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(400)))
    inputs, targets = _task(path).batch(0, 1)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal((inputs + 1) % 26, targets)


def test_every_place_of_the_training_text_can_be_drawn_and_none_of_the_validation_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("".join(chr(0x4E00 + i) for i in range(180)))  # each character once: the code is the place
    task = _task(path)
    seen = torch.cat([torch.cat([t.flatten() for t in task.batch(0, step)]) for step in range(300)])
    assert set(seen.tolist()) == set(range(162))


def test_untrained_loss_is_that_of_guessing() -> None:
    task = _task()
    model = task.model(0)
    expected = torch.tensor(float(len(task.vocabulary))).log().item()
    assert task.validate(model)["loss"] == pytest.approx(expected, rel=0.02)
    assert task.validate(model) == task.validate(model)
    assert task.loss(model, task.batch(0, 1)).item() == pytest.approx(expected, rel=0.02)


def test_model_ties_embeddings_and_drops_nothing() -> None:
    model = _task().model(0)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "not empty"),
        (b"too short", "more than 170 characters for context=16, got 9"),
        (b"abc\xff\xfe" * 100, "byte 3 is not UTF-8"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as info:
        _task(path)
    assert str(path) in str(info.value)


def test_a_compressed_text_is_the_text(tmp_path: Path) -> None:
    content = "To be,\r\nor not: é, ∀, 𝄞\n".encode() * 50
    (tmp_path / "text.txt").write_bytes(content)
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(content))
    plain, packed = (_task(tmp_path / name) for name in ("text.txt", "text.txt.gz"))
    assert packed.describe() == plain.describe() | {"source": "text.txt.gz"}
    assert packed.describe()["sha256"] == hashlib.sha256(content).hexdigest()
    assert np.array_equal(packed.train, plain.train)
    assert np.array_equal(packed.validation, plain.validation)


def test_bad_compressed_files(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    whole = gzip.compress(random.Random(0).randbytes(2000).hex().encode())
    spoilt = whole[:500] + bytes(255 - byte for byte in whole[500:600]) + whole[600:]
    for content in (b"To be, or not to be. " * 100, whole[:1000], spoilt):
        path.write_bytes(content)
        with pytest.raises(InputError, match="data must be a readable text file, got"):
            _task(path)
    path.write_bytes(gzip.compress(b"abc\xff\xfe" * 100))
    with pytest.raises(InputError, match="byte 3 is not UTF-8"):
        _task(path)


def test_tokens_are_places_in_the_sorted_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = embedded_text()[:10_000] + "".join(map(chr, range(0x3B1, 0x3B1 + 400))) + "𝄞"
    monkeypatch.setattr(language, "PIECE", 7)
    vocabulary = language.characters(text)
    assert list(vocabulary) == sorted(set(text))
    assert len(vocabulary) > 256
    assert language.encode(text, vocabulary).tolist() == [vocabulary.index(character) for character in text]


def test_folder_as_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readable text file"):
        _task(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("layers", 0), ("width", 15), ("context", -1), ("batch", 2.5), ("dropout", 1.0)]
)
def test_bad_sizes(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        LanguageConfig(**{**TINY, name: value})


def test_products_in_bfloat16_only_where_asked_for() -> None:
    losses = {}
    for autocast in (False, True):
        task = LanguageConfig(**TINY, autocast=autocast).build()
        losses[autocast] = task.loss(task.model(0), task.batch(0, 1)).item()
    assert losses[False] != losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert LanguageConfig().autocast is False


def test_tiny_shakespeare(tiny_shakespeare: Path) -> None:
    task = _task(tiny_shakespeare)
    assert task.describe() | {"sha256": None} == {
        "task": "language",
        "source": "tiny_shakespeare.txt",
        "sha256": None,
        "characters": 1_115_394,
        "vocabulary": "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
        "init": None,
    }
