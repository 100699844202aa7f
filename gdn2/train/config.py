"""What a training run is: frozen, validated, written in tokens.

Steps are derived. ``total_tokens`` and ``warmup_tokens`` round up to whole steps; only
``tokens_per_step`` must divide by micro-batch x sequence x ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from typing import Any, Literal, get_type_hints

from gdn2.models import Gdn2Config
from gdn2.train.settings import conform, parse

MOST_TOKENS = 2**31 - 1  # of a step: packed sequences are counted in int32


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sequence_length: int
    packing: Literal["packed", "concat"] = "packed"
    """packed: the state restarts at every document; concat: it runs on across documents."""

    def __post_init__(self) -> None:
        _positive("data", self, "sequence_length")
        if self.packing not in ("packed", "concat"):
            raise ValueError(f"data.packing must be 'packed' or 'concat', got {self.packing!r}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    """True: decay gates' scalars, biases and norms too, as the official GDN-2 code does."""
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "eps", "max_grad_norm")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optim.weight_decay must be finite and at least 0, got {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    total_tokens: int
    warmup_tokens: int
    tokens_per_step: int
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _positive("schedule", self, "total_tokens", "tokens_per_step")
        if self.tokens_per_step > MOST_TOKENS:
            raise ValueError(
                f"schedule.tokens_per_step must be at most {MOST_TOKENS:,}, "
                f"got {self.tokens_per_step:,}"
            )
        if not 0 <= self.warmup_tokens <= self.total_tokens:
            raise ValueError(
                f"schedule.warmup_tokens must lie between 0 and total_tokens "
                f"{self.total_tokens:,}, got {self.warmup_tokens:,}"
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"schedule.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one step is cut up. It changes the rounding of a step, not the step."""

    micro_batch_size: int
    """Sequences in one forward pass of one rank."""
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _positive("parallel", self, "micro_batch_size")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_tokens: int
    keep: int = 2

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every_tokens", "keep")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 10
    """Between two printed lines where there is no terminal, and between two means of the gates.

    All else is in metrics.jsonl for every step."""
    validate_every_tokens: int | None = None
    validation_tokens: int = 65_536

    def __post_init__(self) -> None:
        _positive("log", self, "every_steps", "validation_tokens")
        if self.validate_every_tokens is not None:
            _positive("log", self, "validate_every_tokens")


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Gdn2Config
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        self.micro_batches(ranks=1)

    @property
    def total_steps(self) -> int:
        return self.steps(self.schedule.total_tokens)

    @property
    def warmup_steps(self) -> int:
        return self.steps(self.schedule.warmup_tokens)

    @property
    def sequences_per_step(self) -> int:
        return self.schedule.tokens_per_step // self.data.sequence_length

    def steps(self, tokens: int) -> int:
        """Whole steps that hold at least ``tokens``."""
        return -(-tokens // self.schedule.tokens_per_step)

    def micro_batches(self, ranks: int) -> int:
        """Forward passes of one rank in one step."""
        tokens = self.parallel.micro_batch_size * self.data.sequence_length * ranks
        if self.schedule.tokens_per_step % tokens:
            raise ValueError(
                f"schedule.tokens_per_step must be a multiple of parallel.micro_batch_size x "
                f"data.sequence_length x ranks = {self.parallel.micro_batch_size} x "
                f"{self.data.sequence_length} x {ranks} = {tokens:,}, "
                f"got {self.schedule.tokens_per_step:,}"
            )
        return self.schedule.tokens_per_step // tokens


def run_to_dict(run: Run) -> dict[str, Any]:
    """The resolved run as JSON types; ``run_from_dict`` is its inverse."""
    tree: dict[str, Any] = {}
    for name, kind in _RUN_KINDS.items():
        section, kinds = getattr(run, name), _section_kinds(kind)
        tree[name] = {key: getattr(section, key) for key in kinds} if kinds else section
    return json.loads(json.dumps(tree))


def run_from_dict(tree: Mapping[str, Any]) -> Run:
    """The run that ``run_to_dict`` wrote; unknown keys and wrong types raise ValueError."""
    sections = {}
    for name, value in tree.items():
        kind = _kind_of(_RUN_KINDS, name, "Run")
        kinds = _section_kinds(kind)
        if kinds:
            value = {
                key: conform(item, _kind_of(kinds, key, name), f"{name}.{key}")
                for key, item in value.items()
            }
        sections[name] = kind(**value) if kinds else conform(value, kind, name)
    return Run(**sections)


def override_all(run: Run, assignments: Iterable[str]) -> Run:
    """The run with every ``a.b=value`` applied together, so that their order does not matter."""
    tree, given = run_to_dict(run), set()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"an override is written a.b=value, got {assignment!r}")
        if path in given:
            raise ValueError(f"{path} is given twice")
        given.add(path)
        section, _, name = path.partition(".")
        kind = _kind_of(_RUN_KINDS, section, "Run")
        kinds = _section_kinds(kind)
        if kinds and not name:
            raise ValueError(f"{section} is a section; set one of {section}.{{{', '.join(kinds)}}}")
        if name and not kinds:
            raise ValueError(f"{section} is a single value, it has no field {name!r}")
        if kinds:
            tree[section][name] = parse(text, _kind_of(kinds, name, section), path)
        else:
            tree[section] = parse(text, kind, path)
    return run_from_dict(tree)


_RUN_KINDS = get_type_hints(Run)


def _section_kinds(kind: Any) -> dict[str, Any]:
    """Name and annotation of a section's settings; none for a single value.

    The model's are those of ``Gdn2Config.__init__``, without the keywords of Hugging Face.
    """
    if kind is Gdn2Config:
        hints = get_type_hints(Gdn2Config.__init__)
        return {name: hints[name] for name in signature(Gdn2Config).parameters if name != "kwargs"}
    return get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}


def _kind_of(kinds: Mapping[str, Any], name: str, owner: str) -> Any:
    if name not in kinds:
        close = ", ".join(get_close_matches(name, kinds) or kinds)
        raise ValueError(f"{owner} has no field {name!r}; close: {close}")
    return kinds[name]


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            value = getattr(config, name)
            raise ValueError(f"{section}.{name} must be finite and above 0, got {value}")
