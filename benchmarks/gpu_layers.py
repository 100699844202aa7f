"""Time layers, blocks and training steps on a GPU, with the Triton kernels in them.

layers   a token mixer of the 1.3B models in bfloat16, forward and with backward, beside
         flash-linear-attention's layer of the same sizes; and, by the profiler, our time by part
blocks   the same mixers with norms and MLP around them, likewise
steps    tokens a second of the trainer's step with gdn2_1p3b_hybrid, optimizer included, without
         activation checkpoints, at 16,384 tokens

What takes turns is timed in one process; each case's rows are added to the CSV file as soon as they
are measured. The peak is of memory beyond parameters, inputs and results.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from benchmarks.gated_delta_rule import MEMBERS
from benchmarks.gpu import peak_mb
from benchmarks.peers import load_layer
from benchmarks.timing import (
    Timing,
    add_csv,
    append,
    command_line,
    interleaved,
    parse,
    runs,
    show_table,
    show_timings,
)
from gdn2.data import Batch
from gdn2.models import MIXERS, Gdn2Config, Gdn2ForCausalLM
from gdn2.models.loss import IGNORED
from gdn2.models.modeling import Block
from gdn2.ops.backends import FASTEST
from gdn2.presets import load_preset
from gdn2.train.config import OptimConfig
from gdn2.train.loop import backward
from gdn2.train.optim import build_optimizer

PRESET = "gdn2_1p3b_hybrid"
SHAPES = ((8, 2048), (4, 4096), (2, 8192), (1, 16_384))  # B, T
SUITES = ("layers", "blocks", "steps")
DTYPE = torch.bfloat16
OPTIM = OptimConfig(lr=1e-4)
PARTS = {  # of a layer, by what its kernels' names contain
    "operator": ("prepare_under", "scan", "merge", "gradients"),
    "front end": ("normed_conv", "decay", "sigmoid_gate"),
    "output norm": ("gated_norm",),
    "projections": ("gemm", "cutlass", "nvjet", "xmma"),
    "other": ("",),
}
EXAMPLES = """examples:
  python -m benchmarks.gpu_layers
  python -m benchmarks.gpu_layers layers --rounds 50 --csv /tmp/results.csv
"""


class Case(NamedTuple):
    title: str
    B: int
    T: int
    config: Gdn2Config

    @property
    def name(self) -> str:
        c = self.config
        sizes = f"D={c.hidden_size} H={c.num_heads} K={c.head_k_dim}"
        return f"{self.title}: B={self.B} T={self.T} {sizes}"


def layers(config: Gdn2Config, member: str) -> dict[str, nn.Module]:
    """Ours, and the peer's where there is one."""
    return {"triton": MIXERS[member].build(config), **load_layer(member, config)}


def blocks(config: Gdn2Config, member: str) -> dict[str, nn.Module]:
    return {"triton": Block(config, member)}


def measure(
    case: Case, modules: Mapping[str, nn.Module], rounds: int, device: torch.device
) -> list[Timing]:
    x, upstream = torch.randn(
        2, case.B, case.T, case.config.hidden_size, device=device, dtype=DTYPE
    )
    rows = []
    for direction, run in (("forward", forward), ("forward+backward", forward_and_backward)):
        calls = {name: partial(run, module, x, upstream) for name, module in modules.items()}
        calls["triton"]()
        calls = {n: c for n, c in calls.items() if n == "triton" or runs(f"{direction} of {n}", c)}
        peaks = [peak_mb(call, device) for call in calls.values()]
        timed = interleaved(list(calls.values()), rounds, device)
        for name, seconds, peak in zip(calls, timed, peaks, strict=True):
            rows.append(Timing.of(case, name, direction, seconds)._replace(peak_mb=peak))
    return rows


@torch.no_grad()
def forward(module: nn.Module, x: Tensor, _: Tensor) -> list[Tensor]:
    return [module(x)[0]]


def forward_and_backward(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)[0]
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)]


def measure_steps(case: Case, rounds: int, device: torch.device) -> list[Timing]:
    model = Gdn2ForCausalLM(case.config).to(device).train()
    optimizer = build_optimizer(model, OPTIM)
    tokens = torch.randint(case.config.vocab_size, (case.B, case.T))
    batch = Batch(tokens, F.pad(tokens[:, 1:], (0, 1), value=IGNORED), None)
    call = partial(step, model, optimizer, batch, device)
    call()  # makes the optimizer's states, which are no part of the peak
    peak = peak_mb(call, device)
    (seconds,) = interleaved([call], rounds, device)
    return [Timing.of(case, "triton", "step", seconds)._replace(peak_mb=peak)]


def step(
    model: Gdn2ForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, device: torch.device
) -> list[Tensor]:
    """The trainer's, without its record."""
    backward(model, [batch], device)
    clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return []


def show(rows: Sequence[Timing]) -> None:
    def rate(t: Timing) -> str:
        return f"{1000 * t.case.B * t.case.T / t.median_ms:,.0f}"

    show_timings(rows, rows[0].case.name, {"tokens/s": rate})


def show_parts(case: Case, module: nn.Module, device: torch.device) -> None:
    """Where the time of a pass forth and back goes."""
    x = torch.randn(case.B, case.T, case.config.hidden_size, device=device, dtype=DTYPE)
    call = partial(forward_and_backward, module, x, x)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    call()
    with profile(activities=activities) as profiler:
        call()
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        part = next(p for p, names in PARTS.items() if any(n in event.key for n in names))
        parts[part] += event.device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(parts.values()) or 1.0
    table = Table("part", title=f"{case.name}, forward+backward", title_justify="left")
    for heading in ("us", "share"):
        table.add_column(heading, justify="right")
    for part, taken in parts.items():
        table.add_row(part, f"{taken:.0f}", f"{taken / whole:.0%}")
    show_table(table)


def main(
    argv: Sequence[str] | None = None,
    *,
    config: Gdn2Config | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    device: str = "cuda",
) -> int:
    parser = command_line("gpu_layers", __doc__, EXAMPLES, SUITES)
    parser.set_defaults(device=device)
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: 20")
    add_csv(parser)
    args = parse(parser, argv)
    where, config = torch.device(device), config or load_preset(PRESET).model
    with mock.patch.dict(FASTEST, {device: "triton"}):
        for suite, (B, T) in itertools.product(args.suites, shapes):
            for title in (PRESET,) if suite == "steps" else MEMBERS:
                case = Case(f"{title} {suite.removesuffix('s')}", B, T, config)
                if suite == "steps":
                    rows = measure_steps(case, args.rounds, where)
                else:
                    build = layers if suite == "layers" else blocks
                    modules = {n: m.to(where, DTYPE) for n, m in build(config, title).items()}
                    rows = measure(case, modules, args.rounds, where)
                show(rows)
                append(rows, args.csv, where, Path(__file__).name)
                if suite != "steps":
                    show_parts(case, modules["triton"], where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
