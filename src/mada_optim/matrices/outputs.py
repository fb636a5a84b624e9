"""The output layers of a model: what the model says, what its shapes say, what its names say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mada_optim.matrices.fused import fused, has_class, projection_of
from mada_optim.matrices.uses import Use, Walk, config_of

Path = tuple[str, ...]

# DETR's, which its decoder holds, too.
_DETECTORS = re.compile(r"(class|bbox)_embed|enc_(score|bbox)_head")
_HEADS = re.compile(
    r"(?!pre_)(.*_)?(heads?|classifiers?|logits|score|unembed|unembedding|readout|predictor)"
    r"|fc|out|output|qa_outputs|predict_\w+|" + _DETECTORS.pattern
)
# In models of transformers. There a "head" may also be a pooler or a projection.
_WORD_HEADS = re.compile(r"lm_heads?|codebooks_head|qa_outputs|predict_\w+|" + _DETECTORS.pattern)
# Names that a hidden layer may have as well.
_VAGUE = ("fc", "out", "output")
# Names of modules whose children are output layers, each for itself.
_SEVERAL = re.compile(r"(.*_)?(heads|classifiers|embed)")
_PREDICTORS = re.compile(r"(?!pre_)(.*_)?(classifier|predictor)|feat_out|" + _WORD_HEADS.pattern)
# Modules of torch whose weights are never an output layer.
_BODIES = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
)
_POSITIONS = re.compile(r"wpe|.*pos.*|.*type.*")


def output_layers(walk: Walk) -> dict[Path, str]:
    """The paths of layers that are a model's output, each with the reason.

    The first that holds, for each part of the model that is one of transformers or timm, and for what is around these:

    1. The module says so: ``get_output_embeddings()``, ``get_classifier()``.
    2. A model of transformers has layers around its base model. Those with a row for each label or word are output
       layers. Where none has, the last one behind the base model is.
    3. A layer has a row for each entry of an embedding, and no layer reads as many columns; or its name, or that of a
       module around it, is head, classifier, score, ...
    4. The last layer, and those beside it that read the same, where no layer reads as many columns as these have rows.
       Beside the last layer of one stack are the last layers of others: an actor and a critic.
    5. Another layer of which this is true, such as a head that stands first.
    6. The last layer. Not where it is one of many blocks of the same form, or a recurrent layer or an attention comes
       later: such a model has no output layer.
    """
    layers = _layers(walk)
    outputs: dict[Path, str] = {}
    described: list[Path] = []
    modules: dict[Any, Path] = dict(walk.paths)
    for module, path in modules.items():
        for method in ("get_output_embeddings", "get_classifier"):
            if hasattr(type(module), method):
                for head in _returned(module, method):
                    _add(outputs, layers, _path_of(walk, head), f"{method}()")
        if hasattr(type(module), "get_classifier"):
            described.append(path)
    for module, path in modules.items():
        if hasattr(type(module), "base_model_prefix") and not _below(path, described):
            described.append(path)
            _heads_of_pretrained(outputs, layers, walk, module, path)
    others = {path: use for path, use in layers.items() if not _below(path, described)}
    outputs.update(_plain_heads(walk, others))
    return outputs


def _returned(module: Any, method: str) -> Sequence[Any]:
    """The heads that a module says it has."""
    try:
        heads = getattr(module, method)()
    except (NotImplementedError, AttributeError):
        return ()
    return tuple(heads) if isinstance(heads, (tuple, list, nn.ModuleList)) else (heads,)


def _layers(walk: Walk) -> dict[Path, Use]:
    """Layers that may be an output: linear maps and convolutions that are no part of a larger module of torch.

    They come in the order of their modules: an output layer that is tied to an embedding is not where that is.
    """
    layers: dict[Path, Use] = {}
    places = {module: index for index, module in enumerate(walk.paths)}
    for use in sorted(walk.all(), key=lambda use: places[use.module]):
        if (
            use.attribute == "weight"
            and use.param.dim() >= 2
            and not is_table(use)
            and not is_norm(use.module)
            and not any(name.startswith("lora_") for name in use.path)
            and not _is_body(use)
        ):
            layers.setdefault(use.path, use)
    return layers


def _heads_of_pretrained(
    outputs: dict[Path, str], layers: dict[Path, Use], walk: Walk, module: Any, path: Path
) -> None:
    """Add the output layers of a model of transformers, which lie around its base model."""
    base = _path_of(walk, module.base_model)
    config = config_of((module,))
    labels, words = getattr(config, "num_labels", None), getattr(config, "vocab_size", None)
    has_base = base is not None and base != path
    around = {
        layer: use
        for layer, use in layers.items()
        if _below(layer, [path])
        and (
            (has_base and not _below(layer, [base or ()]))
            or _is_head(layer[len(path) :], _DETECTORS if has_base else _HEADS)
        )
    }
    known = {layer for layer in outputs if _below(layer, [path])}
    named = set(_named_heads(around, _PREDICTORS if has_base else _WORD_HEADS))
    for layer, use in around.items():
        if layer in known:
            continue
        if labels is not None and _rows(use) in (labels, labels + 1):  # one more: no object
            outputs[layer] = f"one row for each of {labels} labels"
        elif layer in named and not _leads_to(layer, known):
            outputs[layer] = "its name"
        elif not known and _rows(use) == words:
            outputs[layer] = f"one row for each of {words} words"
    if any(_below(layer, [path]) for layer in outputs):
        return
    if not has_base and re.search("For[A-Z]", type(module).__name__):  # a task: its heads are outputs
        outputs.update(dict.fromkeys(_named_heads(around), "its name"))
    if has_base:
        behind = list(itertools.takewhile(lambda layer: not _below(layer, [base or ()]), reversed(layers)))
        repeated = _repeated(around)
        last = next((layer for layer in behind if layer in around and layer not in repeated), None)
        if last is not None:
            outputs[last] = "the last layer around the base model"


def _leads_to(layer: Path, known: Iterable[Path]) -> bool:
    """Whether a layer of an ``lm_head`` is the one before an output layer that the model returned."""
    around = layer[: layer.index("lm_head")] if "lm_head" in layer else layer
    return any(_below(output, [around]) for output in known)


def _plain_heads(walk: Walk, layers: dict[Path, Use]) -> dict[Path, str]:
    """The output layers among layers of which no module says anything."""
    if not layers:
        return {}
    read = {_columns(use) for use in layers.values()} | _widths_of_bodies(walk)
    repeated = _repeated(layers)
    single = {path: use for path, use in layers.items() if path not in repeated}
    words = {
        use.param.size(0)
        for use in walk.all()
        if is_table(use) and use.param.dim() == 2 and not _POSITIONS.fullmatch(use.role)
    } - read
    by_rows = {path: f"one row for each of {_rows(use)} entries" for path, use in single.items() if _rows(use) in words}
    last = list(layers)[-1]
    by_name = {
        path: "its name"
        for path in _named_heads(single)
        # Else it embeds classes or boxes, or is a hidden layer, whatever it is called.
        if _rows(single[path]) not in read or not (_is_head(path, _DETECTORS) or (path[0] in _VAGUE and path != last))
    }
    return by_rows | by_name or _by_place(layers, single, read, _ends_in_a_body(walk))


def _named_heads(single: dict[Path, Use], names: re.Pattern[str] = _HEADS) -> list[Path]:
    """Layers that are called heads, and the last layers of modules that are."""
    last: dict[Path, Path] = {}
    for path in single:
        for depth, name in enumerate(path, 1):
            if names.fullmatch(name) and (depth == 1 or name not in _VAGUE):
                numbered = depth < len(path) - 1 and path[depth].isdecimal()  # heads.0.fc1, heads.1.fc1
                last[path[: depth + 1] if numbered or _SEVERAL.fullmatch(name) else path[:depth]] = path
                break
    return list(last.values())


def _by_place(
    layers: dict[Path, Use], single: dict[Path, Use], read: set[int], ends_in_a_body: bool
) -> dict[Path, str]:
    """The output layers by their places and the widths that layers read."""
    unread = [path for path, use in single.items() if _is_linear(use) and _rows(use) not in read]
    last = list(layers)[-1]
    if last in unread:
        ends = {path[:-1]: path for path in layers}.values()
        beside = [
            path
            for path in unread
            if (path[:-1] == last[:-1] or (path in ends and len(path) == len(last) and path[:-2] == last[:-2]))
            and _columns(single[path]) == _columns(single[last])
        ]
        return dict.fromkeys(beside, "a last layer, whose width no layer reads")
    if unread and (ends_in_a_body or _is_linear(layers[last])):
        return dict.fromkeys(unread[:1], "no layer reads its width")
    return {last: "the last layer"} if last in single and not ends_in_a_body else {}


def _widths_of_bodies(walk: Walk) -> set[int]:
    """How many numbers recurrent layers, attentions and norms take."""
    names = ("input_size", "hidden_size", "embed_dim", "kdim", "vdim", "in_features")
    widths = {getattr(use.module, name, None) for use in walk.all() for name in names if _is_body(use)}
    return {width for width in widths if isinstance(width, int)} | {
        use.param.numel() for use in walk.all() if is_norm(use.module)
    }


def _ends_in_a_body(walk: Walk) -> bool:
    """Whether the last weights of the model are those of a recurrent layer or an attention."""
    weights = [use for use in walk.all() if use.param.dim() >= 2 and not is_table(use)]
    return bool(weights) and _is_body(weights[-1])


def _is_body(use: Use) -> bool:
    return any(isinstance(module, _BODIES) for module in (*use.parents, use.module))


def _is_linear(use: Use) -> bool:
    """Whether a layer is a linear map of vectors, and not one of several in one weight."""
    return use.param.dim() == 2 and fused(projection_of(use, _rows(use), _columns(use)), 0) is None


def _repeated(layers: dict[Path, Use]) -> set[Path]:
    """Layers that are parts of blocks that the model has more than once."""
    paths_by_key: dict[tuple[Any, ...], list[Path]] = {}
    for path, use in layers.items():
        for position, name in enumerate(path[:-1]):
            if name.isdecimal() and not _is_head(path[:position]):
                key = (path[:position], path[position + 1 :], use.param.shape)
                paths_by_key.setdefault(key, []).append(path)
    return {path for paths in paths_by_key.values() if len(paths) > 1 for path in paths}


def _is_head(path: Path, names: re.Pattern[str] = _HEADS) -> bool:
    return any(names.fullmatch(name) for name in path)


def _rows(use: Use) -> int:
    """How many numbers a layer returns at each place."""
    if isinstance(use.module, nn.modules.conv._ConvTransposeNd):
        return use.module.out_channels
    return use.param.size(1 if is_conv1d(use.module) else 0)


def _columns(use: Use) -> int:
    """How many numbers a layer takes at each place."""
    if isinstance(use.module, nn.modules.conv._ConvNd):
        return use.module.in_channels
    return use.param.size(0 if is_conv1d(use.module) else 1)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear map in transformers, whose weight is (inputs, outputs)."""
    return has_class(module, "^Conv1D$") and not isinstance(module, nn.modules.conv._ConvNd)


def is_table(use: Use) -> bool:
    """Whether a parameter belongs to an embedding: one of torch, or a module that is called so and has a weight."""
    if isinstance(use.module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    is_map = isinstance(use.module, (nn.Linear, nn.modules.conv._ConvNd))
    return use.attribute == "weight" and not is_map and has_class(use.module, r"Embeddings?$")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization, by the name of its class."""
    return has_class(module, "Norm") and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _add(outputs: dict[Path, str], layers: dict[Path, Use], head: Path | None, why: str) -> None:
    """Add a layer, or the last layer of a module, to the output layers."""
    inside = [path for path in layers if head is not None and _below(path, [head])]
    if inside:
        outputs.setdefault(inside[-1], why)


def _path_of(walk: Walk, module: Any) -> Path | None:
    return walk.paths.get(module) if isinstance(module, nn.Module) else None


def _below(path: Sequence[str], tops: Iterable[Sequence[str]]) -> bool:
    return any(tuple(path[: len(top)]) == tuple(top) for top in tops)
