"""What the parameters of transformers' and peft's models are, written down by hand from how each computes.

Every matrix is listed, by its exact name and how the matrices lie in it; every parameter that is not listed is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from mada_optim import OMADA, describe
from mada_optim.matrices import Layout

ROOT = Path(__file__).parents[3]

ONE = Layout()
PAIR, QKV = Layout(parts=(1, 1)), Layout(parts=(1, 1, 1))
QKV_IN_COLUMNS = Layout(dim=1, parts=(1, 1, 1))
EXPERTS, GATED_EXPERTS = Layout(stacked=True), Layout(stacked=True, parts=(1, 1))


@dataclass
class Case:
    """A model, its matrices by name, and its output layers. "{}" in a name stands for layers 0 and 1."""

    make: Callable[[], nn.Module]
    matrices: dict[str, Layout]
    outputs: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()


def plain(prefix: str, *names: str) -> dict[str, Layout]:
    """Weights below a prefix that are one matrix each."""
    return dict.fromkeys((f"{prefix}{name}.weight" for name in names), ONE)


def names_of(pattern: str) -> list[str]:
    return [pattern.format(*numbers) for numbers in product((0, 1), repeat=pattern.count("{}"))]


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**SMALL, "vocab_size": 50}
GROUPED = {**WORDS, "num_key_value_heads": 2}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 4}
BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
BERT_LAYER = plain("bert.encoder.layer.{}.", *BERT, "intermediate.dense", "output.dense")
SELF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CLIP_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
WHISPER = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
GPT2 = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=20)
GPT2_LAYERS = {"h.{}.attn.c_attn.weight": QKV_IN_COLUMNS, **plain("h.{}.", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def below(prefix: str, layers: dict[str, Layout]) -> dict[str, Layout]:
    return {prefix + name: layout for name, layout in layers.items()}


CASES: dict[str, Case] = {
    "gpt2": Case(
        lambda: hf.GPT2LMHeadModel(GPT2),
        below("transformer.", GPT2_LAYERS),
        embeddings=("transformer.wte.weight", "transformer.wpe.weight"),
    ),
    "gpt2, positions as many as widths": Case(
        lambda: hf.GPT2Model(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32)), GPT2_LAYERS
    ),
    "gpt2 that looks at another": Case(
        lambda: hf.GPT2Model(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, add_cross_attention=True)),
        {
            **GPT2_LAYERS,
            "h.{}.crossattention.c_attn.weight": Layout(dim=1, parts=(1, 1)),
            **plain("h.{}.crossattention.", "q_attn", "c_proj"),
        },
    ),
    "llama": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
        plain("model.layers.{}.", *SELF_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        ("lm_head.weight",),
        ("model.embed_tokens.weight",),
    ),
    "llama, classes": Case(
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED, num_labels=5, pad_token_id=0)),
        plain("model.layers.{}.", *SELF_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        ("score.weight",),
    ),
    "qwen3-moe": Case(
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        {
            **plain("model.layers.{}.", *SELF_ATTENTION),
            "model.layers.{}.mlp.experts.gate_up_proj": GATED_EXPERTS,
            "model.layers.{}.mlp.experts.down_proj": EXPERTS,
        },
        ("lm_head.weight",),
    ),
    "mixtral": Case(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
        {
            **plain("model.layers.{}.", *SELF_ATTENTION),
            "model.layers.{}.mlp.experts.gate_up_proj": GATED_EXPERTS,
            "model.layers.{}.mlp.experts.down_proj": EXPERTS,
        },
        ("lm_head.weight",),
    ),
    "gpt-oss": Case(  # (experts, inputs, outputs), gates at even columns and up projections at odd ones
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4)),
        {
            **plain("model.layers.{}.", *SELF_ATTENTION),
            "model.layers.{}.mlp.experts.gate_up_proj": Layout(stacked=True, dim=1, parts=(1, 1), repeats=48),
            "model.layers.{}.mlp.experts.down_proj": EXPERTS,
        },
        ("lm_head.weight",),
    ),
    "llama 4": Case(  # (experts, inputs, outputs), gates before up projections
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(**GROUPED, head_dim=8, num_local_experts=4, intermediate_size_mlp=40)
        ),
        {
            **plain("model.layers.{}.", *SELF_ATTENTION),
            **plain("model.layers.{}.feed_forward.shared_expert.", "gate_proj", "up_proj", "down_proj"),
            "model.layers.{}.feed_forward.experts.gate_up_proj": Layout(stacked=True, dim=1, parts=(1, 1)),
            "model.layers.{}.feed_forward.experts.down_proj": EXPERTS,
        },
        ("lm_head.weight",),
    ),
    "phi-3": Case(
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0)),
        {
            **plain("model.layers.{}.", "self_attn.o_proj", "mlp.down_proj"),
            "model.layers.{}.self_attn.qkv_proj.weight": Layout(parts=(2, 1, 1)),
            "model.layers.{}.mlp.gate_up_proj.weight": PAIR,
        },
        ("lm_head.weight",),
    ),
    "bloom": Case(
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)),
        {
            "transformer.h.{}.self_attention.query_key_value.weight": Layout(parts=(1, 1, 1), repeats=4),
            **plain("transformer.h.{}.", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
    ),
    "gpt-neox": Case(
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**WORDS)),
        {
            "gpt_neox.layers.{}.attention.query_key_value.weight": Layout(parts=(1, 1, 1), repeats=4),
            **plain("gpt_neox.layers.{}.", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
        ("lm_head.weight",),
    ),
    "falcon": Case(  # one key and value for all heads
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        ),
        {
            "transformer.h.{}.self_attention.query_key_value.weight": Layout(parts=(4, 1, 1)),
            **plain("transformer.h.{}.", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
    ),
    "falcon, new": Case(  # two heads, their key and their value, in turn
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_kv_heads=2,
                new_decoder_architecture=True,
            )
        ),
        {
            "transformer.h.{}.self_attention.query_key_value.weight": Layout(parts=(2, 1, 1), repeats=2),
            **plain("transformer.h.{}.", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        },
    ),
    "bert, backbone": Case(
        lambda: hf.BertModel(hf.BertConfig(**WORDS)),
        {**{name.removeprefix("bert."): layout for name, layout in BERT_LAYER.items()}, **plain("", "pooler.dense")},
    ),
    "bert, masked words": Case(
        lambda: hf.BertForMaskedLM(hf.BertConfig(**WORDS)),
        {**BERT_LAYER, **plain("cls.predictions.transform.", "dense")},
    ),
    "bert, two heads": Case(
        lambda: hf.BertForPreTraining(hf.BertConfig(**WORDS, tie_word_embeddings=False)),
        {**BERT_LAYER, **plain("", "bert.pooler.dense", "cls.predictions.transform.dense")},
        ("cls.predictions.decoder.weight", "cls.seq_relationship.weight"),
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGES, num_labels=10)),
        {
            **plain("vit.embeddings.", "patch_embeddings.projection"),
            **plain("vit.layers.{}.attention.", "q_proj", "k_proj", "v_proj", "o_proj"),
            **plain("vit.layers.{}.mlp.", "fc1", "fc2"),
        },
        ("classifier.weight",),
    ),
    "clip": Case(  # its projections lead into a common space, which is no output of classes
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=IMAGES, projection_dim=24)),
        {
            **plain("text_model.encoder.layers.{}.", *CLIP_LAYER),
            **plain("vision_model.encoder.layers.{}.", *CLIP_LAYER),
            **plain("", "vision_model.embeddings.patch_embedding", "visual_projection", "text_projection"),
        },
    ),
    "clip, classes": Case(
        lambda: hf.CLIPForImageClassification(
            hf.CLIPConfig(text_config=WORDS, vision_config=IMAGES, num_labels=7, projection_dim=24)
        ),
        {
            **plain("vision_model.encoder.layers.{}.", *CLIP_LAYER),
            **plain("", "vision_model.embeddings.patch_embedding"),
        },
        ("classifier.weight",),
    ),
    "whisper": Case(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=50,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=20,
                pad_token_id=0,
                decoder_start_token_id=1,
            )
        ),
        {
            **plain("model.encoder.", "conv1", "conv2"),
            **plain("model.encoder.layers.{}.", *WHISPER, "fc1", "fc2"),
            **plain("model.decoder.layers.{}.", *WHISPER, "fc1", "fc2"),
            **plain("model.decoder.layers.{}.encoder_attn.", "q_proj", "k_proj", "v_proj", "out_proj"),
        },
        embeddings=(
            "model.encoder.embed_positions.weight",
            "model.decoder.embed_positions.weight",
            "model.decoder.embed_tokens.weight",
        ),
    ),
    "mamba": Case(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=6, time_step_rank=4)
        ),
        {
            "backbone.layers.{}.mixer.in_proj.weight": PAIR,
            "backbone.layers.{}.mixer.x_proj.weight": Layout(parts=(2, 3, 3)),
            **plain("backbone.layers.{}.mixer.", "dt_proj", "out_proj"),
        },
    ),
    "mamba 2": Case(  # gates, inputs, B and C of two groups, and time steps of eight heads
        lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                state_size=6,
                num_heads=8,
                head_dim=8,
                n_groups=2,
                tie_word_embeddings=False,
            )
        ),
        {
            "backbone.layers.{}.mixer.in_proj.weight": Layout(parts=(16, 16, 3, 3, 2)),
            **plain("backbone.layers.{}.mixer.", "out_proj"),
        },
        ("lm_head.weight",),
    ),
    "swin": Case(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(
                image_size=16,
                patch_size=2,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
                num_labels=10,
                use_absolute_embeddings=True,
            )
        ),
        {
            **plain("swin.embeddings.patch_embeddings.", "projection"),
            **plain("swin.encoder.layers.{}.blocks.{}.attention.", "q_proj", "k_proj", "v_proj", "o_proj"),
            **plain("swin.encoder.layers.{}.blocks.{}.mlp.", "fc1", "fc2"),
            **plain("swin.encoder.layers.0.downsample.", "reduction"),
        },
        ("classifier.weight",),
    ),
    "convnext": Case(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[16, 24], depths=[2, 2], num_stages=2, num_labels=10)
        ),
        {
            **plain("convnext.embeddings.", "patch_embeddings"),
            **plain("convnext.encoder.stages.{}.layers.{}.", "pwconv1", "pwconv2"),
            **plain("convnext.encoder.stages.1.downsampling_layer.", "1"),
        },
        ("classifier.weight",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_of_an_architecture(name: str):
    case = CASES[name]
    model = case.make()
    described = describe(model)
    expected = {each: layout for pattern, layout in case.matrices.items() for each in names_of(pattern)}
    assert {parameter.name: parameter.layout for parameter in described if parameter.is_matrix} == expected
    assert [parameter.name for parameter in described] == [each for each, _ in model.named_parameters()]
    assert {parameter.name for parameter in described if parameter.what == "output layer"} == set(case.outputs)
    assert set(case.embeddings) <= {parameter.name for parameter in described if parameter.what == "embedding"}


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss", "mamba"])
def test_a_step_of_an_architecture(name: str):
    """One group for each layout, and each parameter moves."""
    torch.manual_seed(0)
    model = CASES[name].make()
    optimizer = OMADA(model, scale=False)
    splits = [group["split"] for group in optimizer.param_groups if group["matrices"]]
    assert splits[0] is None
    assert len(splits) == len({str(split) for split in splits}) == len(set(CASES[name].matrices.values()))
    assert [group["matrices"] for group in optimizer.param_groups] == [True] * len(splits) + [False]
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    words = torch.randint(50, (2, 16))
    model(input_ids=words, labels=words).loss.backward()
    optimizer.step()
    trained = {name for name, param in model.named_parameters() if param.grad is not None}
    assert len(trained) > 0.9 * len(before)
    assert not any(torch.equal(model.get_parameter(name), before[name]) for name in trained)


def test_the_parts_of_gpt2s_attention_step_alike():
    """With gradients of queries and keys 100 times smaller than those of values, as three separate matrices would."""
    torch.manual_seed(0)
    model = hf.GPT2Model(GPT2)
    fused = model.h[0].attn.c_attn.weight
    grads = [0.01 * torch.randn(32, 32), 0.01 * torch.randn(32, 32), torch.randn(32, 32)]
    fused.grad = torch.cat(grads, 1)
    before = fused.detach().clone()
    OMADA(model, 1.0, weight_decay=0.0, scale=False).step()
    apart = [nn.Parameter(part.clone()) for part in before.chunk(3, 1)]
    for part, grad in zip(apart, grads, strict=True):
        part.grad = grad
    OMADA([{"params": apart, "matrices": True}], 1.0, weight_decay=0.0, scale=False).step()
    assert torch.equal(fused, torch.cat(apart, 1))
    assert all(0.15 < step.square().mean().sqrt() < 0.25 for step in (fused - before).chunk(3, 1))


@pytest.mark.parametrize("name", ["bloom", "falcon", "falcon, new"])
def test_the_rows_of_a_part_are_those_that_the_module_takes(name: str):
    """Modules take apart what their projection returns; here, the numbers of its rows."""
    model: Any = CASES[name].make()
    attention = model.transformer.h[0].self_attention
    rows = torch.arange(attention.query_key_value.weight.size(0))
    taken = (attention._reshape if name == "bloom" else attention._split_heads)(rows.view(1, 1, -1))
    described = next(parameter for parameter in describe(model) if "query_key_value.weight" in parameter.name)
    ours = described.layout.cut(rows.view(-1, 1))  # type: ignore[union-attr]
    for part, theirs in zip(ours, taken, strict=True):
        assert torch.equal(part.flatten().sort().values, theirs.unique())


def test_the_columns_of_gates_are_those_that_gpt_oss_takes():
    """Its output is 0 where the up projection is -1, whatever the gates are."""
    model: Any = CASES["gpt-oss"].make()
    described = next(parameter for parameter in describe(model) if parameter.name.endswith("gate_up_proj"))
    ones = torch.ones(4, 32, 48)
    outputs = described.layout.join([ones, -ones], described.shape)  # type: ignore[union-attr,arg-type]
    assert not model.model.layers[0].mlp.experts._apply_gate(outputs).any()


def test_a_backbone_in_a_model_of_ones_own():
    """Its last layer is no output, wherever the head stands."""
    backbone: Any = hf.BertModel(hf.BertConfig(**WORDS))
    heads = {"first": [nn.Linear(32, 3), backbone], "last": [backbone, nn.Linear(32, 3)]}
    for place, (one, two) in heads.items():
        model = nn.Module()
        model.one, model.two = one, two
        outputs = [parameter.name for parameter in describe(model) if parameter.what == "output layer"]
        assert outputs == [("one" if place == "first" else "two") + ".weight"]
    pooled = nn.Sequential(backbone, nn.Identity())
    assert not [parameter for parameter in describe(pooled) if parameter.what == "output layer"]


# The models of docs/omada.md, in full size: without memory, on the meta device.
ON_THE_PAGE: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config()),
    "Llama 3.2 1B": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        )
    ),
    "Qwen3 30B A3B": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            mlp_only_layers=[],
            tie_word_embeddings=False,
        )
    ),
    "ViT-B/16": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)),
}


def described_on_the_page(name: str) -> str:
    with torch.device("meta"):
        return str(describe(ON_THE_PAGE[name]()))


@pytest.mark.parametrize("name", ON_THE_PAGE)
def test_the_tables_of_the_page_are_what_describe_prints(name: str):
    """To renew them: python tests/matrices/test_transformers.py prints all."""
    page = (ROOT / "docs" / "omada.md").read_text("utf-8")
    (table,) = re.findall(rf"^### {name}\n\n```text\n(.+?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert table == described_on_the_page(name)


if __name__ == "__main__":
    for model_name in ON_THE_PAGE:
        print(f"### {model_name}\n\n```text\n{described_on_the_page(model_name)}\n```\n")
