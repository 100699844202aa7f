"""Peak memory of the operator's forward and backward pass, beyond what the caller holds.

Each length runs in a process of its own, with its inputs and the upstream gradient made first; what
the process then needs at most, above that, is put in relation to the bytes of the inputs.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from benchmarks.gated_delta_rule import Case, implementations, operands_of
from benchmarks.process import apart, peak_beyond
from benchmarks.timing import command_line, parse, show_table

LENGTHS = (4096, 16_384, 65_536)
EXAMPLES = """examples:
  python -m benchmarks.peak_memory
  python -m benchmarks.peak_memory --lengths 16384 --threads 2
"""


def measure(case: Case, threads: int) -> tuple[int, int]:
    """Bytes of the inputs, and what forward and backward need beyond them and the upstream."""
    torch.set_num_threads(threads)
    rule, cpu = implementations(case)["chunked"], torch.device("cpu")
    # A short call first: what the libraries themselves allocate is not the operator's.
    _differentiate(rule, *operands_of(Case("warm up", 1, 64, 1), cpu))
    operands, weight = operands_of(case, cpu)
    beyond = peak_beyond(partial(_differentiate, rule, operands, weight))
    return sum(x.nbytes for x in operands if x is not None), beyond


def _differentiate(rule: Callable, operands: Sequence[Any], weight: torch.Tensor) -> None:
    leaves = [x.requires_grad_() for x in operands if x is not None]
    torch.autograd.grad(rule(*operands), leaves, weight)


def main(argv: Sequence[str] | None = None, call: Callable[..., Any] = apart) -> int:
    parser = command_line("peak_memory", __doc__, EXAMPLES)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="tokens"
    )
    args = parse(parser, argv)
    table = Table("T", title="B=1 H=4 K=V=128, all gates per channel, float32")
    for heading in ("inputs MB", "peak beyond MB", "ratio"):
        table.add_column(heading, justify="right")
    for T in args.lengths:
        inputs, beyond = call(measure, Case("gdn2", 1, T, 4), args.threads)
        table.add_row(
            str(T), f"{inputs / 1e6:.1f}", f"{beyond / 1e6:.1f}", f"{beyond / inputs:.2f}"
        )
    show_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
