"""Find and load a checkpoint: a training run, one of its steps, or a Hugging Face folder."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoTokenizer

from gdn2.models.configuration import Gdn2Config
from gdn2.models.modeling import Gdn2ForCausalLM

STEP = re.compile(r"step_\d+")


def load_checkpoint(path: str | Path) -> tuple[Gdn2ForCausalLM, Any, Path]:
    """Load a model, and its tokenizer if there is one, on the CPU, ready for evaluation.

    Args:
        path: a run (its newest complete step, or ``final/`` where there is no step), a step
            folder, or a Hugging Face folder.

    Returns:
        ``(model, tokenizer or None, folder that was chosen)``.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: it holds no checkpoint of ours.
    """
    folder = find_checkpoint(Path(path))
    config = Gdn2Config.from_pretrained(folder)
    if (folder / ".metadata").is_file():
        model = _load_step(folder, config)
    else:
        model = Gdn2ForCausalLM.from_pretrained(folder, config=config)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    return model.eval(), tokenizer, folder


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
    model_type = json.loads(config.read_text()).get("model_type") if config.is_file() else None
    if model_type is None:
        raise ValueError(
            f"no checkpoint in {path}: expected a run with checkpoints/step_* or final/, "
            "a step folder, or a Hugging Face folder with config.json"
        )
    if model_type != Gdn2Config.model_type:
        raise ValueError(f"{config} must have model_type 'gdn2', got {model_type!r}")
    return path


def _load_step(folder: Path, config: Gdn2Config) -> Gdn2ForCausalLM:
    with torch.device("meta"):
        model = Gdn2ForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    return model
