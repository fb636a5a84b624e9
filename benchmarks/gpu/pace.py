"""How many steps of ``experiments/gpt-30m.toml`` fit into the time that is left. Its data are not needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median

import numpy as np

from gpu.device import Setting
from gpu.record import Record
from mada_lab.optimizers.build import build
from mada_lab.run.config import resolve
from mada_lab.sweep.experiment_file import load
from mada_lab.tasks.tokens import TokensConfig
from mada_lab.tasks.windows import WindowsTask

FILE = Path(__file__).parents[2] / "experiments" / "gpt-30m.toml"
VOCABULARY = 50_304
STEPS = 8
AROUND = 14.0  # seconds of a run that are no steps: the model, three validations, a checkpoint
MINUTES = (4, 5, 6)


def run(setting: Setting, record: Record) -> None:
    experiment, device = load(FILE), setting.device
    tokens = np.random.default_rng(0).integers(0, 100 if setting.small else VOCABULARY, 1 << 16, dtype=np.uint16)
    total, runs = 0.0, 0
    for label in experiment.contenders:
        with record.check(label) as values:
            config = resolve(dataclasses.replace(experiment.config(label), device=device.name))
            assert isinstance(config.task, TokensConfig)
            small = {"layers": 1, "heads": 2, "width": 16, "context": 8, "batch": 2} if setting.small else {}
            task = WindowsTask(
                dataclasses.replace(config.task, **small), 100 if setting.small else VOCABULARY, tokens, tokens
            )
            model = task.model(0).to(device.name)
            optimizer = build(config.optimizer, model)
            times = []
            for step in range(STEPS):
                device.synchronize()
                began = device.now()
                optimizer.zero_grad()
                task.loss(model, task.batch(0, step)).backward()
                optimizer.step()
                device.synchronize()
                times.append(device.now() - began)
            seconds = median(times[STEPS // 2 :])
            here = len(experiment.tune(label))
            total, runs = total + here * seconds, runs + here
            values |= {
                "ms a step": 1e3 * seconds,
                "runs": here,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
    for minutes in MINUTES:
        steps = max(0, int((60 * minutes - runs * AROUND) / total)) if total else 0
        record.row(f"in {minutes} minutes", steps=steps, option=f"--set steps={steps}")
