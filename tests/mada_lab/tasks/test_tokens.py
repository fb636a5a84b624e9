"""The task "tokens": measures against plain ones, sizes against published ones, steps on several processes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import torchrun
from packed import make_packed, tiny_tokens
from tiny import assert_close_run, assert_same, assert_same_run
from transformers import GPT2Config, GPT2LMHeadModel

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.optimizers.config import OptimizerConfig
from mada_lab.run.config import RunConfig, from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.train import train
from mada_lab.tasks.evaluation import Lambada, perplexity


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def lambada(packed: Path) -> Path:
    path = packed.parent / "lambada.jsonl"
    texts = ["if a then b else something", "yes, no", "x " * 40 + "yield", "the statement ends here"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_batches_are_functions_of_seed_and_step(packed: Path) -> None:
    one, other = tiny_tokens(packed).build(), tiny_tokens(packed).build()
    other.batch(0, 8)
    assert_same(one.batch(0, 3), other.batch(0, 3))
    assert not torch.equal(one.batch(0, 3)[0], one.batch(0, 4)[0])
    inputs, targets = one.batch(1, 3)
    assert inputs.shape == (8, 16)
    text, tokenizer = (packed.parent / "text.txt").read_text(), one.packed.tokenizer()
    for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
        assert tokenizer.decode([*row[1:-1], row[-1], last])[1:-1] in text


@pytest.mark.parametrize(("size", "parameters"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168)])
def test_sizes_are_those_of_the_published_models(packed: Path, size: str, parameters: int) -> None:
    config = tiny_tokens(packed, layers=12, heads=12, width=768, context=1024, size=size)
    from mada_lab.tasks.packing import read
    from mada_lab.tasks.windows import WindowsTask

    data = read(str(packed))
    with torch.device("meta"):
        model = WindowsTask(config, 50_257, data.train, data.train).model(0)
    assert sum(param.numel() for param in model.parameters()) == parameters


def test_perplexity_is_that_of_all_windows(packed: Path) -> None:
    task = tiny_tokens(packed, wikitext=str(packed)).build()
    model = task.model(0).double().eval()
    tokens = torch.from_numpy(task.packed.validation.astype("int64"))
    losses = []
    for begin in range(0, len(tokens) - 16, 16):
        logits = model(input_ids=tokens[None, begin : begin + 16]).logits[0]
        losses += F.cross_entropy(logits, tokens[begin + 1 : begin + 17], reduction="none").tolist()
    expected = torch.tensor(losses).double().mean().exp().item()
    assert perplexity(task, model, task.packed.validation) == pytest.approx(expected, rel=1e-6)
    assert task.validate(model)["wikitext_perplexity"] == pytest.approx(expected, rel=1e-6)


def test_lambada_is_that_of_one_passage_after_the_other(packed: Path, lambada: Path) -> None:
    task = tiny_tokens(packed, lambada=str(lambada)).build()
    model = task.model(0).double().eval()
    tokenizer, total = task.packed.tokenizer(), 0.0
    for line in lambada.read_text().splitlines():
        text = json.loads(line)["text"]
        codes = tokenizer.encode(text).ids
        last = len(codes) - len(tokenizer.encode(text[: text.rindex(" ")]).ids)
        seen = torch.tensor([codes[-17:]])
        logs = model(input_ids=seen[:, :-1]).logits[0].log_softmax(-1)
        total += sum(logs[-i, seen[0, -i]].item() for i in range(1, last + 1))
    values = task.validate(model)
    assert values["lambada_perplexity"] == pytest.approx(torch.tensor(-total / 4).double().exp().item(), rel=1e-5)
    assert values["lambada_accuracy"] == 0.0
    plain = lambada.with_name("plain.txt")
    plain.write_text("\n".join(json.loads(line)["text"] for line in lambada.read_text().splitlines()))
    assert Lambada.read(str(plain), tokenizer, 16).passages == task.lambada.passages


def test_lambada_counts_a_word_if_all_of_it_is_said(packed: Path) -> None:
    model = tiny_tokens(packed).build().model(0).eval()
    passages = []
    for start, spoil in ((5, None), (6, -1), (7, -2), (8, None), (9, None)):
        tokens = [start, start + 1, start + 2]
        for _ in range(2):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if spoil is not None:
            tokens[spoil] = (tokens[spoil] + 1) % 300
        passages.append((tokens, 2))
    assert Lambada(passages, "").evaluate(model)["lambada_accuracy"] == pytest.approx(3 / 5)


def test_autocast(packed: Path) -> None:
    tasks = {wanted: tiny_tokens(packed, autocast=wanted).build() for wanted in (None, False, True)}
    model = tasks[None].model(0)
    loss = {wanted: task.loss(model, task.batch(0, 1)).item() for wanted, task in tasks.items()}
    assert loss[None] == loss[False] != loss[True]
    assert loss[True] == pytest.approx(loss[False], abs=0.02)


def small_gpt2(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def test_published_weights(packed: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights, model = str(tmp_path / "weights"), small_gpt2()
    model.save_pretrained(weights)
    task = tiny_tokens(packed, layers=2, init=weights).build()
    ours = task.model(0)
    assert_same(dict(ours.state_dict()), dict(model.state_dict()))
    assert all(module.p == 0.0 for module in ours.modules() if isinstance(module, torch.nn.Dropout))
    assert task.validate(ours)["loss"] == pytest.approx(task.validate(model.eval())["loss"])
    described = task.describe()["init"]
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1e-3
    model.save_pretrained(weights)
    other = tiny_tokens(packed, layers=2, init=weights).build().describe()["init"]
    assert other["source"] == described["source"] == "weights"
    assert other["sha256"] != described["sha256"]


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ({}, {"context": 64}, "context must be at most 32, as in init=.*, got 64"),
        ({}, {"layers": 3}, "layers must be 2, as in init=.*, got 3"),
        ({"n_embd": 32}, {}, "width must be 32, as in init=.*, got 16"),
        ({"n_head": 4}, {}, "heads must be 4, as in init=.*, got 2"),
        ({"vocab_size": 299}, {}, "init must be weights for 300 tokens or more"),
        (
            {"activation_function": "relu"},
            {},
            "activation_function of init=.* must be gelu_new, as in GPT-2, got",
        ),
        ({"n_inner": 8}, {}, "n_inner of init=.* must be 64, as in GPT-2, got 8"),
    ],
)
def test_published_weights_that_do_not_fit(
    model: dict[str, Any], task: dict[str, Any], message: str, packed: Path, tmp_path: Path
) -> None:
    small_gpt2(**model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        tiny_tokens(packed, **{"layers": 2, "init": str(tmp_path), **task}).build()


def test_no_published_weights(packed: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            tiny_tokens(packed, layers=2, init=str(tmp_path)).build()

    neither = "init must be the folder of a run, or weights of GPT-2, in a folder or by a name on the hub, got "
    refused(neither)
    small_gpt2().config.save_pretrained(tmp_path)
    refused(neither)
    small_gpt2(n_layer=1).save_pretrained(tmp_path)
    small_gpt2().config.save_pretrained(tmp_path)
    refused("init must be all weights of a GPT-2 .it lacks transformer.h.1")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("init must be of the type gpt2 .it is bert.")


def run(packed: Path, lambada: Path, **changes: Any) -> RunConfig:
    values = {"steps": 10, "eval_every": 5, "checkpoint_every": 5, "threads": 1, "device": "cpu", "dtype": "float64"}
    task = tiny_tokens(packed, lambada=str(lambada), wikitext=str(packed))
    optimizer = OptimizerConfig("mada", lr=1e-2, options={"hyper_warmup": 2})
    return RunConfig(task, optimizer, **{**values, **changes})


@pytest.fixture(scope="module")
def alone(packed: Path, lambada: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    result = train(run(packed, lambada), folder, draw=False)
    assert result.val.keys() == {"wikitext_perplexity", "lambada_perplexity", "lambada_accuracy"}
    return folder


def test_a_run_begins_with_the_weights_of_another(packed: Path, lambada: Path, alone: Path, tmp_path: Path) -> None:
    """Its first validation, with all that is measured, is the last one of the earlier run."""
    config = run(packed, lambada, dtype="float32")
    train(dataclasses.replace(config, steps=4), tmp_path / "earlier", draw=False)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, init=str(tmp_path / "earlier")))
    train(config, tmp_path / "later", draw=False)
    (*_, last), (first, *_) = (RunFolder(tmp_path / name).metrics() for name in ("earlier", "later"))
    assert first == last | {"step": 0}
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "cut", on_step=lambda report: 1 // (7 - report.step))  # type: ignore[arg-type,return-value]
    train(config, tmp_path / "cut", resume=True, draw=False)
    assert_same_run(tmp_path / "later", tmp_path / "cut")


def test_a_run_on_other_tokens(packed: Path, alone: Path, tmp_path: Path) -> None:
    other = shutil.copytree(packed, tmp_path / "packed")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"tokenizer_sha256": "0"}))
    with pytest.raises(InputError, match="init must be a run on tokens of the same tokenizer as data, got '.*run'"):
        tiny_tokens(other, init=str(alone)).build()


def test_accumulated_steps_are_those_of_whole_batches(packed: Path, lambada: Path, alone: Path, tmp_path: Path) -> None:
    train(run(packed, lambada, accumulate=4), tmp_path / "run", draw=False)
    assert_close_run(tmp_path / "run", alone)


PROGRAM = """
import sys
from mada_lab.run.config import from_dict
from mada_lab.run.train import train
from mada_lab.files import read_json
from pathlib import Path
train(from_dict(read_json(Path(sys.argv[1]))), sys.argv[2], draw=False)
"""


def test_two_processes_with_micro_batches_train_as_one(
    packed: Path, lambada: Path, alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run(packed, lambada, accumulate=2))))
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun(str(tmp_path / "program.py"), str(tmp_path / "config.json"), str(tmp_path / "run"))
    assert RunFolder(tmp_path / "run").config().accumulate == 2
    assert_close_run(tmp_path / "run", alone)


def test_a_batch_that_cannot_be_cut(packed: Path, lambada: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="batch must be a multiple of the number of processes times accumulate, 3, got 8"
    ):
        train(run(packed, lambada, accumulate=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_survives_json(packed: Path, lambada: Path) -> None:
    config = run(packed, lambada)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    named = tiny_tokens(packed, layers=12, heads=12, width=768, size="gpt2-medium")
    assert (named.layers, named.heads, named.width) == (24, 16, 1024)
    assert from_dict(json.loads(json.dumps(to_dict(RunConfig(named))))) == RunConfig(named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "gpt3"}, "size must be one of gpt2, .* got 'gpt3'"),
        ({"size": "gpt2"}, "size must be left out where layers, heads or width are given"),
        (
            {"size": "gpt2", "layers": 24, "heads": 16, "width": 1024},
            "size must be left out where layers, heads or width are given",
        ),
        ({"data": "nowhere"}, "data must be a folder that 'mada tokens' made, got 'nowhere'"),
        ({"data": None}, "data must be a folder that 'mada tokens' made, got None"),
        ({"wikitext": "nowhere"}, "wikitext must be a folder"),
        ({"lambada": "nowhere"}, "lambada must be a file with passages of several words, got 'nowhere'"),
        ({"context": 5000}, "data, val.bin, must be over 5000 tokens"),
    ],
)
def test_bad_input(packed: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_tokens(packed, **changes).build()


@pytest.mark.parametrize("count", [0, 10, 16])
def test_a_wikitext_that_is_too_short(count: int, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "short")
    (tmp_path / "short" / "val.bin").write_bytes(bytes(2 * count))
    meta = json.loads((packed / "meta.json").read_text())
    meta["val"]["tokens"] = count
    (tmp_path / "short" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=f"wikitext, val.bin, must be over 16 tokens, got '{count} in .*short'"):
        tiny_tokens(packed, wikitext=str(tmp_path / "short")).build()


@pytest.mark.parametrize("content", [" a\nb c a\n", '{"text": null}\n', '{"text": 5}\n', "[1]\n", "word\n"])
def test_lambada_without_passages_of_several_words(content: str, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "lambada").write_text(content)
    with pytest.raises(InputError, match="lambada must be a file with passages of several words, got '.*lambada'"):
        tiny_tokens(packed, lambada=str(tmp_path / "lambada")).build()


def test_the_comparison_for_a_gpu_runs_here(
    packed: Path, lambada: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, which the machine with the GPU does not have."""
    monkeypatch.setitem(sys.modules, "ray", None)
    sizes = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 8, "val_windows": 8}
    values = {f"task.{name}": value for name, value in sizes.items()} | {"steps": 4, "eval_every": 2}
    values |= {"task.data": f'"{packed}"', "task.lambada": f'"{lambada}"', "device": '"cpu"'}
    changes = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    file = Path(__file__).parents[3] / "experiments" / "gpt-30m.toml"
    assert main(["sweep", str(file), "--workers", "0", "--out", str(tmp_path / "out"), *changes]) == 0
    printed = capsys.readouterr().out
    for what in ("lambada", "perplexity", "accuracy", "omada", "muon"):
        assert what in printed
    results = json.loads((tmp_path / "out" / "tune" / "results.json").read_text())["results"]
    rates = {entry["optimizer"]: [cell["lr"] for cell in entry["by_lr"]] for entry in results}
    assert rates["adamw"] == [1e-3, 3e-3]
    assert rates["muon"] == [3e-3, 1e-2]
    assert rates["mada"] == [next(entry["best_lr"] for entry in results if entry["optimizer"] == "adamw")]
    assert all(entry["measures"].keys() == {"lambada_perplexity", "lambada_accuracy"} for entry in results)
