"""Hugging Face models over the layers; needs transformers (``pip install 'gdn2[models]'``)."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("gdn2.models needs transformers: pip install 'gdn2[models]'")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gdn2.models.cache import Gdn2Cache
from gdn2.models.configuration import Gdn2Config
from gdn2.models.loading import load_checkpoint
from gdn2.models.mixers import MIXERS
from gdn2.models.modeling import Gdn2ForCausalLM, Gdn2Model

AutoConfig.register("gdn2", Gdn2Config, exist_ok=True)
AutoModel.register(Gdn2Config, Gdn2Model, exist_ok=True)
AutoModelForCausalLM.register(Gdn2Config, Gdn2ForCausalLM, exist_ok=True)

__all__ = [
    "MIXERS",
    "Gdn2Cache",
    "Gdn2Config",
    "Gdn2ForCausalLM",
    "Gdn2Model",
    "load_checkpoint",
]
