"""Scores and samples of a trained model."""

from importlib.util import find_spec

_NEEDED = ("transformers", "numpy", "pyarrow", "tokenizers", "rich", "matplotlib")
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(f"gdn2.evals needs {', '.join(_missing)}: pip install 'gdn2[eval]'")
