"""Inverses of many small unit lower triangular matrices by block substitution."""

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Workspace


class BlockInverse:
    """``A = (I + T)^-1`` for strictly lower triangular T [M, C, C]; C a power of two.

    T comes in parts: T_h is zero but where, in a block of 2h tokens, rows of the upper half meet
    columns of the lower one. The inverses of the diagonal blocks of h rows then give those of 2h
    rows, exactly:

        A_21 = -A_22 T_21 A_11        for all blocks at once: A <- A - A (T_h A), h = 1, 2, 4 ... C/2

    in any order of the tokens. A Neumann series would not do: its terms grow like binomials where
    keys repeat, and cancel.

    Attributes:
        parts: T_1, T_2, T_4 ..., zero at first, to be filled by the caller.
        inverse: A, after `compute`.
    """

    def __init__(self, M: int, C: int, empty: Workspace):
        halves = [2**i for i in range(C.bit_length() - 1)]
        self.parts = [empty(f"part {h}", M, C, C, zero=True) for h in halves]
        self.eye = torch.eye(C, dtype=empty.dtype, device=empty.device).expand(M, C, C)
        self.product = empty("inverse product", M, C, C)
        buffers = [empty("inverse", M, C, C), empty("other inverse", M, C, C)]
        self.stages = [buffers[i % 2] for i in range(max(len(halves), 1))]
        self.inverse = self.stages[-1]

    def compute(self) -> None:
        if not self.parts:
            self.inverse.copy_(self.eye)
            return
        torch.sub(self.eye, self.parts[0], out=self.stages[0])
        for part, inverse, out in zip(self.parts[1:], self.stages, self.stages[1:], strict=False):
            torch.bmm(part, inverse, out=self.product)
            torch.baddbmm(inverse, inverse, self.product, alpha=-1, out=out)


def split_strictly_lower(lower: Tensor, parts: list[Tensor]) -> None:
    """Fill the parts of `BlockInverse` from a strictly lower triangular matrix, tokens in time."""
    token = torch.arange(lower.shape[-1], device=lower.device)
    for i, part in enumerate(parts):
        block = token >> i
        meet = (block.unsqueeze(1) == block + 1) & (block % 2 == 0)
        torch.mul(lower, meet.to(lower.dtype), out=part)
