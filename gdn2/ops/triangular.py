"""Inverses of many small unit lower triangular matrices by block substitution."""

import torch
from torch import Tensor

_BASE = 16


def invert_unit_lower(lower: Tensor) -> Tensor:
    """``(I + T)^-1`` for strictly lower triangular T = `lower` [M, C, C]; C a power of two.

    The inverses of the diagonal blocks of h rows give those of 2h rows, exactly:

        A_21 = -A_22 T_21 A_11

    up to 16 rows on all blocks at once, under a mask. A Neumann series would not do: its terms
    grow like binomials where keys repeat, and cancel.
    """
    M, C, _ = lower.shape
    base = min(_BASE, C)
    blocks = lower.unflatten(1, (-1, base)).unflatten(3, (-1, base)).diagonal(dim1=1, dim2=3)
    blocks = blocks.permute(0, 3, 1, 2).reshape(-1, base, base)
    index = torch.arange(base, device=lower.device)
    inverse = torch.eye(base, dtype=lower.dtype, device=lower.device).expand_as(blocks)
    h = 1
    while h < base:
        # The rows of the upper half of a block of 2h meet the columns of its lower half.
        meet = (index[:, None] // h == index // h + 1) & (index // h % 2 == 0)
        part = blocks * meet.to(lower.dtype)
        if h == 1:
            inverse = inverse - part
        else:
            inverse = torch.baddbmm(inverse, torch.bmm(inverse, part), inverse, alpha=-1)
        h *= 2
    if base == C:
        return inverse.contiguous()
    full = lower.new_zeros(M, C, C)
    on_diagonal = full.view(M, C // base, base, C // base, base).diagonal(dim1=1, dim2=3)
    on_diagonal.copy_(inverse.view(M, -1, base, base).permute(0, 2, 3, 1))
    while h < C:
        for first in range(0, C, 2 * h):
            low, up = slice(first, first + h), slice(first + h, first + 2 * h)
            right = torch.bmm(lower[:, up, low], full[:, low, low])
            full[:, up, low] = torch.bmm(full[:, up, up], right).neg_()
        h *= 2
    return full
