"""Options are written once: signatures, help, frameworks and type checkers show all of them."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from problems import STARTS
from torch import nn
from typing_extensions import TypedDict, Unpack

import mada_optim
from mada_optim import MADA, OMADA, AVGrad, HypergradientOptimizer, MADAFamily, available_optimizers, load_optimizer
from mada_optim.optimizers.options import Options, with_options

# As users of torch know them, then what is ours: the order of the arguments is that of the documentation.
ADAMW = ["params", "lr", "betas", "eps", "weight_decay"]
LEARNING = [
    "hyper_lr",
    "hyper_momentum",
    "hyper_clip",
    "hyper_warmup",
    "hyper_every",
    "hyper_delay",
    "bounds",
    "hyper_per_group",
]
STEP = ["foreach", "maximize", "capturable", "differentiable", "fused", "state_dtype", "stochastic_rounding", "scale"]
ORTHO = ["ortho", "ortho_momentum", "row_norm", "row_beta", "ns_steps", "ns_coefficients", "adjust_lr_fn"]
SIGNATURES = {
    HypergradientOptimizer: ["params", "family", "lr", "weight_decay", "start", *LEARNING, *STEP, "constants"],
    MADA: [*ADAMW, *STARTS, *LEARNING, "lion_betas", *STEP],
    AVGrad: [*ADAMW, *STEP],
    OMADA: [*ADAMW, *STARTS, *ORTHO, *LEARNING, "lion_betas", *STEP, "matrices", "split", "distribute"],
}


def weight() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


NAMED = [load_optimizer(name) for name in available_optimizers()]
PRESETS = [optimizer for optimizer in NAMED if issubclass(optimizer, MADA) and optimizer is not AVGrad]


@pytest.mark.parametrize("optimizer", [HypergradientOptimizer, AVGrad, OMADA, *PRESETS])
def test_a_signature_shows_every_argument_with_type_and_default(optimizer: type[HypergradientOptimizer]):
    parameters = inspect.signature(optimizer).parameters
    assert list(parameters) == SIGNATURES.get(optimizer, SIGNATURES[MADA])
    for name, parameter in parameters.items():
        assert parameter.annotation is not parameter.empty
        assert (parameter.default is parameter.empty) == (name in ("params", "family", "constants"))
        is_positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert is_positional == (name in (*ADAMW, "family"))
    text = pydoc.plain(pydoc.render_doc(optimizer))
    assert "hyper_per_group: bool = False" in text or optimizer is AVGrad
    assert "stochastic_rounding: bool = False" in text


@pytest.mark.parametrize("optimizer", SIGNATURES)
def test_types_are_there_for_frameworks(optimizer: type[HypergradientOptimizer]):
    hints = typing.get_type_hints(optimizer.__init__)
    assert list(hints) == [*SIGNATURES[optimizer], "return"]
    assert hints["scale"] == bool | Mapping[str, float]
    assert hints["lr"] == float | torch.Tensor


@pytest.mark.parametrize("name", available_optimizers())
def test_a_misspelt_argument_is_refused(name: str):
    optimizer: Any = load_optimizer(name)
    with pytest.raises(TypeError, match=rf"^{optimizer.__name__}\.__init__\(\) got .* argument 'maximise'$"):
        optimizer(weight(), maximise=True)
    with pytest.raises(TypeError, match="too many positional arguments"):
        optimizer(weight(), 1e-3, (0.9, 0.99), 1e-8, 0.1, 0.0)
    with pytest.raises(TypeError, match="missing a required argument: 'params'"):
        optimizer(lr=1e-3)


def test_defaults_are_those_that_are_shown():
    group = HypergradientOptimizer(weight(), MADAFamily()).param_groups[0]
    resolved = ("hyper_lr", "bounds", "scale")  # kept in another form, or elsewhere
    for name, parameter in inspect.signature(HypergradientOptimizer).parameters.items():
        if name in Options.__annotations__ and name not in resolved:
            assert group[name] == parameter.default


def test_an_optimizer_of_ones_own_may_have_more_options():
    class Mine(TypedDict, total=False):
        loudness: Annotated[int, 3]

    class Loud(MADA):
        @with_options(Mine)
        def __init__(self, params: Any, lr: float = 1e-3, **options: Unpack[Mine]) -> None:
            super().__init__(params, lr, rho=0.5)
            self.loudness = options["loudness"]

    class Louder(Loud, loudness=4, lr=0.5):
        pass

    assert str(inspect.signature(Louder)) == "(params: 'Any', lr: 'float' = 0.5, *, loudness: int = 4) -> 'None'"
    assert (Loud(weight()).loudness, Louder(weight()).loudness, Louder(weight(), loudness=5).loudness) == (3, 4, 5)
    assert Louder(weight()).param_groups[0]["lr"] == 0.5


CALLS = """
MADA(params, 1e-3, (0.9, 0.99), 1e-8, 0.1, hyper_warmup=3, rho=0.5, lion_betas=(0.9, 0.99), scale=True)
OMADA(model, hyper_lr={"rho": 0.1}, matrices={"*": False}, distribute=True, foreach=None)
AVGrad(params, lr=1e-3, capturable=True)
load_optimizer("yogi")(params, c=0.1)
MADA(params, hyper_warmpu=3)  # Unexpected keyword argument "hyper_warmpu"
MADA(params, hyper_warmup="3")  # incompatible type "str"; expected "int"
OMADA(model, split=3)  # incompatible type "int"
AVGrad(params, rho=0.5)  # Unexpected keyword argument "rho"
"""


def test_a_type_checker_knows_every_option(tmp_path: Path):
    """A comment says what is to be refused in its line. torch is not looked at, which would take much longer."""
    pytest.importorskip("mypy")
    names = (
        "from typing import Any\nfrom mada_optim import MADA, OMADA, AVGrad, load_optimizer\nparams: Any\nmodel: Any\n"
    )
    lines = (names + CALLS).splitlines()
    (tmp_path / "calls.py").write_text("\n".join(lines))
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {Path(mada_optim.__file__).parents[1]}\n"
        "[mypy-torch.*,numpy.*,matplotlib.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "calls.py"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    refused = dict(re.findall(r"^calls\.py:(\d+): error: (.*)$", report.stdout, re.MULTILINE))
    expected = {str(number): line.partition("  # ")[2] for number, line in enumerate(lines, 1) if "  # " in line}
    assert refused.keys() == expected.keys(), report.stdout + report.stderr
    assert all(message in refused[number] for number, message in expected.items())
