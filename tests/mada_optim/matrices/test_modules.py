"""What the parameters of torch's modules are, and of bare parameters; which layer is the output."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

from mada_optim import OMADA, describe, orthogonalize
from mada_optim.matrices import Layout

ONE, STACK = Layout(), Layout(stacked=True)


def side_by_side(count: int) -> Layout:
    return Layout(parts=(1,) * count)


class With(nn.Module):
    """A module with bare parameters of these shapes, and others of its own."""

    def __init__(self, module: nn.Module | None = None, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        if module is not None:
            self.inner = module
        self.head = nn.Linear(8, 3)


class Experts(With):
    """The name of the class is what is known of it."""


class TopKRouter(With):
    """The name of the class is what is known of it."""


def matrices_of(model: nn.Module) -> dict[str, Layout]:
    return {parameter.name: parameter.layout for parameter in describe(model) if parameter.layout is not None}


def outputs_of(model: nn.Module) -> list[str]:
    return [parameter.name for parameter in describe(model) if parameter.what == "output layer"]


MODULES: dict[str, tuple[Callable[[], nn.Module], dict[str, Layout]]] = {
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"in_proj_weight": side_by_side(3), "out_proj.weight": ONE}),
    "attention to others": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, add_bias_kv=True),
        {"q_proj_weight": ONE, "k_proj_weight": ONE, "v_proj_weight": ONE, "out_proj.weight": ONE},
    ),
    "convolution, 1-D": (lambda: nn.Conv1d(4, 8, 3), {"weight": ONE}),
    "convolution, 2-D": (lambda: nn.Conv2d(4, 8, 3), {"weight": ONE}),
    "convolution, 3-D": (lambda: nn.Conv3d(4, 8, 3), {"weight": ONE}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3), {"weight": ONE}),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), {"weight": side_by_side(2)}),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), {"weight": side_by_side(4)}),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), {}),
    "depthwise, twice": (lambda: nn.Conv1d(8, 16, 9, groups=8), {}),
    "depthwise, transposed": (lambda: nn.ConvTranspose1d(8, 16, 9, groups=8), {}),
    "lstm": (
        lambda: nn.LSTM(8, 6, 2, bidirectional=True, proj_size=4),
        {
            f"weight_{name}_l{layer}{direction}": ONE if name == "hr" else side_by_side(4)
            for name in ("ih", "hh", "hr")
            for layer in (0, 1)
            for direction in ("", "_reverse")
        },
    ),
    "gru": (lambda: nn.GRU(8, 6), {"weight_ih_l0": side_by_side(3), "weight_hh_l0": side_by_side(3)}),
    "rnn": (lambda: nn.RNN(8, 6), {"weight_ih_l0": ONE, "weight_hh_l0": ONE}),
    "lstm cell": (lambda: nn.LSTMCell(8, 6), {"weight_ih": side_by_side(4), "weight_hh": side_by_side(4)}),
    "gru cell": (lambda: nn.GRUCell(8, 6), {"weight_ih": side_by_side(3), "weight_hh": side_by_side(3)}),
    "bilinear": (lambda: nn.Bilinear(4, 5, 6), {"weight": STACK}),
    "bag": (lambda: nn.EmbeddingBag(9, 8), {}),
    "embedding": (lambda: nn.Embedding(9, 8), {}),
    "norm": (lambda: nn.LayerNorm([4, 8, 8]), {}),
    "norm of a batch": (lambda: nn.BatchNorm2d(8), {}),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 6)),
        {"parametrizations.weight.original1": ONE},
    ),
    "weight norm of a grouped convolution": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 12, 3, groups=2), dim=1),
        {"parametrizations.weight.original1": side_by_side(2)},
    ),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 6)), {"weight_v": ONE}),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 6)),
        {"parametrizations.weight.original": ONE},
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), {}),
    "attention behind a parametrization": (
        lambda: registered(nn.MultiheadAttention(8, 2), "in_proj_weight"),
        {"parametrizations.in_proj_weight.original": side_by_side(3), "out_proj.weight": ONE},
    ),
    "embedding behind a parametrization": (lambda: registered(nn.Embedding(9, 8), "weight"), {}),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 6), "weight", 0.5), {"weight_orig": ONE}),
    "linear": (lambda: nn.Linear(8, 6), {"weight": ONE}),
    "single row": (lambda: nn.Linear(8, 1), {}),
    "single column": (lambda: nn.Linear(1, 8), {}),
    "thin": (lambda: nn.Linear(2, 514), {}),
    "just not too thin": (lambda: nn.Linear(2, 512), {"weight": ONE}),
    "too small": (lambda: nn.Linear(3, 5), {}),
    "just not too small": (lambda: nn.Linear(4, 4), {"weight": ONE}),
    "words": (lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 40, [10, 20], div_value=2.0), {}),
    "parameters in lists": (
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(8, 8)), "b": nn.Parameter(torch.ones(8))}),
        {"a": ONE},
    ),
}


def registered(module: nn.Module, name: str) -> nn.Module:
    return parametrize.register_parametrization(module, name, nn.Identity())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", MODULES)
def test_the_matrices_of_a_module(name: str):
    make, expected = MODULES[name]
    model = With(make())
    assert matrices_of(model) == {f"inner.{key}": layout for key, layout in expected.items()}
    tables = [each for each, param in model.inner.named_parameters("inner") if param.dim() > 1]
    assert outputs_of(model) == (tables if name == "words" else []) + ["head.weight"]


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "pos_embed": (16, 8),
        "position_embeddings": (1, 16, 8),
        "rel_pos_h": (15, 8),
        "relative_position_bias_table": (49, 4),
        "attention_biases": (4, 49),
        "cls_token": (1, 1, 8),
        "class_embedding": (4, 8),
        "latents": (16, 8),
        "latents_2d": (16, 8),
        "latent_query": (16, 8),
        "queries": (16, 8),
        "object_queries": (16, 8),
        "cluster_centers": (16, 8),
        "word_vectors": (16, 8),
        "user_factors": (16, 8),
        "prompt_pool": (16, 8),
        "A_log": (16, 8),
        "D": (8, 8),
        "dt_bias": (8, 8),
        "time_mix_key": (1, 1, 8),
        "attention_gate": (8, 8),
        "layer_scale": (8, 8),
        "experts_bias": (4, 16),
        "anything": (1, 16, 8),
        "scalars": (8, 1, 1),
        "number": (),
        "nothing": (0, 3),
    }.items(),
)
def test_bare_parameters_that_are_no_matrices(name: str, shape: tuple[int, ...]):
    assert matrices_of(With(**{name: shape})) == {}


def test_bare_parameters_that_are_matrices():
    shapes = {"weight": (8, 6), "W_query": (8, 8), "w_gate": (8, 6), "text_projection": (8, 6), "kernel": (8, 4, 3, 3)}
    assert matrices_of(With(**shapes)) == dict.fromkeys(shapes, ONE)
    assert matrices_of(With(w1=(4, 8, 6), gate_proj=(4, 6, 8))) == {"w1": STACK, "gate_proj": STACK}
    tables = With(tables=(8, 8))
    tables.tokens = nn.ParameterList([nn.Parameter(torch.ones(8, 8))])
    assert matrices_of(tables) == {"tables": ONE}


class VocabularyEmbedding(With):
    """The name of the class is what is known of it."""


class Scaled(nn.Conv1d):
    """A convolution with parameters of its own."""

    def __init__(self) -> None:
        super().__init__(4, 8, 3)
        self.number = nn.Parameter(torch.ones(()))
        self.mixer = nn.Parameter(torch.ones(8, 8))
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))


def test_classes_of_others():
    assert matrices_of(VocabularyEmbedding(weight=(8, 6))) == {}
    assert set(matrices_of(With(Scaled()))) == {f"inner.{name}" for name in ("weight", "mixer", "lora_A", "lora_B")}
    assert matrices_of(With(stack=(0, 4, 4))) == {}


class Attention(With):
    """As nanoGPT's, timm's and GQA of one's own."""

    num_heads, num_kv_heads, head_dim = 4, 2, 2


def test_fused_projections_of_others():
    cases: dict[tuple[str, int], Layout] = {
        ("c_attn", 24): side_by_side(3),
        ("qkv", 24): side_by_side(3),
        ("qkv", 16): Layout(parts=(2, 1, 1)),
        ("qkv", 17): ONE,
        ("gate_up_proj", 20): side_by_side(2),
        ("in_proj", 24): ONE,
        ("anything", 24): ONE,
    }
    for (name, rows), layout in cases.items():
        model = Attention()
        model.add_module(name, nn.Linear(8, rows))
        assert matrices_of(model) == {f"{name}.weight": layout}, (name, rows)


def test_what_is_too_small_may_be_said_to_be_matrices():
    """With the layout that it would have if it were larger."""
    model = With(nn.Conv2d(8, 8, 1, groups=4))
    assert matrices_of(model) == {}
    assert describe(model, matrices={"inner.weight": True})[0].layout == side_by_side(4)


def test_experts_in_either_order():
    assert matrices_of(Experts(gate_up_proj=(4, 20, 6), down_proj=(4, 6, 10))) == {
        "gate_up_proj": Layout(stacked=True, parts=(1, 1)),
        "down_proj": STACK,
    }
    assert matrices_of(Experts(gate_up_proj=(4, 6, 20), down_proj=(4, 10, 6), gate_up_proj_bias=(4, 20))) == {
        "gate_up_proj": Layout(stacked=True, dim=1, parts=(1, 1)),
        "down_proj": STACK,
    }
    assert matrices_of(TopKRouter(weight=(4, 8))) == {}


def first_momentum(grad: Tensor) -> Tensor:
    """What OMADA orthogonalizes at its first step. Another multiple of the gradient would be rounded in another way."""
    return grad.lerp(torch.zeros_like(grad).lerp(grad, 0.05), 0.95)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_of_experts_steps_as_each_alone(transposed: bool):
    """Also one whose gradients are a thousand times smaller."""
    torch.manual_seed(0)
    shape = (8, 64, 24) if transposed else (8, 24, 64)
    grads = torch.randn(shape) * torch.tensor([1e-3, *[1.0] * 7]).view(8, 1, 1)
    model = Experts(down_proj=shape)
    model.down_proj.grad = grads.clone()
    before = model.down_proj.detach().clone()
    OMADA(model, 1.0, weight_decay=0.0, scale=False).step()
    steps = before - model.down_proj.detach()
    for step, grad in zip(steps, grads, strict=True):
        (alone,) = orthogonalize([first_momentum(grad)])
        torch.testing.assert_close(step, alone, rtol=1e-4, atol=1e-5)
    sizes = steps.square().mean((1, 2)).sqrt()
    assert sizes.min() > 0.9 * sizes.max()
    values = torch.linalg.svdvals(steps[0]) / (0.2 * 8)
    assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("name", ["attention", "grouped", "lstm", "transposed, grouped"])
def test_a_module_steps_as_its_matrices_alone(name: str):
    torch.manual_seed(0)
    model = With(MODULES[name][0]())
    optimizer = OMADA(model, 1.0, weight_decay=0.0, scale=False)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    before = {each: param.detach().clone() for each, param in model.named_parameters()}
    optimizer.step()
    for each, layout in matrices_of(model).items():
        param = model.get_parameter(each)
        (grad,) = [param.grad]
        parts = first_momentum(grad).flatten(1).chunk(len(layout.parts))
        alone = torch.cat(orthogonalize([part.contiguous() for part in parts])).view_as(param)
        torch.testing.assert_close(before[each] - param.detach(), alone, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """Layers by name, in this order."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def mlp(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


class Timm(Net):
    """What timm's models say of themselves."""

    def get_classifier(self) -> Any:
        return self.top if hasattr(self, "top") else nn.Identity()


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "sequential": (lambda: mlp(8, 16, 16, 3), ["2.weight"]),
    "sequential of one width": (lambda: mlp(8, 8, 8, 8), ["2.weight"]),
    "autoencoder": (lambda: mlp(40, 16, 40), ["1.weight"]),
    "one layer": (lambda: nn.Linear(8, 3), ["weight"]),
    "head first": (lambda: Net(head=nn.Linear(16, 3), body=mlp(8, 16, 16)), ["head.weight"]),
    "head first, of another name": (lambda: Net(up=nn.Linear(16, 3), body=mlp(8, 16, 16)), ["up.weight"]),
    "head of two layers first": (lambda: Net(classifier=mlp(16, 16, 3), body=mlp(8, 16, 16)), ["classifier.1.weight"]),
    "two heads": (
        lambda: Net(body=mlp(8, 16, 16), policy=nn.Linear(16, 4), value=nn.Linear(16, 2)),
        ["policy.weight", "value.weight"],
    ),
    "actor and critic": (
        lambda: Net(actor=mlp(8, 16, 16, 4), critic=mlp(8, 16, 16, 1)),
        ["actor.2.weight", "critic.2.weight"],
    ),
    "DETR": (
        lambda: Net(body=mlp(8, 16, 16), class_embed=nn.Linear(16, 6), bbox_embed=Net(layers=mlp(16, 16, 4))),
        ["class_embed.weight", "bbox_embed.layers.1.weight"],
    ),
    "classes to be drawn": (
        lambda: Net(class_embed=nn.Linear(10, 16), body=mlp(16, 16, 16), last=nn.Linear(16, 3)),
        ["last.weight"],
    ),
    "hidden layer before the head": (
        lambda: Net(body=mlp(8, 16), pre_logits=nn.Linear(16, 16), head=nn.Linear(16, 5)),
        ["head.weight"],
    ),
    "hidden layer called fc": (
        lambda: Net(conv1=nn.Conv2d(1, 16, 3), fc=nn.Linear(784, 128), head=nn.Linear(128, 10)),
        ["head.weight"],
    ),
    "hidden layers called fc": (
        lambda: Net(lstm=nn.LSTM(8, 32), fc=mlp(32, 64, 64), out=nn.Linear(64, 5)),
        ["out.weight"],
    ),
    "last layer called fc, of a width that is read": (
        lambda: Net(rise=nn.Linear(16, 32), fc=nn.Linear(32, 16)),
        ["fc.weight"],
    ),
    "heads in a list": (
        lambda: Net(body=mlp(8, 16, 16), heads=nn.ModuleList([mlp(16, 16, 5), mlp(16, 16, 5)])),
        ["heads.0.1.weight", "heads.1.1.weight"],
    ),
    "convolutions": (
        lambda: Net(a=nn.Conv2d(1, 6, 5), b=nn.Conv2d(6, 16, 5), fc1=nn.Linear(400, 120), fc2=nn.Linear(120, 10)),
        ["fc2.weight"],
    ),
    "fully convolutional": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)), ["1.weight"]),
    "words": (
        lambda: Net(wte=nn.Embedding(50, 8), up=nn.Linear(8, 50, bias=False), h=nn.ModuleList([block(), block()])),
        ["up.weight"],
    ),
    "words, as many as the width": (
        lambda: Net(wte=nn.Embedding(8, 8), h=nn.ModuleList([block(), block()]), lm_head=nn.Linear(8, 8)),
        ["lm_head.weight"],
    ),
    "positions, as many as the width": (
        lambda: Net(wpe=nn.Embedding(32, 8), h=nn.ModuleList([block(), block()]), last=nn.Linear(8, 5)),
        ["last.weight"],
    ),
    "no head": (lambda: Net(norm=nn.LayerNorm(8), h=nn.ModuleList([block(), block()])), []),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), []),
    "attention": (lambda: nn.MultiheadAttention(8, 2), []),
    "recurrent": (lambda: Net(embed=nn.Embedding(50, 8), lstm=nn.LSTM(8, 8)), []),
    "recurrent, after a layer": (lambda: Net(rise=nn.Linear(5, 8), lstm=nn.LSTM(8, 8)), []),
    "recurrent, head first": (lambda: Net(words=nn.Linear(8, 5), lstm=nn.LSTM(4, 8)), ["words.weight"]),
    "attention, after a layer": (lambda: Net(rise=nn.Linear(5, 8), block=nn.TransformerEncoderLayer(8, 2, 16)), []),
    "norm, then a head": (lambda: Net(rise=nn.Linear(5, 8), norm=nn.LayerNorm(8), up=nn.Linear(8, 3)), ["up.weight"]),
    "says so": (lambda: Timm(top=nn.Linear(8, 5), body=block()), ["top.weight"]),
    "says that there is none": (lambda: Timm(body=block()), []),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", OUTPUTS)
def test_output_layers(name: str):
    make, expected = OUTPUTS[name]
    assert outputs_of(make()) == expected


def test_a_weight_that_an_embedding_shares_is_an_embedding():
    model: Any = Net(lm_head=nn.Linear(8, 50, bias=False), body=block(), wte=nn.Embedding(50, 8))
    model.wte.weight = model.lm_head.weight
    described = {parameter.name: parameter for parameter in describe(model)}
    assert described["lm_head.weight"].what == "embedding"
    assert described["lm_head.weight"].why.endswith("also the output layer")
    assert set(matrices_of(model)) == {"body.0.weight", "body.2.weight"}


def test_a_module_that_stands_in_several_places_is_one():
    shared = nn.Linear(8, 8)
    model = Net(a=shared, b=shared, head=nn.Linear(8, 3))
    assert [parameter.name for parameter in describe(model)] == [name for name, _ in model.named_parameters()]
    assert matrices_of(model) == {"a.weight": ONE}


def test_parameters_that_cannot_be_orthogonalized():
    model = Net(body=mlp(8, 8, 8), head=nn.Linear(8, 3))
    model.codes = nn.Parameter(torch.ones(8, 8, dtype=torch.uint8), requires_grad=False)
    model.waves = nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))
    assert {parameter.what for parameter in describe(model)[-2:] + describe(model)[:2]} >= {"complex", "integers"}
    assert set(matrices_of(model)) == {"body.0.weight", "body.1.weight"}


def test_a_shape_that_is_not_known_yet():
    with pytest.raises(ValueError, match=r"parameter '0.weight' has no shape yet; run a forward pass"):
        OMADA(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)))


def test_orders_of_rows_are_those_of_the_module():
    """Of Linear(8, 3 × 8) called qkv, q is the first 8 rows; torch's own attention is the reference."""
    attention = nn.MultiheadAttention(8, 2)
    parts = describe(With(attention))[0].layout.cut(attention.in_proj_weight)  # type: ignore[union-attr]
    expected: tuple[Tensor, ...] = attention.in_proj_weight.chunk(3)
    assert all(torch.equal(part[0], other) for part, other in zip(parts, expected, strict=True))


@pytest.mark.parametrize(
    ("child", "value"),
    [
        ("gate", nn.Linear(8, 6)),
        ("router", nn.Linear(8, 6)),
        ("gating_network", nn.Linear(8, 6)),
        ("router", nn.Parameter(torch.ones(6, 8))),
        ("w_gate", nn.Parameter(torch.ones(8, 6))),
    ],
)
def test_routers_of_experts_that_are_counted(child: str, value: Any):
    def model(experts: nn.Module, value: Any) -> nn.Module:
        mixture = With()
        mixture.experts = experts
        setattr(mixture, child, value)
        return mixture

    stack = With(w1=(6, 8, 4))
    del stack.head
    for experts in (nn.ModuleList(nn.Linear(8, 8) for _ in range(6)), stack):
        routers = [each.name for each in describe(model(experts, value)) if each.what == "router"]
        assert routers == [child if isinstance(value, nn.Parameter) else f"{child}.weight"]
    assert "router" not in {each.what for each in describe(model(nn.ModuleList([nn.Linear(8, 8)]), value))}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is (deprecated|not supported):DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch.export's own code
def test_modules_without_a_class_are_no_matrices():
    root, graph = nn.Module(), fx.Graph()
    root.fc = nn.Module()
    root.fc.weight = nn.Parameter(torch.ones(8, 8))
    graph.output(graph.get_attr("fc.weight"))
    plain = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    exported = torch.export.unflatten(torch.export.export(plain, (torch.zeros(2, dtype=torch.int64),)))
    for model in (fx.GraphModule(root, graph), exported, torch.jit.script(plain)):
        with pytest.warns(UserWarning, match="scripted or exported do not say what they are"):
            assert matrices_of(model) == {}
    assert OMADA(model, matrices={"0.weight": False, "1.weight": True}).param_groups[0]["matrices"]
