"""Time one decoding step, beside a copy of its states and beside four plain operations.

A step reads and writes every state once at least, which is what a copy does. The calls of a case
take turns, one round after the other in one process; ratios are of minima, to the copy. All gates
are per channel, everything is float32. Each call adds a row to the CSV file.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gated_delta_rule import Case, operands_of, show
from benchmarks.timing import Timing, add_csv, append, command_line, interleaved, parse
from gdn2.ops import gated_delta_step

# (batch, heads, key and value channels): states of 32 KB to 128 MB
SIZES = ((1, 2, 64), (1, 4, 128), (1, 16, 128), (16, 16, 128), (64, 16, 128), (128, 16, 128))
EXAMPLES = """examples:
  python -m benchmarks.gated_delta_step
  python -m benchmarks.gated_delta_step --rounds 200 --threads 1
"""


def measure(sizes: Sequence[tuple[int, int, int]], *, rounds: int) -> list[Timing]:
    cpu, timings = torch.device("cpu"), []
    for B, H, K in sizes:
        megabytes = 4 * B * H * K * K / 2**20
        case = Case(f"states of {megabytes:g} MiB", B, 1, H, K, K)
        calls = _calls(case)
        seconds = interleaved(list(calls.values()), rounds, cpu)
        timings += [
            Timing.of(case, name, "step", times) for name, times in zip(calls, seconds, strict=True)
        ]
    return timings


def _calls(case: Case) -> dict[str, Callable[[], object]]:
    """Each has states of its own, as large as the others'."""
    operands, _ = operands_of(case, torch.device("cpu"))
    q, k, v, log_decay, erase, write = (x[:, 0] for x in operands if x is not None)
    shape = (case.B, case.H, case.K, case.V)
    source, target, by_hand, ours = (torch.zeros(shape) for _ in range(4))
    gates = {"log_decay": log_decay, "erase": erase, "write": write}

    def four_operations() -> Tensor:
        by_hand.mul_(log_decay.exp().unsqueeze(-1))
        read = ((erase * k).unsqueeze(-2) @ by_hand).squeeze(-2)
        by_hand.addcmul_(k.unsqueeze(-1), (write * v - read).unsqueeze(-2))
        return (q.unsqueeze(-2) @ by_hand).squeeze(-2)

    return {
        "copy": lambda: target.copy_(source),
        "four operations": four_operations,
        "chunked": lambda: gated_delta_step(q, k, v, **gates, state=ours, backend="chunked"),
    }


def main(argv: Sequence[str] | None = None, sizes: Sequence[tuple[int, int, int]] = SIZES) -> int:
    parser = command_line("gated_delta_step", __doc__, EXAMPLES)
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="default: 50")
    add_csv(parser)
    args = parse(parser, argv)
    timings = measure(sizes, rounds=args.rounds)
    show(timings)
    append(timings, args.csv, torch.device("cpu"), Path(__file__).name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
