"""Classification of small images: CIFAR-10 in the hub's parquet files, or scikit-learn's digits, which need no file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mada_lab.errors import InputError, require
from mada_lab.tasks.base import Batch, TaskConfig
from mada_lab.tasks.vision_models import MODELS

Images = npt.NDArray[np.uint8]  # (N, channels, height, width)
Labels = npt.NDArray[np.int64]

PADDING = 4  # of the crops that augment CIFAR's images, as is usual for it
VALIDATION_BATCH = 500


@dataclass(frozen=True)
class VisionConfig(TaskConfig):
    """Images, model and batch.

    Args:
        data: folder with ``train*.parquet`` and ``test*.parquet`` (at any depth) whose columns ``img`` or ``image`` and
            ``label`` are those of the hub's CIFAR-10; None: the 1,797 digits of scikit-learn, a fifth of them to
            validate on.
        model: "cnn", four convolutions and a linear layer; "resnet9"; or "vit", a vision transformer of four layers.
        width: channels of the first convolution; the last has four times as many ("cnn") or eight times ("resnet9").
            Of "vit", a quarter of the width of its layers.
        batch: images in a batch.
        augment: shift by up to 4 pixels and mirror; None: where ``data`` is given.
    """

    kind: ClassVar[str] = "vision"
    model: str = "cnn"
    width: int = 32
    batch: int = 128
    augment: bool | None = None

    def __post_init__(self) -> None:
        require(self.model in MODELS, "model", self.model, f"one of {', '.join(MODELS)}")
        self._require_positive("width", "batch")

    def build(self) -> VisionTask:
        return VisionTask(self)


class VisionTask:
    """Say which class an image is of. Each epoch sees every image once, in an order of its own."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config
        train, test = digits() if config.data is None else read_parquet(config.data)
        (self._images, self._labels), (self._val_images, self._val_labels) = train, test
        require(len(self._images) >= config.batch, "batch", config.batch, f"at most {len(self._images)}, all images")
        self.classes = int(self._labels.max()) + 1
        for name, labels in (("train", self._labels), ("test", self._val_labels)):
            known = labels.min() >= 0 and labels.max() < self.classes
            require(known, f"data, labels of {name},", f"{labels.min()} to {labels.max()}", "classes of train, from 0")
        height, width = self._images.shape[2:]
        model = MODELS[config.model]
        allowed = f"{model.takes} for the model {config.model}"
        require(model.fits(height, width), "data", f"images of {height} by {width}", allowed)
        self._mean = self._images.mean(axis=(0, 2, 3), dtype=np.float64)
        self._std = self._images.std(axis=(0, 2, 3), dtype=np.float64)

    def model(self, seed: int) -> nn.Module:
        channels, size = self._images.shape[1], self._images.shape[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MODELS[self.config.model].make(channels, size, self.config.width, self.classes)

    def batch(self, seed: int, step: int) -> Batch:
        """Images, float32 of shape (batch, channels, height, width), and labels. The rest of an epoch is dropped."""
        size = self.config.batch
        epoch, index = divmod(step - 1, len(self._images) // size)
        order = np.random.default_rng((seed, epoch)).permutation(len(self._images))
        chosen = order[index * size : (index + 1) * size]
        images = self._images[chosen]
        augment = self.config.data is not None if self.config.augment is None else self.config.augment
        if augment:
            images = shift_and_mirror(images, np.random.default_rng((seed, 1, step)))
        return self._normalized(images), torch.from_numpy(self._labels[chosen])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy in nats."""
        logits, labels = self.logits(model, batch)
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        loss, right, count = 0.0, 0, len(self._val_images)
        for batch in self.validation_batches():
            logits, labels = self.logits(model, batch)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
        return {"loss": loss / count, "accuracy": right / count}

    def validation_batches(self) -> Iterator[Batch]:
        """Yield all images to validate on, and their labels, on the CPU."""
        for start in range(0, len(self._val_images), VALIDATION_BATCH):
            chosen = slice(start, start + VALIDATION_BATCH)
            yield self._normalized(self._val_images[chosen]), torch.from_numpy(self._val_labels[chosen])

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part in (self._images, self._labels, self._val_images, self._val_labels):
            digest.update(np.ascontiguousarray(part).data)
        data = self.config.data
        return {
            "task": "vision",
            "source": "scikit-learn's digits" if data is None else Path(data).name,
            "sha256": digest.hexdigest(),
            "images": len(self._images),
            "validation_images": len(self._val_images),
            "classes": self.classes,
        }

    @staticmethod
    def logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the model's logits in float32 or float64, shape (batch, classes), and the labels beside them."""
        example = next(model.parameters())
        logits: Tensor = model(batch[0].to(example.device, example.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1].to(example.device)

    def _normalized(self, images: Images) -> Tensor:
        centered = (images - self._mean[:, None, None]) / self._std[:, None, None]
        return torch.from_numpy(centered.astype(np.float32))


def shift_and_mirror(images: Images, random: np.random.Generator) -> Images:
    """Each image moved by up to ``PADDING`` pixels in both directions, black coming in, and mirrored or not."""
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (PADDING, PADDING), (PADDING, PADDING)))
    rows, columns = random.integers(0, 2 * PADDING + 1, size=(2, count))
    mirrored = random.random((count,)) < 0.5
    augmented = np.empty_like(images)
    for i, image in enumerate(padded):
        piece = image[:, rows[i] : rows[i] + height, columns[i] : columns[i] + width]
        augmented[i] = piece[:, :, ::-1] if mirrored[i] else piece
    return augmented


# Data.


def digits() -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """scikit-learn's digits, 8 by 8, in 17 grey values; the same fifth of each class to validate on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.reshape(-1, 1, 8, 8).astype(np.uint8), labels, test_size=0.2, random_state=0, stratify=labels
    )
    train, test, train_labels, test_labels = parts
    return (train, train_labels.astype(np.int64)), (test, test_labels.astype(np.int64))


def read_parquet(folder: str) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Images and labels of the files ``train*.parquet`` and of ``test*.parquet`` in a folder, at any depth."""
    parts = []
    for split in ("train", "test"):
        files = sorted(str(path) for path in Path(folder).rglob(f"{split}*.parquet"))
        require(bool(files), "data", folder, f"a folder with {split}*.parquet")
        parts.append(_read(tuple((file, Path(file).stat().st_mtime_ns) for file in files)))
    require(parts[0][0].shape[1:] == parts[1][0].shape[1:], "data", folder, "a folder with images of one size")
    return parts[0], parts[1]


# The runs of a sweep come one after another in the same process, and decoding takes seconds.
@lru_cache(maxsize=2)
def _read(stamped: tuple[tuple[str, int], ...]) -> tuple[Images, Labels]:
    """Read files, given with the time of their last change."""
    from PIL import Image
    from pyarrow import ArrowInvalid, parquet

    files = [file for file, _ in stamped]
    try:
        tables = [parquet.read_table(file) for file in files]
        column = next((name for name in ("img", "image") if name in tables[0].column_names), "img")
        rows = [row for table in tables for row in table[column].to_pylist()]
        labels = [label for table in tables for label in table["label"].to_pylist()]
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in rows]
        return np.stack(images).transpose(0, 3, 1, 2).copy(), np.asarray(labels, np.int64)
    except (ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"data must hold images and labels as the hub's CIFAR-10 does, got {files[0]!r}: {error}"
        ) from None
