"""What the parameters of peft's adapters are."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import transformers as hf
from torch import nn

from mada_optim import OMADA, describe
from mada_optim.matrices import Layout

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's

ONE = Layout()
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 50,
    "n_positions": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def adapted(model: Any, **options: Any) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def trained_matrices(model: nn.Module) -> dict[str, Layout]:
    return {
        parameter.name.removeprefix("base_model.model."): parameter.layout
        for parameter in describe(model)
        if parameter.layout is not None and parameter.trained
    }


def factors(name: str, outputs: Layout = ONE) -> dict[str, Layout]:
    return {f"{name}.lora_A.default.weight": ONE, f"{name}.lora_B.default.weight": outputs}


@pytest.mark.parametrize("dora", [False, True])
def test_lora_of_a_backbone(dora: bool):
    """The last B is a matrix as the others are; those of a fused projection have its parts."""
    model = adapted(
        hf.GPT2Model(hf.GPT2Config(**GPT2)), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=dora
    )
    expected = {}
    for layer in (0, 1):
        expected |= factors(f"h.{layer}.attn.c_attn", Layout(parts=(1, 1, 1))) | factors(f"h.{layer}.mlp.c_fc")
    assert trained_matrices(model) == expected
    described = describe(model)
    frozen = {parameter.name for parameter in described if parameter.is_matrix and not parameter.trained}
    assert len(frozen) == 2 * 4
    assert "base_model.model.h.0.attn.c_attn.base_layer.weight" in frozen
    assert not [parameter for parameter in described if parameter.what == "output layer"]
    magnitudes = [parameter for parameter in described if "magnitude" in parameter.name]
    assert len(magnitudes) == 4 * dora
    assert not any(parameter.is_matrix for parameter in magnitudes)
    trained = [param for param in model.parameters() if param.requires_grad]
    assert sum(len(group["params"]) for group in OMADA(model).param_groups) == len(trained)


def test_a_thin_factor_is_a_matrix_and_one_of_rank_1_is_none():
    wide = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 3))
    assert trained_matrices(adapted(wide, target_modules=["0"])) == factors("0")
    wide = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    model = peft.get_peft_model(wide, peft.LoraConfig(r=1, target_modules=["0"]))
    assert trained_matrices(model) == {}


def test_an_output_layer_that_is_trained_beside_its_copy():
    model = adapted(
        hf.BertForSequenceClassification(
            hf.BertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=50,
                num_labels=5,
            )
        ),
        task_type="SEQ_CLS",
        target_modules=["query"],
        modules_to_save=["pooler"],
    )
    assert trained_matrices(model) == {
        **factors("bert.encoder.layer.0.attention.self.query"),
        "bert.pooler.modules_to_save.default.dense.weight": ONE,
    }
    assert {parameter.name for parameter in describe(model) if parameter.what == "output layer"} == {
        "base_model.model.classifier.original_module.weight",
        "base_model.model.classifier.modules_to_save.default.weight",
    }


def test_lora_of_embeddings_and_of_an_output_layer():
    """A's columns and B's rows belong to words; the other factors map activations."""
    model = adapted(
        hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
            )
        ),
        target_modules=["embed_tokens", "lm_head"],
    )
    described = {parameter.name.removeprefix("base_model.model."): parameter for parameter in describe(model)}
    assert described["model.embed_tokens.lora_embedding_A.default"].what == "embedding"
    assert described["lm_head.lora_B.default.weight"].what == "output layer"
    assert described["lm_head.base_layer.weight"].what == "output layer"
    assert set(trained_matrices(model)) == {
        "model.embed_tokens.lora_embedding_B.default",
        "lm_head.lora_A.default.weight",
    }


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (peft.OFTConfig(r=0, oft_block_size=8, target_modules=["0"]), "coordinates"),
        (peft.HRAConfig(r=4, target_modules=["0"]), "coordinates"),
        (peft.C3AConfig(block_size=8, target_modules=["0"]), "coordinates"),
        (peft.VBLoRAConfig(num_vectors=32, vector_length=16, target_modules=["0"]), "table"),
    ],
    ids=lambda value: getattr(value, "peft_type", value),
)
def test_adapters_from_which_a_matrix_is_computed(config: Any, what: str):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), config)
    kinds = {parameter.what for parameter in describe(model) if parameter.trained}
    assert what in kinds <= {what, "row or column"}
