"""Training: one run configuration, one loop. The loop itself is ``gdn2.train.loop.train``."""

from importlib.util import find_spec

_missing = [name for name in ("transformers", "rich", "matplotlib") if find_spec(name) is None]
if _missing:
    raise ImportError(f"gdn2.train needs {', '.join(_missing)}: pip install 'gdn2[train]'")

from gdn2.train.config import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    Run,
    ScheduleConfig,
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
    "override_all",
    "run_from_dict",
    "run_to_dict",
]
