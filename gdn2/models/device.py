"""The device that a model runs on, checked before anything is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def prepare_device(name: str) -> torch.device:
    """The device called `name`; ValueError where this machine does not have it."""
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
    # Products that autocast leaves in fp32 (gates, states, norms) are fp32: no TF32.
    torch.set_float32_matmul_precision("highest")
    return device


@contextmanager
def naming_full_memory(what: str) -> Iterator[None]:
    """Where there is no room for `what`, a MemoryError says so; torch's own type depends."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        raise MemoryError(f"no memory for {what}: {text}") from error
