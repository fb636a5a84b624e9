"""What a run has stored, read again: to go on with it, or to begin another one with its weights."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from mada_optim.tasks import InputError

CONFIG, CHECKPOINT, RESULT = "config.json", "checkpoint.pt", "result.json"

# What reading a damaged checkpoint may raise.
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return values


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state that was saved, on the CPU. Raises ValueError, which says why, where it is not whole."""
    try:
        # torch.load does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} in it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"step", "model", "optimizer"} <= state.keys():
            raise ValueError("it does not hold a step, a model and an optimizer")
    except _UNREADABLE as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error
    return state
