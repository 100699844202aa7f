"""Memory and time of decoding a token behind a context: states beside a cache of keys and values.

Three models of one size: all recurrent, half sliding-window attention, and transformers' Llama with
full attention. The context is made directly, as random states or keys and values, and then tokens
are decoded one by one. Each case runs in a process of its own: its peak is that of the whole
process, or on a CUDA device of what torch allocated. What would not fit in the free memory is left
out. Each case adds a row to the CSV file, with the bytes in its name.
"""

import sys
import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.process import apart, free_bytes, peak_bytes
from benchmarks.timing import Timing, add_csv, append, command_line, parse, show_table, wait
from gdn2.models import Gdn2Config, Gdn2ForCausalLM, read_tokens
from gdn2.presets import load_preset

MODELS = {"gdn2": ["gdn2"], "hybrid": ["gdn2", "sliding_attention"], "llama": None}
CONTEXTS = tuple(2**n for n in range(10, 19))  # 1K ... 256K
PICTURE = Path(__file__).parents[1] / "docs" / "decode_memory.png"
WARM_UP = 3
MB = 1e6
EXAMPLES = """examples:
  python -m benchmarks.decode_memory
  python -m benchmarks.decode_memory gdn2_1p3b --device cuda
  python -m benchmarks.decode_memory --contexts 1024 8192 --csv /tmp/r.csv --png /tmp/r.png
"""


class Context(NamedTuple):
    """A case: a model behind T tokens; cache and peak in bytes, the peak None where unknown."""

    T: int
    parameters: int
    cache: int
    peak: int | None

    @property
    def name(self) -> str:
        return f"B=1 T={self.T} parameters={self.parameters} cache={self.cache} peak={self.peak}"


@torch.no_grad()
def measure(
    config: Gdn2Config, name: str, T: int, *, tokens: int, device: torch.device, threads: int
) -> Timing | None:
    """Decode behind T tokens; None if that would not fit."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name == "llama" and _room(device) < 2 * _key_value_bytes(config, T, dtype):
        return None
    model = build(config, name).to(device, dtype).eval()
    cache = _llama_context(model, T) if name == "llama" else _context(model, T)
    token, seconds = torch.zeros(1, 1, dtype=torch.long, device=device), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_UP + tokens):
        wait(device)
        started = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        wait(device)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[WARM_UP:]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    nbytes = sum(x.nbytes for x in _tensors(cache))
    return Timing.of(Context(T, parameters, nbytes, _peak(device)), name, "decode", seconds)


def build(config: Gdn2Config, name: str) -> Any:
    """One of `MODELS`, with the sizes of `config`."""
    if name != "llama":
        config = copy(config)
        config.mixers = MODELS[name]
        return Gdn2ForCausalLM(config)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            max_position_embeddings=2 * max(CONTEXTS),
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


def _context(model: Gdn2ForCausalLM, T: int) -> Any:
    """Random states as they are behind T tokens."""
    cache = read_tokens(model, torch.zeros(1, 1, dtype=torch.long, device=model.device)).cache
    cache = cache.select(torch.zeros(1, dtype=torch.long, device=model.device))
    for i, state in enumerate(cache.states):
        tensors = {name: x for name, x in state._asdict().items() if isinstance(x, Tensor)}
        cache.states[i] = state._replace(
            **{
                name: torch.randn_like(x) if x.is_floating_point() else torch.full_like(x, T)
                for name, x in tensors.items()
            }
        )
    return cache


def _llama_context(model: LlamaForCausalLM, T: int) -> DynamicCache:
    """Random keys and values of T tokens."""
    config, cache = model.config, DynamicCache()
    shape = (1, config.num_key_value_heads, T, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def _tensors(cache: Any) -> list[Tensor]:
    if isinstance(cache, DynamicCache):
        return [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return [x for state in cache.states for x in state if isinstance(x, Tensor)]


def _key_value_bytes(config: Gdn2Config, T: int, dtype: torch.dtype) -> int:
    width = config.num_attention_heads * config.attention_head_dim
    return 2 * config.num_hidden_layers * width * T * dtype.itemsize


def _room(device: torch.device) -> float:
    """Free bytes, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_bytes() or float("inf")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


def show(timings: Sequence[Timing]) -> None:
    table = Table("context", "model")
    for heading in ("cache MB", "peak MB", "min ms/token", "median ms/token"):
        table.add_column(heading, justify="right")
    for t in timings:
        peak = "" if t.case.peak is None else f"{t.case.peak / MB:.0f}"
        times = (f"{t.min_ms:.2f}", f"{t.median_ms:.2f}")
        table.add_row(f"{t.case.T:,}", t.backend, f"{t.case.cache / MB:.2f}", peak, *times)
    show_table(table)


def draw(timings: Sequence[Timing], path: Path, title: str) -> None:
    """Cache, peak and time over the context, a line for each model."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title)
    wanted: dict[str, Callable[[Timing], float | None]] = {
        "cache, MB": lambda t: t.case.cache / MB,
        "peak memory, MB": lambda t: None if t.case.peak is None else t.case.peak / MB,
        "time per token, ms": lambda t: t.median_ms,
    }
    for axes, (label, value) in zip(figure.subplots(1, 3), wanted.items(), strict=True):
        for name in dict.fromkeys(t.backend for t in timings):
            points = [(t.case.T, value(t)) for t in timings if t.backend == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(yscale="log", xlabel="tokens of context", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None, call: Callable[..., Any] = apart) -> int:
    parser = command_line("decode_memory", __doc__, EXAMPLES)
    parser.add_argument("preset", nargs="?", default="prose_gdn2", help="its sizes are used")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="T")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add_csv(parser)
    parser.add_argument("--png", type=Path, default=PICTURE, help="default: docs/decode_memory.png")
    args = parse(parser, argv)
    config, device, timings = load_preset(args.preset).model, torch.device(args.device), []
    for T in args.contexts:
        for name in MODELS:
            options = {"tokens": args.tokens, "device": device, "threads": args.threads}
            timing = call(measure, config, name, T, **options)
            if timing is None:
                print(f"left out: {name} behind {T:,} tokens needs more memory than is free")
            else:
                timings.append(timing)
    show(timings)
    append(timings, args.csv, device, Path(__file__).name)
    draw(timings, args.png, f"{args.preset}: decoding one token on {args.device}")
    print(f"drew {args.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
