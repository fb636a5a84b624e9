"""What users say and read: patterns of names, groups, wrapped models, and the printed table."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Deep, loss_of, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mada_optim
from mada_optim import OMADA, describe, matrix_groups, matrix_parameters
from mada_optim.matrices import Layout

PATTERNS: Any = {
    "matrices": {"hidden.*.weight": False, "hidden.2.weight": True, "embedding.*": True},
    "split": {"hidden.3.*ght": 3, "out.weight": (2, 1), "hidden.0.*t": {"dim": 1, "parts": (3, 1)}},
}
# hidden.0.weight and hidden.3.weight: matrices says that they are none, and is last.
SAID = {
    "embedding.weight": Layout(),
    "convolution.weight": Layout(),
    "hidden.2.weight": Layout(),
    "out.weight": Layout(parts=(2, 1)),
}


def matrices_of(model: nn.Module, **said: Any) -> dict[str, Layout]:
    return {parameter.name: parameter.layout for parameter in describe(model, **said) if parameter.layout is not None}


def test_patterns_are_the_last_word():
    model = Deep()
    assert matrices_of(model, **PATTERNS) == SAID
    assert matrix_parameters(model, **PATTERNS) == [model.get_parameter(name) for name in SAID]
    groups = matrix_groups(model, **PATTERNS)
    assert [group["matrices"] for group in groups] == [True, True, False]
    assert groups[1]["split"] == {"stacked": False, "dim": 0, "parts": (2, 1), "repeats": 1}
    optimizer = OMADA(model, **PATTERNS)
    named = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, group in named.items() if group["matrices"]} == set(SAID)
    assert all(Layout.read(named[name]["split"]) == layout for name, layout in SAID.items())
    train(model, optimizer, 3)


def test_heads_are_matrices_of_their_own():
    """By a split, which patterns and groups take alike."""
    weights = []
    for way in ("pattern", "group", "by hand"):
        model = Deep()
        if way == "pattern":
            optimizer = OMADA(model, split={"hidden.[01].weight": 4}, scale=False)
        else:
            heads = [model.hidden[0].weight, model.hidden[1].weight]
            others = [param for param in model.parameters() if all(param is not head for head in heads)]
            plain = [param for param in matrix_parameters(model) if all(param is not head for head in heads)]
            rest = [param for param in others if all(param is not one for one in plain)]
            groups = [{"params": plain, "matrices": True}, {"params": heads, "split": [1] * 4}, {"params": rest}]
            if way == "by hand":
                groups[1] |= {"split": {"parts": (1, 1, 1, 1)}, "matrices": True}
            optimizer = OMADA(groups, scale=False)
        train(model, optimizer, 4)
        weights.append(list(model.parameters()))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=0)
    joint = Deep()
    train(joint, OMADA(joint, scale=False), 4)
    assert not torch.allclose(joint.hidden[0].weight, model.hidden[0].weight)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"matrices": {"*.nothing": True}}, r"matrices: no parameter's name matches '\*.nothing'"),
        ({"split": {"nothing": 3}}, "split: no parameter's name matches 'nothing'"),
        ({"matrices": {"*": "yes"}}, "matrices: values must be True or False, got 'yes' for"),
        ({"matrices": {"out.bias": True}}, "matrices: 'out.bias' is torch.float32 of shape"),
        ({"split": {"out.bias": 2}}, "split: 'out.bias' is torch.float32 of shape"),
        ({"split": {"out.weight": 2}}, r"rows of shape \(3, 6\) are 3, which 2 parts.* \(out.weight\)"),
        ({"split": {"out.weight": "2"}}, "split must be None, a number of matrices"),
    ],
)
def test_what_makes_no_sense(said: Any, message: str):
    for use in (describe, matrix_groups, matrix_parameters, OMADA):
        with pytest.raises(ValueError, match=message):
            use(Deep(), **said)


def test_patterns_need_a_model():
    with pytest.raises(ValueError, match="patterns of names in a model, so params must be the model"):
        OMADA(Deep().parameters(), split={"*": 2})


def test_layers_that_are_unfrozen_keep_their_layouts():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 3)})
    model["attention"].requires_grad_(False)
    optimizer = copy.deepcopy(pickle.loads(pickle.dumps((model, OMADA(model)))))
    model, optimizer = optimizer
    model["attention"].requires_grad_(True)
    optimizer.add_param_group({"params": model["attention"].parameters(), "lr": 1e-3})
    added = [(group["matrices"], group["split"] is not None, group["lr"]) for group in optimizer.param_groups[2:]]
    assert added == [(False, False, 1e-3), (True, True, 1e-3), (True, False, 1e-3)]
    resumed = OMADA(OMADA(model).param_groups)
    assert [group["split"] for group in resumed.param_groups] == [group["split"] for group in OMADA(model).param_groups]


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["compile", "ddp", "fsdp2", "checkpointed", "data parallel", "meta"])
def test_wrapped_models(way: str, process_group: None):
    """Are what they wrap; patterns may name parameters with or without the wrapper."""
    model: Any = Deep()
    wrapped = {
        "compile": torch.compile,
        "ddp": DistributedDataParallel,
        "fsdp2": lambda module: fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,))),
        "checkpointed": checkpoint_wrapper,
        "data parallel": nn.DataParallel,
        "meta": lambda module: module.to("meta"),
    }[way](model)
    described = describe(wrapped, **PATTERNS)
    assert [parameter.name for parameter in described] == [name for name, _ in wrapped.named_parameters()]
    plain = describe(Deep(), **PATTERNS)
    for ours, theirs in zip(described, plain, strict=True):
        assert (ours.shape, ours.what, ours.why, ours.layout) == (theirs.shape, theirs.what, theirs.why, theirs.layout)
    first = described[0].name
    assert not describe(wrapped, matrices={first: False})[0].is_matrix
    if way in ("ddp", "fsdp2"):
        optimizer = OMADA(wrapped, **PATTERNS)
        loss_of(wrapped, 0).backward()
        optimizer.step()


def test_the_table_folds_layers():
    model = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(3)])
    model.append(nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 8, bias=False)]))
    model[1][0].weight.requires_grad_(False)
    described = describe(model)
    names = [line[0] for line in described.lines()]
    assert names == [
        "{0,2}.{0..1}.weight ×4",
        "{0..2}.{0..1}.bias ×6",
        "1.0.weight",
        "{1,3}.1.weight ×2",
        "3.0.weight",
        "3.0.bias",
    ]
    assert len(described) == len(list(described)) == 15
    assert described[0].name == "0.0.weight"


def test_the_table_in_a_notebook():
    text = describe(nn.ModuleDict({"<b>": nn.Linear(8, 8), "head": nn.Linear(8, 3)}))._repr_html_()
    assert "<td>&lt;b&gt;.weight</td><td>8 × 8</td><td>matrix</td><td>8×8</td>" in text
    assert text.count("<tr>") == 5


def test_it_prints():
    described = describe(Deep())
    assert repr(described) == str(described)
    assert str(described).splitlines()[-1] == "360 of 495 numbers are in matrices (73 %)."
    assert "describe" in mada_optim.__all__
    assert re.search(r"hidden.\{0..1\}.weight ×2 +8 × 8 +matrix +8×8 +maps activations", str(described))
