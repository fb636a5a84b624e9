"""Several processes train as one does: the checks of ``checks.py`` in worlds of 2 and 4 processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import accelerated
import checks
import divided
import matrices
import pytest
import resuming
import scaled
import torch.distributed as dist
from problems import Net
from worlds import run_world

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without distributed, or without gloo"
)
TOGETHER = [
    value for module in (checks, matrices, scaled) for name, value in vars(module).items() if name.startswith("check_")
]
# That ranks agree is harder for four, which may add up in several orders. A state is saved alike by any number.
ON_2 = [check for check in TOGETHER if check is not checks.check_500_steps_bit_for_bit]
ON_4 = [check for check in TOGETHER if check is not scaled.check_scale_resumes]
DIVIDED = [
    divided.check_fsdp1_does_not_learn,
    divided.check_fsdp1_after_the_optimizer,
    divided.check_zero_does_not_learn,
    divided.check_meta_before_the_optimizer,
]
# The worlds, in order: what is saved in the first is resumed in the others.
SAVING = [
    resuming.check_save,
    resuming.check_full_state,
    resuming.check_flat_state,
    resuming.check_bfloat16,
    resuming.check_rows_are_saved,
    resuming.check_state_of_one_process,
    resuming.check_a_state_that_does_not_fit,
]
WORLDS = {
    "2": (2, [*ON_2, *SAVING]),
    "4": (4, [*ON_4, resuming.check_resume_on_4]),
    "2-again": (2, [resuming.check_resume_on_2, *DIVIDED, accelerated.check_accelerate_fsdp2]),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="session")
def report(folder: Path) -> Callable[[str], dict[str, str]]:
    @lru_cache
    def run(world: str) -> dict[str, str]:
        if world != "2":
            run("2")
        return run_world(*WORLDS[world], folder)

    return run


@pytest.mark.parametrize(
    ("world", "name"),
    [(world, check.__name__) for world, (_, wanted) in WORLDS.items() for check in wanted],
)
def test_in_all_processes(report: Callable[[str], dict[str, str]], world: str, name: str) -> None:
    if problem := report(world)[name]:
        pytest.fail(problem, pytrace=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_saved_on_2_processes_resumed_on_one(report: Callable[[str], dict[str, str]], folder: Path) -> None:
    assert not report("2")["check_save"]
    model = Net(seed=1)
    optimizer = resuming.three_groups(model)
    resuming.load(folder / "dcp", model, optimizer)
    checks.train_alone(model, optimizer, resuming.STEPS - resuming.CUT, first=resuming.CUT)
    resuming.assert_result(folder, model, optimizer, exact=False)
