"""Named runs: functions that return a complete ``Run``.

A comparison differs in one visible line, because every preset of a family is derived from one
function: ``paper_recipe`` (1.3B), ``demo_recipe`` (minutes on a CPU), ``prose_recipe`` (an hour).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches

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

HYBRID = ("gdn2", "sliding_attention")


def load_preset(name: str) -> Run:
    """The run called ``name``; ValueError names close ones."""
    if name not in PRESETS:
        close = ", ".join(get_close_matches(name, PRESETS) or PRESETS)
        raise ValueError(f"there is no preset {name!r}; close: {close}")
    return PRESETS[name]()


def paper_recipe(model: Gdn2Config) -> Run:
    """How arXiv 2605.22791 trains its 1.3B models: 100B tokens of 4096-token sequences."""
    return Run(
        model=model,
        data=DataConfig(sequence_length=4096, packing="concat"),
        optim=OptimConfig(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, max_grad_norm=1.0),
        schedule=ScheduleConfig(
            total_tokens=100_000_000_000,
            warmup_tokens=1_000_000_000,
            tokens_per_step=524_288,
            min_lr_ratio=0.1,
        ),
        parallel=ParallelConfig(micro_batch_size=1),
        checkpoint=CheckpointConfig(every_tokens=1_000_000_000),
        log=LogConfig(validate_every_tokens=1_000_000_000, validation_tokens=1_048_576),
        seed=3407,
    )


def gdn2_1p3b() -> Run:
    """Gated DeltaNet-2, recurrent."""
    return paper_recipe(_model_1p3b(["gdn2"], intermediate_size=6208))


def gdn2_1p3b_hybrid() -> Run:
    """Gated DeltaNet-2 in even layers, sliding-window attention in odd ones."""
    return paper_recipe(_model_1p3b([*HYBRID], intermediate_size=6784))


def debug() -> Run:
    """Seconds on a CPU: for trying things out, not for learning anything."""
    model = Gdn2Config(
        vocab_size=2048,
        hidden_size=32,
        num_hidden_layers=2,
        mixers=[*HYBRID],
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


def demo_gdn2() -> Run:
    return demo_recipe(_demo_model(["gdn2"], intermediate_size=384))


def demo_kda() -> Run:
    return demo_recipe(_demo_model(["kda"], intermediate_size=464))


def demo_gated_deltanet() -> Run:
    return demo_recipe(_demo_model(["gated_deltanet"], intermediate_size=464))


def demo_gdn2_hybrid() -> Run:
    return demo_recipe(_demo_model([*HYBRID], intermediate_size=448))


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
    return prose_recipe(_prose_model([*HYBRID], intermediate_size=736))


PRESETS: dict[str, Callable[[], Run]] = {
    preset.__name__: preset
    for preset in (
        gdn2_1p3b,
        gdn2_1p3b_hybrid,
        debug,
        demo_gdn2,
        demo_kda,
        demo_gated_deltanet,
        demo_gdn2_hybrid,
        prose_gdn2,
        prose_gdn2_hybrid,
    )
}


def _model_1p3b(mixers: list[str], *, intermediate_size: int) -> Gdn2Config:
    return Gdn2Config(
        vocab_size=32_000,
        hidden_size=2304,
        num_hidden_layers=18,
        mixers=mixers,
        num_heads=16,
        num_v_heads=16,
        head_k_dim=128,
        head_v_dim=128,
        num_attention_heads=18,
        attention_head_dim=128,
        sliding_window=2048,
        intermediate_size=intermediate_size,
        max_position_embeddings=4096,
    )


def _demo_model(mixers: list[str], *, intermediate_size: int) -> Gdn2Config:
    """The twins: one shape; the width of the MLP evens out the parameters."""
    return Gdn2Config(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=2,
        mixers=mixers,
        num_heads=4,
        num_v_heads=4,
        head_k_dim=32,
        head_v_dim=32,
        num_attention_heads=4,
        attention_head_dim=32,
        sliding_window=128,
        intermediate_size=intermediate_size,
        max_position_embeddings=256,
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
