"""Hugging Face models over the layers; needs transformers (``pip install 'gdn2[models]'``)."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("transformers") is None:
    raise ImportError("gdn2.models needs transformers: pip install 'gdn2[models]'")

if TYPE_CHECKING:
    from gdn2.models.cache import Gdn2Cache
    from gdn2.models.configuration import Gdn2Config
    from gdn2.models.convert import export_weights, import_weights, to_gdn2
    from gdn2.models.foreign_config import import_config
    from gdn2.models.loading import load_checkpoint
    from gdn2.models.memory import Memory, load_memory, read_tokens
    from gdn2.models.mixers import MIXERS
    from gdn2.models.modeling import Gdn2ForCausalLM, Gdn2Model

# Imported when asked for: AutoConfig needs our configuration before a model can be imported.
_HOMES = {
    "MIXERS": "mixers",
    "Gdn2Cache": "cache",
    "Gdn2Config": "configuration",
    "Gdn2ForCausalLM": "modeling",
    "Gdn2Model": "modeling",
    "Memory": "memory",
    "export_weights": "convert",
    "import_config": "foreign_config",
    "import_weights": "convert",
    "load_checkpoint": "loading",
    "load_memory": "memory",
    "read_tokens": "memory",
    "to_gdn2": "convert",
}

__all__ = [
    "MIXERS",
    "Gdn2Cache",
    "Gdn2Config",
    "Gdn2ForCausalLM",
    "Gdn2Model",
    "Memory",
    "export_weights",
    "import_config",
    "import_weights",
    "load_checkpoint",
    "load_memory",
    "read_tokens",
    "to_gdn2",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
