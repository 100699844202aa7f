"""Time training on a CPU: whole steps beside transformers' models, attention, torch.compile.

A step is the trainer's: forward, loss, backward, clipping and AdamW, in float32 on random tokens.
The calls of a suite take turns, one round after the other in one process; ratios are of minima.
Each call adds a row to the CSV file, with parameters and peak memory in its name.

models      tokens per second at equal tokens per step; every MLP is as wide as makes the model as
            large as gdn2 (M: millions of parameters). qwen3_next has full attention in every fourth
            layer or ("linear") in none, llama in all
attention   sliding-window attention alone: time, and peak memory in a process of its own
compile     the recurrent model with its blocks compiled; needs a C++ compiler
"""

import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.decode_memory import build
from benchmarks.process import apart, peak_beyond
from benchmarks.timing import Timing, add_csv, append, command_line, interleaved, parse, show_table
from gdn2.models import MIXERS, Gdn2Config, Gdn2ForCausalLM
from gdn2.models.loss import IGNORED
from gdn2.presets import load_preset
from gdn2.train.config import OptimConfig
from gdn2.train.optim import build_optimizer
from gdn2.train.parallel import keep_freed_memory

CPU = torch.device("cpu")
MODELS = ("gdn2", "hybrid", "qwen3_next linear", "qwen3_next", "llama")
LARGEST_VOCABULARY = 8192  # transformers' models hold all logits of a step, several times
OPTIM = OptimConfig(lr=1e-4)
SIZES = Gdn2Config(  # 20 M parameters
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=8,
    num_heads=6,
    head_k_dim=64,
    num_attention_heads=6,
    attention_head_dim=64,
    sliding_window=512,
    intermediate_size=640,
)
HEADINGS = ["", "B", "T", "M", "model", "direction", "min ms", "median ms", "tokens/s", "to first"]
HEADINGS += ["to first T", "peak B/token"]
EXAMPLES = """examples:
  python -m benchmarks.training
  python -m benchmarks.training models --lengths 512 8192 --rounds 3
  python -m benchmarks.training attention compile --preset prose_gdn2_hybrid --threads 1
"""


class Case(NamedTuple):
    """peak: bytes beyond what the caller holds; None where it is not measured."""

    title: str
    B: int
    T: int
    parameters: int
    peak: int | None = None

    @property
    def name(self) -> str:
        peak = "" if self.peak is None else f" peak={self.peak}"
        return f"{self.title}: B={self.B} T={self.T} parameters={self.parameters}{peak}"


class Plan(NamedTuple):
    """What is asked for; `tokens` are those of a step."""

    title: str
    config: Gdn2Config
    lengths: Sequence[int]
    tokens: int
    rounds: int

    def batch(self, T: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (self.tokens // T, T))


def time_models(plan: Plan) -> list[Timing]:
    size = count(_build(plan.config, "gdn2"))
    models = {name: build_sized(plan.config, name, size).train() for name in MODELS}
    optimizers = {name: build_optimizer(model, OPTIM) for name, model in models.items()}
    keys, calls = [], []
    for T in plan.lengths:
        tokens = plan.batch(T)
        for name, model in models.items():
            keys.append((Case(plan.title, *tokens.shape, count(model)), name, "step"))
            calls.append(partial(step, model, optimizers[name], tokens))
    return time_all(keys, calls, plan.rounds)


def build_sized(config: Gdn2Config, name: str, size: int) -> Any:
    """The model, its MLP as wide as comes nearest to `size` parameters, in steps of 16."""
    missing = size - count(_build(config, name))
    config, each = copy(config), 3 * config.hidden_size * config.num_hidden_layers
    config.intermediate_size += 16 * round(missing / each / 16)
    return _build(config, name)


def _build(config: Gdn2Config, name: str) -> Any:
    return _qwen3_next(config, name) if name.startswith("qwen3_next") else build(config, name)


def _qwen3_next(config: Gdn2Config, name: str) -> Any:
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    for function in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        # transformers puts fla's kernels around its own, if found, and they want a GPU.
        setattr(qwen3_next, function, inspect.unwrap(getattr(qwen3_next, function)))
    depth = config.num_hidden_layers
    return qwen3_next.Qwen3NextForCausalLM(
        qwen3_next.Qwen3NextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=depth,
            layer_types=["linear_attention"] * depth if name.endswith("linear") else None,
            linear_num_key_heads=config.num_heads,
            linear_num_value_heads=config.num_v_heads or config.num_heads,
            linear_key_head_dim=config.head_k_dim,
            linear_value_head_dim=config.head_v_dim or config.head_k_dim,
            linear_conv_kernel_dim=config.conv_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            intermediate_size=config.intermediate_size,
            num_experts=0,  # a dense MLP in every layer
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    if isinstance(model, Gdn2ForCausalLM):
        total, valid = model.loss(tokens, F.pad(tokens[:, 1:], (0, 1), value=IGNORED))
        loss = total / valid
    else:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def time_attention(plan: Plan) -> list[Timing]:
    title, threads = f"window={plan.config.sliding_window}", torch.get_num_threads()
    keys, calls = [], []
    for T in plan.lengths:
        for direction in ("forward", "forward+backward"):
            peak = apart(attention_peak, plan.config, T, direction, threads)
            layer, call = attention(plan.config, T, direction)
            keys.append((Case(title, 1, T, count(layer), peak), "sliding_attention", direction))
            calls.append(call)
    return time_all(keys, calls, plan.rounds)


def attention(config: Gdn2Config, T: int, direction: str) -> tuple[nn.Module, Callable]:
    """The layer, and a call of it on T tokens that were made before."""
    layer = MIXERS["sliding_attention"].build(config)
    x, upstream = torch.randn(2, 1, T, config.hidden_size)
    if direction == "forward":
        return layer, torch.no_grad()(lambda: layer(x))
    leaves = [x.requires_grad_(), *layer.parameters()]
    return layer, lambda: torch.autograd.grad(layer(x)[0], leaves, upstream)


def attention_peak(config: Gdn2Config, T: int, direction: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # A short call first: what the libraries themselves allocate is not the layer's.
    attention(config, config.sliding_window + 1, direction)[1]()
    return peak_beyond(attention(config, T, direction)[1])


@torch.compiler.config.patch(force_disable_caches=True)  # what an earlier run compiled is no help
def time_compiled(plan: Plan) -> list[Timing]:
    """At the first length alone."""
    tokens = plan.batch(plan.lengths[0])
    first, keys, calls = [], [], []
    for name in ("eager", "compiled"):
        model = _build(plan.config, "gdn2").train()
        for block in model.model.layers if name == "compiled" else ():
            block.compile()
        calls.append(partial(step, model, build_optimizer(model, OPTIM), tokens))
        keys.append((Case(plan.title, *tokens.shape, count(model)), name, "step"))
        started = time.perf_counter()
        calls[-1]()
        seconds = time.perf_counter() - started
        first.append(Timing.of(keys[-1][0], name, "first step", [seconds]))
    return first + time_all(keys, calls, plan.rounds)


def time_all(
    keys: Sequence[tuple[Case, str, str]], calls: Sequence[Callable], rounds: int
) -> list[Timing]:
    return [
        Timing.of(*key, seconds)
        for key, seconds in zip(keys, interleaved(calls, rounds, CPU), strict=True)
    ]


def show(timings: Sequence[Timing]) -> None:
    """What all rows have in common stands in the title; ratios are of the time per token."""
    rows, first = [], {}
    for case, model, direction, low, middle, *_ in timings:
        tokens = case.B * case.T
        each = low / tokens
        to_first = each / first.setdefault((case.T, direction), each)
        to_first_T = each / first.setdefault((model, direction), each)
        sizes = (case.title, str(case.B), str(case.T), f"{case.parameters / 1e6:.2f}")
        times = (f"{low:.1f}", f"{middle:.1f}", f"{1000 / each:.0f}")
        peak = "" if case.peak is None else f"{case.peak / tokens:.0f}"
        ratios = (f"{to_first:.2f}", f"{to_first_T:.2f}")
        rows.append((*sizes, model, direction, *times, *ratios, peak))
    columns = dict(zip(HEADINGS, zip(*rows, strict=True), strict=True))
    same = {name: column[0] for name, column in columns.items() if len({*column}) == 1}
    title = ", ".join(f"{name} {value}".strip() for name, value in same.items() if value)
    table = Table(title=title, title_justify="left")
    for name in [name for name in columns if name not in same]:
        text = name in ("model", "direction")
        table.add_column(name, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(*(x for name, x in zip(HEADINGS, row, strict=True) if name not in same))
    show_table(table)


SUITES: Mapping[str, tuple[Callable[[Plan], list[Timing]], Sequence[int]]] = {
    "models": (time_models, (512, 1024, 2048, 4096, 8192)),
    "attention": (time_attention, tuple(2**n for n in range(10, 17))),  # 1K ... 64K
    "compile": (time_compiled, (2048,)),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("training", __doc__, EXAMPLES, SUITES)
    parser.add_argument("--preset", metavar="NAME", help="whose sizes; default: 20 M parameters")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="T", help="default: the suite's")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N", help="a step; 8192")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    add_csv(parser)
    args = parse(parser, argv)
    for suite in args.suites:
        if suite != "attention" and any(args.tokens % T for T in args.lengths or SUITES[suite][1]):
            parser.error(f"{suite}: every length must divide the tokens of a step, {args.tokens}")
    if "compile" in args.suites and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        print(f"compile needs a C++ compiler, and there is no {compiler}", file=sys.stderr)
        return 1
    keep_freed_memory()
    config = load_preset(args.preset).model if args.preset else SIZES
    if config.vocab_size > LARGEST_VOCABULARY:
        print(f"a vocabulary of {LARGEST_VOCABULARY} for all models, not {config.vocab_size}")
        config.vocab_size = LARGEST_VOCABULARY
    for suite in args.suites:
        measure, lengths = SUITES[suite]
        lengths = args.lengths or lengths
        timings = measure(Plan(args.preset or "20m", config, lengths, args.tokens, args.rounds))
        show(timings)
        append(timings, args.csv, CPU, Path(__file__).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
