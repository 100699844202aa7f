"""Named runs: ``PRESETS`` maps a name to a function that returns a complete ``Run``.

The comparison is a table: the `SYSTEMS` at all `SIZES`, the recurrent ones also as hybrids, with
the `MLP_WIDTHS` that even out their parameters. One recipe trains all of a size: ``paper_recipe``,
or ``demo_recipe`` (minutes on a CPU). ``debug`` takes seconds, ``prose_recipe`` an hour on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from gdn2.models import Gdn2Config
from gdn2.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    ScheduleConfig,
)


def load_preset(name: str) -> Run:
    """The run called ``name``; ValueError names close ones."""
    if name not in PRESETS:
        close = ", ".join(get_close_matches(name, PRESETS))
        _, *sizes = SIZES
        others = (
            f"SYSTEM_SIZE[_hybrid], demo_SYSTEM[_hybrid], prose_gdn2[_hybrid], debug; "
            f"SYSTEM is one of {', '.join(SYSTEMS)}, SIZE one of {', '.join(sizes)}"
        )
        raise ValueError(f"there is no preset {name!r}; {f'close: {close}' if close else others}")
    return PRESETS[name]()


def paper_recipe(
    model: Gdn2Config,
    *,
    total_tokens: int = 100_000_000_000,
    lr: float = 4e-4,
    tokens_per_step: int = 524_288,
    micro_batch_size: int = 1,
) -> Run:
    """How arXiv 2605.22791 trains its 1.3B models: 100B tokens of 4096-token sequences."""
    hundredth = total_tokens // 100
    return Run(
        model=model,
        data=DataConfig(sequence_length=4096, packing="concat"),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0),
        schedule=ScheduleConfig(
            total_tokens=total_tokens,
            warmup_tokens=hundredth,
            tokens_per_step=tokens_per_step,
            min_lr_ratio=0.1,
        ),
        parallel=ParallelConfig(micro_batch_size=micro_batch_size),
        checkpoint=CheckpointConfig(every_tokens=hundredth),
        log=LogConfig(validate_every_tokens=hundredth, validation_tokens=1_048_576),
        seed=3407,
    )


def demo_recipe(model: Gdn2Config) -> Run:
    """About two minutes on two CPU cores: many small steps of a shallow model."""
    return Run(
        model=model,
        data=DataConfig(sequence_length=256),
        optim=OptimConfig(lr=6e-3),
        schedule=ScheduleConfig(total_tokens=1_310_720, warmup_tokens=32_768, tokens_per_step=2048),
        parallel=ParallelConfig(micro_batch_size=8),
        checkpoint=CheckpointConfig(every_tokens=163_840),
        log=LogConfig(validate_every_tokens=163_840, validation_tokens=16_384),
    )


def prose_recipe(model: Gdn2Config) -> Run:
    """About an hour on two CPU cores, for 10 MB of text or more."""
    return Run(
        model=model,
        data=DataConfig(sequence_length=512),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(
            total_tokens=7_372_800, warmup_tokens=204_800, tokens_per_step=4096
        ),
        parallel=ParallelConfig(micro_batch_size=8),
        checkpoint=CheckpointConfig(every_tokens=184_320),
        log=LogConfig(validate_every_tokens=368_640, validation_tokens=65_536),
    )


def prose_gdn2() -> Run:
    return prose_recipe(_prose_model(["gdn2"], intermediate_size=640))


def prose_gdn2_hybrid() -> Run:
    return prose_recipe(_prose_model(["gdn2", "sliding_attention"], intermediate_size=736))


def debug() -> Run:
    """Seconds on a CPU: for trying things out, not for learning anything."""
    model = Gdn2Config(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=2,
        mixers=["gdn2", "sliding_attention"],
        num_heads=2,
        num_v_heads=2,
        head_k_dim=16,
        head_v_dim=16,
        num_attention_heads=2,
        attention_head_dim=16,
        sliding_window=32,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    run = demo_recipe(model)
    return replace(
        run,
        data=replace(run.data, sequence_length=64),
        schedule=ScheduleConfig(total_tokens=20_480, warmup_tokens=2048, tokens_per_step=1024),
        parallel=ParallelConfig(micro_batch_size=8),
        checkpoint=CheckpointConfig(every_tokens=10_240),
        log=LogConfig(validate_every_tokens=10_240, validation_tokens=1024),
    )


def _prose_model(mixers: list[str], *, intermediate_size: int) -> Gdn2Config:
    return Gdn2Config(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        mixers=mixers,
        num_heads=4,
        num_v_heads=4,
        head_k_dim=64,
        head_v_dim=64,
        num_attention_heads=4,
        attention_head_dim=64,
        sliding_window=256,
        intermediate_size=intermediate_size,
        max_position_embeddings=512,
    )


class System(NamedTuple):
    """A mixer for all layers; in a hybrid every other layer is sliding-window attention."""

    mixer: str
    mimo_rank: int = 1


SYSTEMS = {
    "gdn2": System("gdn2"),
    "gated_deltanet": System("gated_deltanet"),
    "kda": System("kda"),
    "deltanet": System("deltanet"),
    "mamba2": System("mamba2"),
    "mamba3_siso": System("mamba3"),
    "mamba3_mimo": System("mamba3", mimo_rank=4),
    "transformer": System("full_attention"),
    "sliding_window": System("sliding_attention"),
}


class Size(NamedTuple):
    """The shape that all systems of a size share, and how they are trained.

    The recurrent state is the same for all: heads x channels^2 = Mamba's inner size x state size.
    """

    hidden_size: int
    num_layers: int
    delta: tuple[int, int]  # heads, channels of a head
    attention: tuple[int, int]  # the same
    mamba: tuple[int, int, int]  # inner size, channels of a head, state size
    recipe: Callable[[Gdn2Config], Run]
    vocab_size: int = 32_000
    length: int = 4096


def _shorter(
    total_tokens: int, lr: float, tokens_per_step: int = 524_288
) -> Callable[[Gdn2Config], Run]:
    return partial(
        paper_recipe,
        total_tokens=total_tokens,
        lr=lr,
        tokens_per_step=tokens_per_step,
        micro_batch_size=4,
    )


# The paper has no models below 1.3B. What is said of them here is our choice: 40 to 50 tokens a
# parameter of the blocks, a higher learning rate for a smaller model, and for the smallest a
# smaller step.
SIZES = {
    "demo": Size(128, 2, (4, 32), (4, 32), (128, 32, 32), demo_recipe, 2048, 256),
    "20m": Size(384, 10, (6, 64), (6, 64), (768, 64, 32), _shorter(1_000_000_000, 2e-3, 65_536)),
    "125m": Size(768, 14, (6, 128), (6, 128), (1536, 64, 64), _shorter(5_000_000_000, 1e-3)),
    "350m": Size(1024, 22, (8, 128), (8, 128), (2048, 64, 64), _shorter(15_000_000_000, 6e-4)),
    "1p3b": Size(2304, 18, (16, 128), (18, 128), (4096, 64, 64), paper_recipe),
}

# Recurrent and hybrid, in the order of SIZES; attention has one form, matched with the hybrids.
# The multiples of 64 (1.3B) or 16 that bring the blocks closest to the parameters of GDN-2's;
# DeltaNet has those of Gated DeltaNet.
MLP_WIDTHS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gdn2": ((384, 448), (1024, 1200), (2048, 2384), (2752, 3184), (6208, 6784)),
    "gated_deltanet": ((464, 496), (1232, 1312), (2464, 2592), (3264, 3440), (7040, 7232)),
    "kda": ((464, 496), (1280, 1328), (2560, 2640), (3424, 3520), (7552, 7488)),
    "deltanet": ((464, 496), (1232, 1312), (2464, 2592), (3264, 3440), (7040, 7232)),
    "mamba2": ((528, 528), (1088, 1232), (2176, 2448), (2864, 3248), (6336, 6848)),
    "mamba3_siso": ((528, 528), (1072, 1232), (2144, 2432), (2848, 3232), (6272, 6784)),
    "mamba3_mimo": ((464, 480), (1008, 1184), (2016, 2368), (2704, 3168), (6144, 6720)),
    "transformer": ((512,), (1376,), (2720,), (3616,), (7360,)),
    "sliding_window": ((512,), (1376,), (2720,), (3616,), (7360,)),
}


def _compared_run(system: str, size: str, *, hybrid: bool) -> Run:
    mixer, mimo_rank = SYSTEMS[system]
    shape = SIZES[size]
    heads, channels = shape.delta
    inner_size, mamba_channels, state_size = shape.mamba
    model = Gdn2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        mixers=[mixer, "sliding_attention"] if hybrid else [mixer],
        num_heads=heads,
        num_v_heads=heads,
        head_k_dim=channels,
        head_v_dim=channels,
        mamba_inner_size=inner_size,
        mamba_head_dim=mamba_channels,
        state_size=state_size,
        mimo_rank=mimo_rank,
        num_attention_heads=shape.attention[0],
        attention_head_dim=shape.attention[1],
        sliding_window=shape.length // 2,
        intermediate_size=_widths(system, size)[hybrid],
        max_position_embeddings=shape.length,
    )
    return shape.recipe(model)


def _widths(system: str, size: str) -> tuple[int, ...]:
    return dict(zip(SIZES, MLP_WIDTHS[system], strict=True))[size]


def preset_name(system: str, size: str, *, hybrid: bool) -> str:
    """What the preset of a system at a size is called, if there is one."""
    name = f"demo_{system}" if size == "demo" else f"{system}_{size}"
    return f"{name}_hybrid" if hybrid else name


def _compared_runs(size: str) -> dict[str, Callable[[], Run]]:
    """All systems of a size, then the hybrids."""
    return {
        preset_name(system, size, hybrid=hybrid): partial(
            _compared_run, system, size, hybrid=hybrid
        )
        for hybrid in (False, True)
        for system in SYSTEMS
        if hybrid < len(_widths(system, size))
    }


PRESETS: dict[str, Callable[[], Run]] = {
    "debug": debug,
    **_compared_runs("demo"),
    "prose_gdn2": prose_gdn2,
    "prose_gdn2_hybrid": prose_gdn2_hybrid,
    **_compared_runs("20m"),
    **_compared_runs("125m"),
    **_compared_runs("350m"),
    **_compared_runs("1p3b"),
}
