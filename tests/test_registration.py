"""`import gdn2` is light, and yet transformers knows our classes (each in a fresh interpreter)."""

import subprocess
import sys

import pytest

CONFIG = """
config = AutoConfig.for_model(
    "gdn2", vocab_size=10, hidden_size=8, num_hidden_layers=1, num_heads=1, intermediate_size=8
)
assert type(config).__name__ == "Gdn2Config"
config.save_pretrained(sys.argv[1])
assert AutoConfig.from_pretrained(sys.argv[1]).hidden_size == 8
"""

MODEL = """
from gdn2.models import Gdn2Config
config = Gdn2Config(
    vocab_size=10, hidden_size=8, num_hidden_layers=1, num_heads=1, intermediate_size=8
)
assert type({auto}.from_config(config)).__name__ == "{ours}"
"""

USES = {
    "AutoConfig": CONFIG,
    "AutoModel": MODEL.format(auto="AutoModel", ours="Gdn2Model"),
    "AutoModelForCausalLM": MODEL.format(auto="AutoModelForCausalLM", ours="Gdn2ForCausalLM"),
}

# What else transformers may be half-way through when it imports the Auto classes.
BEFORE = ["PreTrainedModel", "AutoTokenizer"]

LIGHT = """
import sys
import gdn2
assert not {"torch", "transformers"} & set(sys.modules)
import gdn2.layers
assert "transformers" not in sys.modules
"""

TOO_OLD = """
import sys, warnings
import gdn2
sys.modules["gdn2.models.cache"] = None  # importing it is an ImportError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers import AutoModel
(warning,) = [w for w in caught if "gdn2" in str(w.message)]
assert "gdn2.models.cache" in str(warning.message), warning.message
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


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "will not know gdn2" not in done.stderr


@pytest.mark.parametrize("auto", USES)
@pytest.mark.parametrize("first", ["gdn2", "transformers"])
def test_each_auto_class_alone_knows_gdn2(first, auto, tmp_path):
    imports = ["import gdn2", f"from transformers import {auto}"]
    ordered = imports if first == "gdn2" else imports[::-1]
    run("\n".join(["import sys", *ordered]) + USES[auto], tmp_path)


@pytest.mark.parametrize("name", BEFORE)
def test_whatever_transformers_imports_first(name, tmp_path):
    code = f"import sys, gdn2\nfrom transformers import {name}\nfrom transformers import AutoConfig"
    run(code + CONFIG + "from transformers import AutoModel" + USES["AutoModel"], tmp_path)


@pytest.mark.parametrize(
    "code",
    [LIGHT, WITHOUT_TRANSFORMERS, TOO_OLD],
    ids=["light", "no transformers", "too old a transformers"],
)
def test_registration_costs_nothing_and_breaks_nothing(code):
    run(code)
