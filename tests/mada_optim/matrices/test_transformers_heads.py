"""Output layers of transformers' models that have several, or unusual ones; and weights of unusual shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf
from torch import nn

from mada_optim import describe
from mada_optim.matrices import Layout

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = {**SMALL, "vocab_size": 50}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
DISTILBERT = {"vocab_size": 50, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}


def bark(**sizes: int) -> dict[str, int]:
    return {"num_layers": 1, "num_heads": 4, "hidden_size": 32, "input_vocab_size": 50, "block_size": 16, **sizes}


def detector() -> nn.Module:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return hf.RTDetrForObjectDetection(
        hf.RTDetrConfig(
            backbone_config=backbone,
            encoder_hidden_dim=16,
            encoder_in_channels=[8, 8, 16],
            decoder_in_channels=[16, 16, 16],
            encoder_ffn_dim=24,
            encoder_attention_heads=2,
            d_model=16,
            decoder_layers=2,
            decoder_ffn_dim=24,
            decoder_attention_heads=2,
            num_queries=6,
            num_labels=5,
        )
    )


OUTPUTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "distilbert, classes": (  # a hidden layer before it is called pre_classifier
        lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTILBERT)),
        {"classifier.weight"},
    ),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**WORDS)), set()),  # tied; lm_head.dense is hidden
    "t5, answers": (lambda: hf.T5ForQuestionAnswering(hf.T5Config(**T5)), {"qa_outputs.weight"}),
    "musicgen": (  # one for each codebook
        lambda: hf.MusicgenForCausalLM(
            hf.MusicgenDecoderConfig(
                vocab_size=50,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_codebooks=3,
            )
        ),
        {f"lm_heads.{index}.weight" for index in range(3)},
    ),
    "decision transformer": (
        lambda: hf.DecisionTransformerModel(
            hf.DecisionTransformerConfig(state_dim=11, act_dim=4, hidden_size=32, n_layer=1, n_head=4)
        ),
        {"predict_state.weight", "predict_action.0.weight", "predict_return.weight"},
    ),
    "rt-detr": (  # in the decoder, one of each for each of its layers
        detector,
        {
            *(f"model.decoder.{name}.weight" for name in ("class_embed.0", "class_embed.1")),
            *(f"model.decoder.bbox_embed.{index}.layers.2.weight" for index in (0, 1)),
            "model.enc_score_head.weight",
            "model.enc_bbox_head.layers.2.weight",
        },
    ),
    "depth": (  # no base model, and a head that is called so
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=hf.Dinov2Config(
                    hidden_size=32,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    image_size=16,
                    patch_size=4,
                    out_indices=[1, 2, 3, 4],
                    reshape_hidden_states=False,
                ),
                reassemble_hidden_size=32,
                neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8,
                head_hidden_size=8,
                patch_size=4,
            )
        ),
        {"head.conv3.weight"},
    ),
    "backbone": (lambda: hf.DINOv3ViTBackbone(hf.DINOv3ViTConfig(**IMAGES)), set()),
    "siglip": (  # its heads are poolers
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=WORDS, vision_config=IMAGES)),
        set(),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_layers(name: str):
    make, expected = OUTPUTS[name]
    assert {parameter.name for parameter in describe(make()) if parameter.what == "output layer"} == expected


def test_bark():
    """Two of its three models have a head, which none of them returns; the third ties its heads to its embeddings."""
    model = hf.BarkModel(
        hf.BarkConfig(
            semantic_config=bark(output_vocab_size=40),
            coarse_acoustics_config=bark(output_vocab_size=60),
            fine_acoustics_config=bark(output_vocab_size=50),
        )
    )
    ours = [parameter for parameter in describe(model) if not parameter.name.startswith("codec_model")]
    outputs = {parameter.name for parameter in ours if parameter.what == "output layer"}
    assert outputs == {"semantic.lm_head.weight", "coarse_acoustics.lm_head.weight"}
    attention = [parameter.layout for parameter in ours if parameter.name.endswith("att_proj.weight")]
    assert attention == [Layout(parts=(1, 1, 1))] * 3


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Layout]]] = {
    "xlnet": (  # (width, heads, width of a head)
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48)),
        {f"transformer.layer.0.rel_attn.{name}": Layout() for name in "qkvor"},
    ),
    "funnel": (
        lambda: hf.FunnelForMaskedLM(
            hf.FunnelConfig(vocab_size=50, block_sizes=[1], d_model=32, n_head=4, d_head=8, d_inner=48)
        ),
        {"funnel.encoder.blocks.0.0.attention.r_kernel": Layout()},
    ),
    "qwen3-next": (  # a query and its gate, head by head
        lambda: hf.Qwen3NextForCausalLM(
            hf.Qwen3NextConfig(
                **WORDS,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=4,
                moe_intermediate_size=16,
                shared_expert_intermediate_size=16,
                linear_num_key_heads=2,
                linear_num_value_heads=4,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            )
        ),
        {
            "model.layers.1.self_attn.q_proj.weight": Layout(parts=(1, 1), repeats=4),
            "model.layers.1.self_attn.k_proj.weight": Layout(),
        },
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str):
    make, expected = LAYOUTS[name]
    layouts: dict[str, Any] = {parameter.name: parameter.layout for parameter in describe(make())}
    assert {each: layouts[each] for each in expected} == expected
