"""Training: one run configuration, one loop. The loop itself is ``gdn2.train.loop.train``."""

from gdn2.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    ScheduleConfig,
    override,
    override_all,
    run_from_dict,
    run_to_dict,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "LogConfig",
    "OptimConfig",
    "ParallelConfig",
    "Run",
    "ScheduleConfig",
    "override",
    "override_all",
    "run_from_dict",
    "run_to_dict",
]
