"""Text to token shards, and token shards to training samples. Imports no model."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

_missing = [name for name in ("numpy", "pyarrow", "rich", "tokenizers") if find_spec(name) is None]
if _missing:
    raise ImportError(f"gdn2.data needs {', '.join(_missing)}: pip install 'gdn2[data]'")

from gdn2.data.dataset import TokenDataset  # noqa: E402
from gdn2.data.pipeline import prepare  # noqa: E402
from gdn2.data.shards import Manifest, load_manifest  # noqa: E402
from gdn2.data.tokenize import Encoder, load_encoder  # noqa: E402

if TYPE_CHECKING:
    from gdn2.data.loader import Batch, Samples

__all__ = [
    "Batch",
    "Encoder",
    "Manifest",
    "Samples",
    "TokenDataset",
    "load_encoder",
    "load_manifest",
    "prepare",
]


def __getattr__(name: str) -> object:
    if name in ("Batch", "Samples"):  # these alone need torch, which preparing workers do not
        from gdn2.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
