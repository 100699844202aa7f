"""Checkpoints that are complete or absent.

A step is written beside its final name (``step_00000100.tmp``), synced to the disk and renamed,
so whatever is called ``step_NNNNNNNN`` is complete. Old steps are renamed back before they are
deleted, for the same reason. Model and optimizer go through PyTorch's distributed checkpoint
format, which needs no process group for one process and reshards for many.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from gdn2.data import durable
from gdn2.data.durable import UNFINISHED
from gdn2.models.loading import one_process, read_step


class Checkpoints:
    """The steps of one run, in one folder; the newest ``keep`` of them are kept."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step_(\d{8,})", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def tidy(self) -> None:
        """Delete the oldest beyond ``keep``, and what a killed process left half-done."""
        for old in self.steps()[: -self.keep]:
            self.path(old).rename(self.path(old).with_suffix(UNFINISHED))
        for path in self.folder.glob("step_*" + UNFINISHED):
            shutil.rmtree(path)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tokens: int,
        write_more: Callable[[Path], None],
    ) -> None:
        """Write ``step``, unless it is there, and tidy.

        ``write_more(folder)`` adds what makes the folder readable on its own.
        """
        if self.path(step).exists():
            return

        def write(folder: Path) -> None:
            state = _state(model, optimizer, step, tokens)
            with one_process():
                dcp.save(state, checkpoint_id=folder, no_dist=True)
            write_more(folder)

        write_folder(self.path(step), write)
        self.tidy()

    def load(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put ``step`` into the model, the optimizer and torch's random generator."""
        state = _state(model, optimizer, step, tokens=0)
        read_step(self.path(step), state)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        torch.set_rng_state(state["trainer"]["rng"])


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, tokens: int
) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    trainer = {"step": step, "tokens": tokens, "rng": torch.get_rng_state()}
    return {"model": model_state, "optimizer": optimizer_state, "trainer": trainer}


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder that is called ``target`` once it is complete on the disk."""
    try:
        durable.write_folder(target, write)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"cannot write {target}: {error}") from error
