"""Networks for small images, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

PATCHES = 8  # to a side, of the vision transformer


def cnn(channels: int, size: int, width: int, classes: int) -> nn.Module:
    """Four convolutions, the size halved after each second one, and a linear layer."""
    layers: list[nn.Module] = []
    for out, halve in ((width, False), (width, True), (2 * width, False), (4 * width, True)):
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        if halve:
            layers.append(nn.MaxPool2d(2))
            size //= 2
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes))


def resnet9(channels: int, size: int, width: int, classes: int) -> nn.Module:  # noqa: ARG001 (any from 8 will do)
    """The nine-layer residual network of the CIFAR-10 speed records (D. Page, "How to train your ResNet", 2018)."""

    def convolution(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    def halved(a: int, b: int) -> list[nn.Module]:
        return [*convolution(a, b), nn.MaxPool2d(2)]

    def residual(a: int) -> nn.Module:
        return _Residual(nn.Sequential(*convolution(a, a), *convolution(a, a)))

    return nn.Sequential(
        *convolution(channels, width),
        *halved(width, 2 * width),
        residual(2 * width),
        *halved(2 * width, 4 * width),
        *halved(4 * width, 8 * width),
        residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def vit(channels: int, size: int, width: int, classes: int) -> nn.Module:
    """A vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021), 8 patches to a side.

    Four layers of ``4 * width``, four heads, and twice the width inside its MLPs, which is small for its kind.
    """
    # Slow to import, and not needed by the others.
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(  # type: ignore[call-arg]  # num_labels is one of those that all configurations take
        hidden_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=8 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=size,
        patch_size=size // PATCHES,
        num_channels=channels,
        num_labels=classes,
    )
    return _Logits(ViTForImageClassification(config))


class _Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Model:
    """A network and the images that it takes.

    Args:
        make: the network for images of ``channels`` and ``size``, with ``width`` and ``classes``.
        fits: whether it takes images of this height and width.
        takes: the same in words, for a message.
    """

    make: Callable[[int, int, int, int], nn.Module]
    fits: Callable[[int, int], bool]
    takes: str


MODELS = {
    "cnn": Model(cnn, lambda height, width: height == width >= 4, "square images of 4 pixels or more"),
    "resnet9": Model(resnet9, lambda height, width: min(height, width) >= 8, "images of 8 pixels or more"),
    "vit": Model(
        vit,
        lambda height, width: height == width and height % PATCHES == 0,
        f"square images of {PATCHES} patches a side",
    ),
}
