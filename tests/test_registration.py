"""`import gdn2` is light, and yet transformers knows our classes (each in a fresh interpreter)."""

import subprocess
import sys

import pytest

CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model(
    "gdn2", vocab_size=10, hidden_size=8, num_hidden_layers=1, num_heads=1, intermediate_size=8
)
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "Gdn2ForCausalLM"
"""

LIGHT = """
import sys
import gdn2
assert not {"torch", "transformers"} & set(sys.modules)
import gdn2.layers
assert "transformers" not in sys.modules
from transformers import LlamaForCausalLM  # imports the Auto classes half-way
"""

WITHOUT_TRANSFORMERS = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "transformers" else find(name, *rest)
try:
    import gdn2.models
except ImportError as error:
    assert "pip install 'gdn2[models]'" in str(error), error
else:
    raise SystemExit("imported")
"""


@pytest.mark.parametrize(
    "code",
    [
        LIGHT + CHECK,
        "from transformers import AutoModelForCausalLM\nimport gdn2" + CHECK,
        WITHOUT_TRANSFORMERS,
    ],
    ids=["gdn2 first", "transformers first", "no transformers"],
)
def test_registration(code):
    subprocess.run([sys.executable, "-c", code], check=True)
