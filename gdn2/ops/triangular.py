"""Inverses of many small unit lower triangular matrices by block substitution."""

from functools import cache

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import TokenOrder, Workspace


class BlockInverse:
    """``A = (I + T)^-1`` for strictly lower triangular T [M, C, C]; C a power of two.

    Let T_h be T where, in a block of 2h tokens, rows of the upper half meet columns of the lower
    one, and else zero. Inverses of the diagonal blocks of h rows give those of 2h rows, exactly:

        A_21 = -A_22 T_21 A_11       for all blocks: A <- A - A (T_h A), h = 1, 2, 4 ... C/2

    A Neumann series would not do: its terms grow like binomials where keys repeat, and cancel. Sums
    run in the order of time for the same reason: neighbours in A have opposite signs there.

    Attributes:
        inverse: A, after `compute`.
    """

    def __init__(self, M: int, C: int, order: TokenOrder, empty: Workspace):
        eye, self.masks = _constants(C, empty.dtype, empty.device)
        self.eye = eye.expand(M, C, C)
        self.part, self.product = empty("part", M, C, C), empty("inverse product", M, C, C)
        self.stages = empty("inverse", M, C, C), empty("other inverse", M, C, C)
        self.inverse = self.stages[(len(self.masks) - 1) % 2 if self.masks else 0]
        self.in_time = not order.bits_reversed
        if not self.in_time:
            self.to_time = eye[:, order.times(C).to(empty.device)].expand(M, C, C)
            self.by_time = empty("T by time", M, C, C)
            self.inverse = empty("inverse by order", M, C, C)

    def compute(self, lower: Tensor) -> None:
        """Invert ``I + lower``, whose rows and columns have the tokens in the given order."""
        if not self.in_time:  # by products: to copy through so many short axes is far slower
            torch.matmul(lower, self.to_time[0].mT, out=self.product)
            lower = torch.bmm(self.to_time, self.product, out=self.by_time)
        inverse, other = self.stages
        inverse.copy_(self.eye)
        for level, mask in enumerate(self.masks):
            torch.mul(lower, mask, out=self.part)
            if level == 0:
                inverse.sub_(self.part)
                continue
            torch.bmm(self.part, inverse, out=self.product)
            torch.baddbmm(inverse, inverse, self.product, alpha=-1, out=other)
            inverse, other = other, inverse
        if not self.in_time:
            torch.matmul(inverse, self.to_time[0], out=self.product)
            torch.bmm(self.to_time.mT, self.product, out=self.inverse)


@cache
def _constants(C: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The unit matrix; for every h, 1 where rows of upper halves meet columns of lower ones."""
    token = torch.arange(C, device=device)
    masks: list[Tensor] = []
    while 2 ** len(masks) < C:
        block = token >> len(masks)
        meet = (block.unsqueeze(1) == block + 1) & (block % 2 == 0)
        masks.append(meet.to(dtype))
    return torch.eye(C, dtype=dtype, device=device), masks
