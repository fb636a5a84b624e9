"""Kernels that have been compiled are launched again: on a GPU at every step, in Triton's interpreter never."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import assert_same, run
from problems import TABLE, Row
from test_multi_tensor import launches, plain, pytestmark  # noqa: F401  a fixture, and where it is needed

from mada_optim.kernels import select
from mada_optim.kernels.triton import launch, scalars

CPU = torch.device("cpu")


def kinds(arguments: Sequence[Any]) -> list[Any]:
    """Return what Triton compiles for: dtypes, and whether pointers are aligned to 16 bytes. Of numbers, their type."""
    return [(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else type(x) for x in arguments]


class Function:
    """A function of Triton as it is on a GPU: a launch returns what it compiled, which the interpreter's does not."""

    def __init__(self, interpreted: Any) -> None:
        self.interpreted = interpreted
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: int) -> Compiled:
            self.interpreted[grid](*arguments, **options)
            self.compiled.append(Compiled(self, arguments, options))
            return self.compiled[-1]

        return run


class Compiled:
    """What was compiled for some arguments. It refuses others, which on a GPU would be read as what they are not."""

    def __init__(self, function: Function, arguments: Sequence[Any], options: dict[str, int]) -> None:
        self.function, self.options, self.kinds = function, options, kinds(arguments)
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any) -> None:
            assert kinds(arguments) == self.kinds
            self.launches += 1
            self.function.interpreted[grid](*arguments, **self.options)

        return run


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> list[Function]:
    """All functions of kernels, made anew."""
    made: list[Function] = []

    class Kernel(launch.Kernel):
        def __init__(self, function: Any) -> None:
            made.append(Function(function))
            super().__init__(made[-1])

    def forget() -> None:
        launch.load.cache_clear()
        select.the.cache_clear()

    monkeypatch.setattr(launch, "Kernel", Kernel)
    monkeypatch.setattr(scalars, "_KERNELS", {})
    forget()
    yield made
    forget()


@pytest.mark.parametrize("row", [row for row in TABLE if row.name in ("mada-paper", "lion")], ids=lambda row: row.name)
def test_steps_with_kernels_launched_again_agree_with_plain(
    row: Row,
    functions: list[Function],
    launches: list[int],  # noqa: F811
) -> None:
    expected = plain(row, torch.float64)
    assert_same(run(row, torch.float64), expected, 1e-12)
    compiled = [each for function in functions for each in function.compiled]
    again = sum(each.launches for each in compiled)
    assert again + len(compiled) == launches[0]
    assert again > len(compiled)


def test_other_constants_and_options_are_compiled_anew() -> None:
    calls: list[tuple[Any, ...]] = []

    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: calls.append((grid, arguments, options))

    function = Function(Interpreted())
    kernel, x = launch.Kernel(function), torch.zeros(4)
    for programs, number, constants, options in (
        (1, 5, (64,), {"num_warps": 4}),
        (3, 7, (64,), {"num_warps": 4}),
        (1, 5, (128,), {"num_warps": 4}),
        (1, 5, (128,), {"num_warps": 8}),
        (2, 9, (128,), {"num_warps": 8}),
    ):
        kernel.launch(CPU, programs, (x, number), constants, **options)
        assert calls[-1] == ((programs, 1, 1), (x, number, *constants), options)
    assert [each.launches for each in function.compiled] == [1, 0, 1]
