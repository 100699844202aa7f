"""Time the gated delta rule: against the token loop, other projects, and the machine's products.

The calls of a case take turns, one round after the other in one process, so that a machine that
slows down slows all of them; ratios are of minima. Beside them stands the share of the machine:
useful FLOPs of a forward pass per second, over those of torch.mm at 1024^3. Each call adds a row to
the CSV file. Everything is float32 unless the case says otherwise.

speed     the token loop and other projects' forms, for three members of the family
forms     what gate forms, packing, grouped heads and bfloat16 cost, beside all gates per channel
one_head  the same of a single head
length    time per token of short and of long sequences
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.peers import Rule, load_peers
from benchmarks.timing import Timing, add_csv, append, command_line, interleaved, parse, show_table
from gdn2.ops import gated_delta_rule

CHUNK = 64  # of the useful FLOPs, whatever the backend uses
TIED = {"erase": "head", "write": "head"}
MEMBERS: dict[str, dict[str, Any]] = {  # gate forms that are not per channel
    "gdn2": {},
    "kda": TIED,
    "gated_deltanet": {"decay": "head", **TIED},
}
EXAMPLES = """examples:
  python -m benchmarks.gated_delta_rule
  python -m benchmarks.gated_delta_rule forms --rounds 20 --threads 1
  python -m benchmarks.gated_delta_rule speed --device cuda --csv /tmp/results.csv
"""


@dataclass(frozen=True)
class Case:
    """A call: sizes, gate forms (None, "head" or "channel"), and what is timed.

    Attributes:
        title: what is timed.
        decay_dtype: of log_decay; None: that of all others.
        member: whose gates are tied as they are; peers of it are timed too, where there are any.
        cu_seqlens: boundaries, if sequences are packed.
        loop: time the token loop too.
    """

    title: str
    B: int
    T: int
    H: int
    K: int = 128
    V: int = 128
    HV: int | None = None
    decay: str | None = "channel"
    erase: str | None = "channel"
    write: str | None = "channel"
    gate_heads: int | None = None
    log_decays: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32
    decay_dtype: torch.dtype | None = None
    member: str | None = None
    cu_seqlens: tuple[int, ...] | None = None
    loop: bool = False
    backward: bool = True

    @property
    def name(self) -> str:
        return f"{self.title}: {self.sizes}"

    @property
    def sizes(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} K={self.K} V={self.V}"

    @property
    def flops(self) -> int:
        """Useful products of a forward pass in chunks of 64, with all gates per channel."""
        heads = self.HV or self.H
        return self.B * self.T * heads * (10 * CHUNK * self.K + 6 * self.K * self.V)


_PACKED = (0, 500, 501, 1201, 2000, 3500, 4096)
FORMS = Case("all per channel", 1, 4096, 8)
SUITES: dict[str, tuple[Case, ...]] = {
    "speed": (
        Case("gdn2", 1, 2048, 4, member="gdn2", loop=True),
        Case("gdn2", 2, 4096, 8, loop=True, backward=False),
        *(Case(m, 1, 2048, 4, **MEMBERS[m], member=m) for m in ("kda", "gated_deltanet")),
    ),
    "forms": (
        FORMS,
        replace(FORMS, title="extreme decay: -90, -1e4 and 0", log_decays=(-90.0, -1e4, 0.0)),
        replace(FORMS, title="erase and write per head", erase="head", write="head"),
        replace(FORMS, title="decay per head", decay="head"),
        replace(FORMS, title="no decay", decay=None),
        replace(FORMS, title="no erase", erase=None),
        replace(FORMS, title="mamba2", decay="head", erase=None, write="head"),
        replace(FORMS, title="linear attention", decay=None, erase=None, write=None),
        replace(FORMS, title="bfloat16", dtype=torch.bfloat16),
        replace(FORMS, title="packed", cu_seqlens=_PACKED),
        replace(FORMS, title="2 key heads, 8 value heads", H=2, HV=8),
        replace(FORMS, title="2 key heads, gates on 8 value heads", H=2, HV=8, gate_heads=8),
    ),
    "length": tuple(Case("gdn2", 1, T, 4) for T in (4096, 16_384, 65_536)),
}
SUITES["one_head"] = tuple(replace(case, H=1) for case in SUITES["forms"] if case.HV is None)


def measure(
    cases: Sequence[Case], *, rounds: int, device: torch.device, mm_size: int = 1024
) -> list[Timing]:
    """Time every implementation on every case; a shorter ``mm_size`` is for tests."""
    matrix = torch.randn(mm_size, mm_size, device=device)
    wanted = []
    for case in cases:
        directions = ("forward", "forward+backward") if case.backward else ("forward",)
        wanted += [
            (case, name, direction, _call(case, rule, direction, device))
            for direction in directions
            for name, rule in implementations(case).items()
        ]
    calls = [call for *_, call in wanted]
    of_mm, *of_calls = interleaved([lambda: matrix @ matrix, *calls], rounds, device)
    rate = 2 * mm_size**3 / min(of_mm)
    timings = []
    for (case, name, direction, _), seconds in zip(wanted, of_calls, strict=True):
        share = case.flops / min(seconds) / rate if direction == "forward" else None
        timings.append(Timing.of(case, name, direction, seconds)._replace(share_of_mm=share))
    return timings


def implementations(case: Case) -> dict[str, Rule]:
    names = ("chunked", "reference") if case.loop else ("chunked",)
    rules = {name: ours(case, name) for name in names}
    return rules | (load_peers(case.member) if case.member else {})


def ours(case: Case, backend: str) -> Rule:
    bounds = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)

    def rule(q, k, v, log_decay, erase, write):
        gates = {"log_decay": log_decay, "erase": erase, "write": write}
        cu_seqlens = None if bounds is None else bounds.to(q.device)
        options = {"scale": case.K**-0.5, "cu_seqlens": cu_seqlens, "backend": backend}
        return gated_delta_rule(q, k, v, **gates, **options)[0]

    return rule


def _call(case: Case, rule: Rule, direction: str, device: torch.device) -> Callable[[], object]:
    """What is timed; its operands are made before."""
    operands, weight = operands_of(case, device)
    if direction == "forward":
        return torch.no_grad()(lambda: rule(*operands))
    leaves = [x.requires_grad_() for x in operands if x is not None]
    return lambda: torch.autograd.grad(rule(*operands), leaves, weight, allow_unused=True)


def operands_of(case: Case, device: torch.device) -> tuple[list[Tensor | None], Tensor]:
    """q, k, v, log_decay, erase, write, and an upstream gradient."""
    B, T, H, HV, K, V = case.B, case.T, case.H, case.HV or case.H, case.K, case.V
    generator = torch.Generator(device).manual_seed(0)

    def randn(heads: int, channels: int) -> Tensor:
        return torch.randn(B, T, heads, channels, generator=generator, device=device)

    def gate(form: str | None, heads: int, channels: int) -> Tensor | None:
        if form is None:
            return None
        return randn(heads, channels) if form == "channel" else randn(heads, 1)[..., 0]

    heads = case.gate_heads or H
    q, k, v = randn(H, K), F.normalize(randn(H, K), dim=-1), randn(HV, V)
    log_decay, erase = gate(case.decay, heads, K), gate(case.erase, heads, K)
    write = gate(case.write, HV, V)
    if log_decay is not None:
        log_decay = F.logsigmoid(log_decay + 3)
    if log_decay is not None and case.log_decays is not None:
        values = torch.tensor(case.log_decays, device=device)
        at = torch.randint(len(values), log_decay.shape, generator=generator, device=device)
        log_decay = values[at]
    gates = (log_decay, *(x if x is None else x.sigmoid() for x in (erase, write)))
    operands = [x if x is None else x.to(case.dtype) for x in (q, k, v, *gates)]
    if log_decay is not None:
        operands[3] = log_decay.to(case.decay_dtype or case.dtype)
    return operands, randn(HV, V).to(case.dtype)


def show(timings: Sequence[Timing]) -> None:
    """A table for each case; ratios are of minima, to the case's first and to the first case's."""
    leading: dict[str, float] = {}
    for case, of_case in groupby(timings, key=lambda timing: timing.case):
        table = Table("direction", "backend", title=case.name, title_justify="left")
        headings = ("min ms", "median ms", "us/token", "ratio", "to first case", "share of mm")
        for heading in headings:
            table.add_column(heading, justify="right")
        first: dict[str, float] = {}
        for t in of_case:
            per_token = 1000 * t.min_ms / (case.B * case.T)
            ratio = t.min_ms / first.setdefault(t.direction, t.min_ms)
            to_first = per_token / leading.setdefault(t.direction, per_token)
            share = "" if t.share_of_mm is None else f"{t.share_of_mm:.1%}"
            times = (f"{t.min_ms:.2f}", f"{t.median_ms:.2f}", f"{per_token:.2f}")
            table.add_row(t.direction, t.backend, *times, f"{ratio:.2f}", f"{to_first:.2f}", share)
        show_table(table)


def main(argv: Sequence[str] | None = None, suites: Mapping[str, Sequence[Case]] = SUITES) -> int:
    parser = command_line("gated_delta_rule", __doc__, EXAMPLES, suites)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    add_csv(parser)
    args = parse(parser, argv)
    device = torch.device(args.device)
    for suite in args.suites:
        timings = measure(suites[suite], rounds=args.rounds, device=device)
        show(timings)
        append(timings, args.csv, device, Path(__file__).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
