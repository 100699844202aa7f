"""Find the sizes of the Triton kernels on this GPU, and write them to the table.

For each form of decay and number of channels, from the table's nearest row on: one field after the
other, every value is tried and the best is kept, until a round changes nothing. What counts is the
geometric mean of the milliseconds that the pass forth (for sizes of the pass back, forth and back)
takes on some shapes, or a decoding step on some batches. What does not compile, or gives wrong
results, is passed over. Other bits come out where sizes change: commit the table, and run
`make compile-check` with --write.

channel-128, channel-64, head-128, head-64   K=V=128 or 64, decay per channel or per head; bfloat16
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from triton.errors import TritonError

from benchmarks import gpu
from benchmarks.gated_delta_rule import Case, operands_of, ours
from benchmarks.timing import command_line, interleaved, parse
from gdn2.ops.triton import launch
from gdn2.ops.triton.sizes import FILE, Key, Sizes, capability, nearest, read, write

# One number of heads, which the kernels are compiled for: (6, 8192, 16) is as much as 96 heads.
SHAPES = ((8, 2048, 16), (2, 8192, 16), (1, 16_384, 16), (1, 65_536, 16), (6, 8192, 16))
BATCHES = (1, 64)
MEMBER_OF_DECAY = {"channel": "gdn2", "head": "gated_deltanet"}
SUITES = ("channel-128", "channel-64", "head-128", "head-64")
Candidates = dict[str, tuple[int, ...]]
FORTH: Candidates = {
    "C": (32, 64),
    "BV": (16, 32, 64, 128),
    "scan_warps": (4, 8),
    "scan_stages": (1, 2, 3),
    "prepare_BK": (32, 64, 128),
    "prepare_warps": (4, 8),
    "L": (2048, 4096, 8192, 16_384, 32_768),
    "merge_BK": (16, 32, 64),
    "merge_warps": (4, 8),
}
BACK: Candidates = {
    "back_BV": (16, 32, 64, 128),
    "back_warps": (4, 8),
    "back_stages": (1, 2, 3),
    "gradients_C": (32, 64),
    "gradients_BK": (32, 64, 128),
    "gradients_BV": (32, 64, 128),
    "gradients_warps": (4, 8),
}
STEPS: Candidates = {"step_BV": (8, 16, 32, 64), "step_warps": (1, 2, 4, 8)}
EXAMPLES = """examples:
  python -m benchmarks.tune
  python -m benchmarks.tune channel-128 --table /tmp/sizes.csv
"""


def search(start: Sizes, candidates: Candidates, measure: Callable[[Sizes], float]) -> Sizes:
    """Descend along one field after the other, as long as that helps."""
    best, least, tried = start, measure(start), {start}
    print(f"  {least:.4f} ms now: {start}", flush=True)
    improved = True
    while improved:
        improved = False
        for field, values in candidates.items():
            for value in values:
                trial = best._replace(**{field: value})
                if trial in tried or trial.L % trial.C:
                    continue
                tried.add(trial)
                taken = measure(trial)
                better = taken < 0.99 * least  # less is noise
                print(f"  {taken:.4f} ms with {field}={value}{' *' * better}", flush=True)
                if better:
                    best, least, improved = trial, taken, True
    return best


def mean(row: Sizes, cases: Sequence[Case], time: Callable[[Case], float]) -> float:
    """Milliseconds with a row's sizes, geometric; infinite if a case does not run."""
    try:
        with mock.patch.object(launch, "sizes_of", return_value=row):
            return statistics.geometric_mean(map(time, cases))
    except (TritonError, RuntimeError) as error:  # does not compile, fit, or is wrong
        if "CUDA error" in str(error):  # nothing runs any more
            raise
        print(f"  {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return math.inf


def time_sequence(case: Case, rounds: int, device: torch.device, run: Callable) -> float:
    operands, _ = operands_of(case, device)
    upstream = torch.randn_like(operands[2])
    call = partial(run, ours(case, "triton"), operands, upstream)
    truth = run(ours(case, "chunked"), *gpu.first_heads(operands, upstream, double=True))
    wrong = max(map(gpu.error, gpu.first_heads(call(), upstream)[0], truth))
    if not wrong < gpu.LARGEST_ERROR:
        raise RuntimeError(f"the results are wrong by {wrong:.1e}")
    return 1000 * statistics.median(interleaved([call], rounds, device)[0])


def time_step(case: Case, rounds: int, device: torch.device) -> float:
    (row,) = gpu.measure_decoding(case, {}, rounds=rounds, device=device, rate=math.inf)
    return row.median_ms


def main(
    argv: Sequence[str] | None = None,
    *,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    device: str = "cuda",
) -> int:
    parser = command_line("tune", __doc__, EXAMPLES, SUITES)
    parser.set_defaults(device=device)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--table", type=Path, default=FILE, help="default: the library's own")
    args = parse(parser, argv)
    where = torch.device(device)
    table = read(args.table if args.table.exists() else FILE)
    for suite in args.suites:
        print(suite)
        decay, _, channels = suite.partition("-")
        key = Key(capability(where), 2, decay, int(channels), int(channels))
        member, found = MEMBER_OF_DECAY[decay], table[nearest(table, key)]
        sequences = gpu.sequences(member, shapes, key.K)
        for candidates, cases, time in (
            (FORTH, sequences, partial(time_sequence, run=gpu.forward)),
            (BACK, sequences, partial(time_sequence, run=gpu.forward_and_backward)),
            (STEPS, [gpu.decoding(member, B, key.K) for B in batches], time_step),
        ):
            timed = partial(time, rounds=args.rounds, device=where)
            found = search(found, candidates, partial(mean, cases=cases, time=timed))
            table[key] = found
            write(table, args.table)
            print(f"wrote {key} to {args.table}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
