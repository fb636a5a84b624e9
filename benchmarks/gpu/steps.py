"""What a step costs by itself, by AdamW's: by the clock, on the device, in the program. AdamW comes first and last."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from gpu.device import Setting
from gpu.optimizers import timed_contenders
from gpu.record import Record
from gpu.timing import StepTime, time_step
from mada_lab.bench.workloads import WORKLOADS, Tensors, Workload

WARM = 3  # steps in which all is compiled

# At most, by AdamW's: device, clock.
GPT2_BARS = {"MADA, everything": (2.9, 2.9), "MADA, nothing learned (Adam)": (0.9, 1.2)}


def workload(letter: str, setting: Setting) -> Workload:
    """Return a workload of ``mada bench``, or a tiny one in its place."""
    if setting.small:
        return Tensors(setting.device.name, "tiny", [(3,), (8, 5)])
    return WORKLOADS[letter](setting.device.name)


def run(setting: Setting, record: Record, letter: str, bars: Mapping[str, tuple[float, float]]) -> None:
    tensors = workload(letter, setting)
    adamw, *others = timed_contenders()
    reference: StepTime | None = None
    for contender in (adamw, *others, adamw):
        ratios: dict[str, float] = {}
        with record.check(contender.name) as values:
            running = tensors.start(contender)
            assert running is not None
            for _ in range(WARM):
                running.step()
            taken = time_step(running.step, setting.device, **setting.repeats)
            values |= taken.values()
            if contender is adamw:
                reference = reference or taken
            assert reference is not None, "AdamW was not timed"
            ratios["device by AdamW's"] = taken.device / reference.device
            ratios["clock by AdamW's"] = taken.clock / reference.clock
            values |= ratios
        for (what, ratio), bar in zip(ratios.items(), bars.get(contender.name, ()), strict=False):
            record.bar(f"{contender.name}, {what}", ratio, bar)


gpt2 = partial(run, letter="b", bars=GPT2_BARS)
one_tensor = partial(run, letter="a", bars={})
