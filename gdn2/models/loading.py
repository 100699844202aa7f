"""Find and load a checkpoint: a training run, one of its steps, or a Hugging Face folder."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.utils import logging

from gdn2.models.configuration import Gdn2Config
from gdn2.models.device import naming_full_memory
from gdn2.models.modeling import Gdn2ForCausalLM

STEP = re.compile(r"step_\d+")
REMEDY = "Copy it again, or take another step or final/"
DAMAGE = (  # how torch's reader fails on a broken file
    *(OSError, EOFError, RuntimeError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, PickleError),
)


def load_checkpoint(path: str | Path) -> tuple[Gdn2ForCausalLM, Path]:
    """Load a model on the CPU, ready for evaluation.

    Args:
        path: a run (its newest complete step, or ``final/`` where there is no step), a step
            folder, or a Hugging Face folder.

    Returns:
        ``(model, folder that was chosen)``. The folder may hold a tokenizer too.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: it holds no checkpoint of ours.
        RuntimeError: it holds one that is damaged.
    """
    folder = find_checkpoint(Path(path))
    try:
        config = Gdn2Config.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is wrong: {error}") from error
    if (folder / ".metadata").is_file():
        with torch.device("meta"):
            model = Gdn2ForCausalLM(config)
        with naming_full_memory(f"the model of {folder}"):
            model.to_empty(device="cpu")
        model.tie_weights()
        read_step(folder, {"model": model.state_dict()})
    else:
        model = _read_hugging_face(folder, config)
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise RuntimeError(f"cannot read {folder}: not finite: {_few(broken)}. {REMEDY}")
    return model.eval(), folder


def _read_hugging_face(folder: Path, config: Gdn2Config) -> Gdn2ForCausalLM:
    """Every weight of the model and nothing else; `from_pretrained` would draw what is missing."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of differences is ours
    logging.disable_progress_bar()
    try:
        with naming_full_memory(f"the model of {folder}"):
            loaded: Any = Gdn2ForCausalLM.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RuntimeError(f"cannot read {folder}: {str(error).rstrip('.')}. {REMEDY}") from error
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    model, report = loaded
    other = [name for name, *_ in report["mismatched_keys"]]
    for flaw, names in (
        ("does not hold", report["missing_keys"]),
        ("also holds", report["unexpected_keys"]),
        ("has another shape of", other),
    ):
        if names:
            raise RuntimeError(
                f"cannot read {folder}: it {flaw} {_few(sorted(names))}. Are config.json and the "
                "weights of one model?"
            )
    return model


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_step(folder: Path, state: dict[str, Any]) -> None:
    """Read what a training step saved under the keys of `state` into the tensors of `state`.

    Raises RuntimeError, naming `folder`, if it is damaged or does not hold them.
    """
    try:
        dcp.FileSystemReader(folder).read_metadata()  # `load` logs at length what it finds wrong
        with one_process():
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    except DAMAGE as error:
        raise RuntimeError(f"cannot read {folder}: {error!r}. {REMEDY}") from error


@contextmanager
def one_process() -> Iterator[None]:
    """No process group is meant, and an error is the one that happened, not a report of ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # a BaseException
            ((reason, _),) = error.failures.values()
            raise reason from error


def find_checkpoint(path: Path) -> Path:
    """The folder that `path` stands for: the newest step of a run, or the folder itself."""
    if not path.is_dir():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such folder")
    steps = [step for step in (path / "checkpoints").glob("step_*") if STEP.fullmatch(step.name)]
    if steps:
        path = max(steps, key=lambda step: int(step.name.removeprefix("step_")))
    elif (path / "final").is_dir():
        path = path / "final"
    config = path / "config.json"
    try:
        settings = json.loads(config.read_bytes()) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    model_type = settings.get("model_type") if isinstance(settings, dict) else settings
    if model_type is None:
        raise ValueError(
            f"no checkpoint in {path}: expected a run with checkpoints/step_* or final/, "
            "a step folder, or a Hugging Face folder with config.json"
        )
    if model_type != Gdn2Config.model_type:
        raise ValueError(f"{config} must have model_type 'gdn2', got {model_type!r}")
    return path
