from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import Table, parquet
from tiny import assert_same_run

from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig
from mada_lab.run.train import train
from mada_lab.tasks.vision import VisionConfig, shift_and_mirror

SHARED = Path(__file__).parents[4] / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 images to train on and 20 to test on, in the hub's schema: bright ones are of class 1."""
    folder = tmp_path_factory.mktemp("cifar") / "plain_text"
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        rows, labels = [], []
        for index in range(count):
            pixels = random.integers(0, 128, size=(32, 32, 3), dtype=np.uint8) + np.uint8(100 * (index % 2))
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
            labels.append(index % 2)
        parquet.write_table(
            Table.from_pydict({"img": rows, "label": labels}), folder / f"{split}-00000-of-00001.parquet"
        )
    return str(folder.parent)


def test_digits() -> None:
    task = VisionConfig().build()
    found = task.describe()
    assert (found["images"], found["validation_images"], found["classes"]) == (1437, 360, 10)
    images, labels = task.batch(0, 1)
    assert (images.shape, images.dtype, labels.dtype) == ((128, 1, 8, 8), torch.float32, torch.int64)
    values = task.validate(task.model(0))
    assert values["loss"] == pytest.approx(np.log(10), rel=0.05)
    assert 0.0 <= values["accuracy"] <= 0.3


def test_an_epoch_sees_every_image_once_and_batches_are_functions_of_seed_and_step() -> None:
    task = VisionConfig(batch=479).build()  # three batches to an epoch, with nothing left
    epochs = []
    for first in (1, 4):
        batches = [task.batch(3, step) for step in range(first, first + 3)]
        epochs.append(torch.cat([images for images, _ in batches]).flatten(1))
        assert all(torch.equal(a, b) for a, b in zip(batches[0], task.batch(3, first), strict=True))
    assert not torch.equal(*epochs)
    ordered = [np.unique(epoch.numpy(), axis=0, return_counts=True) for epoch in epochs]
    assert all(np.array_equal(a, b) for a, b in zip(*ordered, strict=True))
    assert not torch.equal(task.batch(3, 1)[0], task.batch(4, 1)[0])


def test_shift_and_mirror_moves_and_turns() -> None:
    images = np.arange(1, 1 + 2 * 3 * 6 * 6, dtype=np.uint8).reshape(2, 3, 6, 6).repeat(50, axis=0)
    moved = shift_and_mirror(images, np.random.default_rng(0))
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    seen = set()
    for image, original in zip(moved, padded, strict=True):
        places = {
            (row, column, turn)
            for row in range(9)
            for column in range(9)
            for turn in (1, -1)
            if np.array_equal(image, original[:, row : row + 6, column : column + 6][:, :, ::turn])
        }
        assert places
        seen |= places
    assert len({turn for *_, turn in seen}) == 2
    assert len(seen) > 30


@pytest.mark.parametrize("model", ["cnn", "resnet9", "vit"])
def test_models_learn_bright_from_dark_and_resume(model: str, cifar: str, tmp_path: Path) -> None:
    task = VisionConfig(data=cifar, model=model, width=4, batch=10)
    config = RunConfig(task, OptimizerConfig("mada", lr=1e-2), steps=24, eval_every=8, checkpoint_every=8, threads=1)
    result = train(config, tmp_path / "whole", draw=False)
    assert result.val["accuracy"] >= 0.9
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "cut", on_step=lambda report: 1 // (11 - report.step))  # type: ignore[arg-type,return-value]
    train(config, tmp_path / "cut", resume=True, draw=False)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_what_is_refused(cifar: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model must be one of cnn, resnet9, vit, got 'mlp'"):
        VisionConfig(model="mlp")
    with pytest.raises(InputError, match=r"data must be a folder with train\*.parquet, got"):
        VisionConfig(data=str(tmp_path)).build()
    with pytest.raises(InputError, match="batch must be at most 40, all images, got 41"):
        VisionConfig(data=cifar, batch=41).build()

    def changed(height: int = 32, width: int = 32, label: int = 0, cut: int | None = None) -> str:
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "PNG")
        for split, labels in (("train", [0, 1]), ("test", [label])):
            rows = [{"bytes": file.getvalue()[:cut], "path": None} for _ in labels]
            table = Table.from_pydict({"img": rows, "label": labels})
            (tmp_path / "changed").mkdir(exist_ok=True)
            parquet.write_table(table, tmp_path / "changed" / f"{split}.parquet")
        return str(tmp_path / "changed")

    for changes, model, message in (
        ({"height": 8, "width": 12}, "cnn", "data must be square images .* got 'images of 8 by 12'"),
        ({"height": 3, "width": 3}, "cnn", "data must be square images of 4 pixels or more for the model cnn"),
        ({"height": 7, "width": 9}, "resnet9", "data must be images of 8 pixels or more for the model resnet9"),
        ({"height": 12, "width": 12}, "vit", "data must be square images of 8 patches a side for the model vit"),
        ({"label": 2}, "resnet9", "labels of test, must be classes of train, from 0, got '2 to 2'"),
        ({"label": -1}, "cnn", "labels of test, must be classes of train, from 0, got '-1 to -1'"),
        ({"cut": 60}, "cnn", "data must hold images and labels as .* got '.*changed/train.parquet'"),
    ):
        with pytest.raises(InputError, match=message):
            VisionConfig(data=changed(**changes), model=model, batch=1).build()
    VisionConfig(data=changed(height=8, width=12), model="resnet9", batch=1).build()
    (tmp_path / "changed" / "train.parquet").unlink()
    (tmp_path / "changed" / "test.parquet").unlink()
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="data must hold images and labels as the hub's CIFAR-10 does"):
        VisionConfig(data=str(tmp_path)).build()


@pytest.mark.skipif(not SHARED.exists(), reason="CIFAR-10 is not here")
def test_cifar_is_read_whole() -> None:
    task = VisionConfig(data=str(SHARED)).build()
    found = task.describe()
    assert (found["images"], found["validation_images"], found["classes"]) == (50_000, 10_000, 10)
    # The usual means of CIFAR-10's channels, over 255.
    assert (task._mean / 255).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)
