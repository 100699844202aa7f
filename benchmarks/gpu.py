"""Time the Triton kernels on a GPU, beside flash-linear-attention's and beside a copy of bytes.

The calls of a case take turns in one process, and the cache is emptied before each. Before one is
timed, its outputs and gradients for two heads are compared with float64. The share of copy is how
fast the bytes that must move at least (operands and outputs once, and their gradients; in decoding
states in and out) would have to be copied to take as long, over the rate at which this run copies.
The peak is of memory beyond operands and results. Each case's rows are added to the CSV file as
soon as they are measured. flash-linear-attention tunes its kernels at the first call of each number
of channels and heads, which takes minutes.

gdn2, kda, gated_deltanet   sequences, forward and with backward: bfloat16, log_decay in float32
decode                      a token of GDN-2, on states that rotate beyond the cache
kernels                     what each kernel of ours takes, there and back, of one case per member
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gated_delta_rule import MEMBERS, Case, operands_of, ours
from benchmarks.peers import Rule, load_kernels, load_step_kernel
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
from gdn2.ops import gated_delta_step

SHAPES = (  # B, T, H
    (8, 2048, 16),
    (4, 4096, 16),
    (2, 8192, 16),
    (1, 16_384, 16),
    (1, 65_536, 16),
    (1, 8192, 96),
)
CHANNELS = (128, 64)
DTYPES: dict[str, Any] = {"dtype": torch.bfloat16, "decay_dtype": torch.float32}
BATCHES = (1, 4, 16, 64, 128, 256, 512)
SUITES = (*MEMBERS, "decode", "kernels")
COPIED = 2**32  # bytes, of the copy that others are compared with
ROTATED = 2**29  # bytes of states at least: several times a GPU's cache
LARGEST_ERROR = 0.02  # root mean square, relative: bfloat16 operands give 0.005
EXAMPLES = """examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu gdn2 --channels 128 --csv /tmp/results.csv
  python -m benchmarks.gpu decode kernels --rounds 50
"""


def sequences(member: str, shapes: Sequence[tuple[int, int, int]], K: int) -> list[Case]:
    forms = DTYPES | MEMBERS[member]
    kind, of_decay = (str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
    title = f"{member} in {kind}, log_decay {of_decay}"
    return [Case(title, B, T, H, K, K, member=member, **forms) for B, T, H in shapes]


def decoding(member: str, B: int, K: int) -> Case:
    (case,) = sequences(member, [(B, 1, 16)], K)
    return replace(case, title=f"step of {case.title}")


def copy_rate(device: torch.device, size: int = COPIED) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    (seconds,) = interleaved([lambda: target.copy_(source)], 10, device)
    return 2 * size / min(seconds)


def measure_sequence(
    case: Case, *, rounds: int, device: torch.device, rate: float
) -> tuple[list[Timing], dict[tuple[str, str], float]]:
    """Rows, and errors by direction and implementation; what has a large one is not timed."""
    operands, _ = operands_of(case, device)
    if case.erase == "head":
        operands[5] = operands[4]  # peers have one gate for both
    upstream = torch.randn_like(operands[2])
    rules = {"triton": ours(case, "triton"), **load_kernels(case.member or "")}
    moved = nbytes(operands) + operands[2].nbytes  # operands and outputs
    rows, errors = [], {}
    for direction, run in DIRECTIONS.items():
        calls: dict[str, Callable[[], list[Tensor]]] = {}
        peaks = {}
        truth = run(ours(case, "chunked"), *first_heads(operands, upstream, double=True))
        for name, rule in rules.items():
            call = partial(run, rule, operands, upstream)
            started = time.perf_counter()
            if name != "triton" and not runs(f"{direction} of {name}", call):
                continue
            results = first_heads(call(), upstream)[0]
            errors[direction, name] = max(map(error, results, truth))
            print(f"  {name}: first {direction} {time.perf_counter() - started:.1f} s", flush=True)
            if errors[direction, name] < LARGEST_ERROR:
                calls[name], peaks[name] = call, peak_mb(call, device)
        timed = interleaved(list(calls.values()), rounds, device)
        for name, seconds in zip(calls, timed, strict=True):
            share = moved / rate / min(seconds)
            row = Timing.of(case, name, direction, seconds)
            rows.append(row._replace(share_of_copy=share, peak_mb=peaks[name]))
        moved *= 2  # and their gradients
    return rows, errors


@torch.no_grad()
def forward(rule: Rule, operands: Sequence[Tensor | None], _: Tensor) -> list[Tensor]:
    return [rule(*operands)]


def forward_and_backward(
    rule: Rule, operands: Sequence[Tensor | None], upstream: Tensor
) -> list[Tensor]:
    """The outputs, and the gradients of those operands that there are, each of one gate or two."""
    unique = {id(x): x for x in operands if x is not None}
    leaves = {key: x.detach().requires_grad_() for key, x in unique.items()}
    out = rule(*(None if x is None else leaves[id(x)] for x in operands))
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)]


DIRECTIONS = {"forward": forward, "forward+backward": forward_and_backward}


def first_heads(
    tensors: Sequence[Tensor | None], upstream: Tensor, *, double: bool = False
) -> tuple[list[Any], Tensor]:
    """Two heads of a sequence, in float64 on request; one tensor that comes twice stays one."""
    cut: dict[int, Tensor] = {}
    for x in (*tensors, upstream):
        if x is not None and id(x) not in cut:
            few = x[:1, :, :2]
            cut[id(x)] = few.double() if double else few
    return [None if x is None else cut[id(x)] for x in tensors], cut[id(upstream)]


def error(got: Tensor, truth: Tensor) -> float:
    """Root mean square, relative."""
    difference = got.double() - truth
    return (difference.square().mean() / truth.square().mean()).sqrt().item()


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(x.nbytes for x in {id(x): x for x in tensors if x is not None}.values())


def peak_mb(call: Callable[[], list[Tensor]], device: torch.device) -> float | None:
    """Memory of a GPU that a call needs beyond what is there before it and what it returns."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = nbytes(call())
    return (torch.cuda.max_memory_allocated(device) - before - results) / 2**20


def measure_decoding(
    case: Case,
    kernels: Mapping[str, Callable],
    *,
    rounds: int,
    device: torch.device,
    rate: float,
) -> list[Timing]:
    """A graph of one step on each of several sets of states is replayed; the time is a step's."""
    operands, _ = operands_of(case, device)
    q, k, v, log_decay, erase, write = operands
    of_states = 4 * case.B * case.H * case.K * case.V
    sets = max(2, -(-ROTATED // of_states))
    shape = (sets, case.B, case.H, case.K, case.V)
    gates, out = {"log_decay": log_decay, "erase": erase, "write": write}, torch.empty_like(v)
    step = partial(gated_delta_step, q, k, v, **gates, scale=case.K**-0.5)
    _check_step(step, torch.randn(shape[1:], device=device))
    steps = {"triton": lambda state: step(state=state, backend="triton")}
    for name, kernel in kernels.items():
        peer = partial(kernel, *operands, out=out)
        steps[name] = lambda state, peer=peer: peer(initial_state=state)
    calls = {name: _replayed(s, torch.zeros(shape, device=device)) for name, s in steps.items()}
    timings = []
    for name, seconds in zip(calls, interleaved(list(calls.values()), rounds, device), strict=True):
        of_a_step = [t / sets for t in seconds]
        share = 2 * of_states / rate / min(of_a_step)
        timings.append(Timing.of(case, name, "step", of_a_step)._replace(share_of_copy=share))
    return timings


def _check_step(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor) -> None:
    """Raise RuntimeError unless a step of ours gives what the chunked backend gives."""
    with torch.no_grad():
        got, want = (step(state=state.clone(), backend=name) for name in ("triton", "chunked"))
    for mine, other in zip(got, want, strict=True):
        wrong = ((mine - other).float().square().mean() / other.float().square().mean()).sqrt()
        if not wrong < LARGEST_ERROR:
            raise RuntimeError(f"a step is wrong by {wrong:.1e}")


def _replayed(step: Callable[[Tensor], object], states: Tensor) -> Callable[[], object]:
    """A step on each state, as a CUDA graph: without what the host needs to launch them."""

    @torch.no_grad()
    def steps() -> None:
        for state in states:
            step(state)

    with torch.no_grad():
        step(states[0])
    if states.device.type != "cuda":
        return steps
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps()

    def replay() -> Tensor:
        graph.replay()
        return states  # which the graph itself does not keep alive

    return replay


def show(rows: Sequence[Timing], errors: Mapping[tuple[str, str], float]) -> None:
    def share(t: Timing) -> str:
        return f"{t.share_of_copy:.1%}"

    def wrong(t: Timing) -> str:
        key = t.direction, t.backend
        return f"{errors[key]:.1e}" if key in errors else ""

    show_timings(rows, rows[0].case.name, {"share of copy": share, "error": wrong})


def show_kernels(case: Case, device: torch.device, rate: float) -> None:
    """Ours alone: time of each kernel, as the profiler sees it."""
    operands, _ = operands_of(case, device)
    call = partial(
        forward_and_backward, ours(case, "triton"), operands, torch.randn_like(operands[2])
    )
    call()
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(10):
            call()
    table = Table("kernel", title=case.name, title_justify="left")
    table.add_column("us", justify="right")
    events = profiler.key_averages()
    for event in sorted(events, key=lambda e: -e.device_time_total)[:12]:
        table.add_row(event.key, f"{event.device_time_total / 10:.1f}")
    show_table(table)
    print(f"  {rate / 1e12:.2f} TB/s copied in this run", flush=True)


def main(
    argv: Sequence[str] | None = None,
    *,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    device: str = "cuda",
) -> int:
    parser = command_line("gpu", __doc__, EXAMPLES, SUITES)
    parser.set_defaults(device=device)
    parser.add_argument(
        "--channels", type=int, nargs="+", default=CHANNELS, metavar="K", help="default: 128 64"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default: 20")
    add_csv(parser)
    args = parse(parser, argv)
    where, failed = torch.device(device), []
    rate = copy_rate(where, COPIED if device == "cuda" else 2**20)
    print(f"a copy moves {rate / 1e12:.2f} TB/s")
    options = {"rounds": args.rounds, "device": where, "rate": rate}

    for suite in args.suites:
        channels = args.channels if suite in MEMBERS else ()
        for case in [case for K in channels for case in sequences(suite, shapes, K)]:
            rows, errors = measure_sequence(case, **options)
            wrong = {name: x for name, x in errors.items() if not x < LARGEST_ERROR}
            failed += [f"{case.name}: {' of '.join(n)} wrong by {x:.1e}" for n, x in wrong.items()]
            if rows:
                show(rows, errors)
                append(rows, args.csv, where, Path(__file__).name)
        for B in batches if suite == "decode" else ():
            rows = measure_decoding(
                decoding("gdn2", B, args.channels[0]), load_step_kernel(), **options
            )
            show(rows, {})
            append(rows, args.csv, where, Path(__file__).name)
        for member in MEMBERS if suite == "kernels" else ():
            show_kernels(sequences(member, shapes, args.channels[0])[0], where, rate)
    for line in failed:
        print(line, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
