"""Where a run executes: the device, the memory and the precision of its arithmetic there."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from gdn2.data import Batch
from gdn2.models.device import naming_full_memory, prepare_device

__all__ = ["autocast", "keep_freed_memory", "naming_full_memory", "prepare_device", "to_device"]

# glibc's mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_TRIM_THRESHOLD, _MOST_MMAP_THRESHOLD = 2**31 - 1, 32 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed; elsewhere nothing happens.

    By default large blocks go back to the system, and every training step pays page faults for
    getting them again: 5 to 10% of a small model's time.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST_TRIM_THRESHOLD)
        mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products over fp32 weights on a GPU; plain fp32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``, copied without waiting for the device."""
    if device.type == "cpu":
        return batch

    def send(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    packed = None if batch.cu_seqlens is None else send(batch.cu_seqlens)
    return Batch(send(batch.tokens), send(batch.labels), packed)
