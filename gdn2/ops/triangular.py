"""Inverses of many small unit lower triangular matrices by block substitution."""

import torch
from torch import Tensor

_BASE = 16


def invert_unit_lower(negated: Tensor) -> Tensor:
    """``(I - N)^-1`` for strictly lower triangular N = `negated` [M, C, C]; C a power of two.

    The inverses of the diagonal blocks of h rows give those of 2h rows, exactly:

        A_21 = A_22 N_21 A_11

    up to 16 rows on all blocks at once, under a mask. A Neumann series would not do: its terms
    grow like binomials where keys repeat, and cancel.
    """
    M, C, _ = negated.shape
    base = min(_BASE, C)
    blocks = negated.reshape(M, C // base, base, C // base, base).diagonal(dim1=1, dim2=3)
    blocks = blocks.permute(0, 3, 1, 2).reshape(-1, base, base)
    inverse = torch.eye(base, dtype=negated.dtype, device=negated.device).expand_as(blocks)
    h = 1
    while h < base:
        lower_left = blocks * _lower_left_mask(base, h, blocks)
        if h == 1:
            inverse = inverse + lower_left
        else:
            inverse = torch.baddbmm(inverse, inverse @ lower_left, inverse)
        h *= 2
    if base == C:
        return inverse.contiguous()
    full = negated.new_zeros(M, C // base, base, C // base, base)
    full.diagonal(dim1=1, dim2=3).copy_(inverse.view(M, -1, base, base).permute(0, 2, 3, 1))
    full = full.view(M, C, C)
    while h < C:
        pairs = (M, C // (2 * h), 2, h, C // (2 * h), 2, h)
        known, given = (
            x.reshape(pairs).diagonal(dim1=1, dim2=4).movedim(-1, 1) for x in (full, negated)
        )  # [M, C / 2h, 2, h, 2, h]
        upper, lower = (known[:, :, i, :, i].flatten(0, 1) for i in (1, 0))
        known[:, :, 1, :, 0] = (upper @ given[:, :, 1, :, 0].flatten(0, 1) @ lower).unflatten(
            0, (M, -1)
        )
        h *= 2
    return full


def _lower_left_mask(size: int, h: int, like: Tensor) -> Tensor:
    """Ones where the upper half of a block of 2h rows meets the block's lower half."""
    index = torch.arange(size, device=like.device)
    row, column = index[:, None], index
    same = row // (2 * h) == column // (2 * h)
    return (same & (row % (2 * h) >= h) & (column % (2 * h) < h)).to(like.dtype)
