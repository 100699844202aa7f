"""Where the kernels find things: rows of operands, and pieces (chunks, segments) of sequences."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def first_piece(n, start, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The number of the first piece of L tokens of a sequence.

    A pack numbers pieces with gaps, so that none needs to know how many come before it: sequence n,
    which starts at token `start` of the pack, has the numbers from start // L + n on. They suffice:
    the next one's begin ceil(length / L) later or more.
    """
    return start // L + n if PACKED else n * tl.maximum(tl.cdiv(T, L), 1)


@triton.jit
def locate(piece, cu_seqlens, N, T, L: tl.constexpr, PACKED: tl.constexpr):
    """The sequence of a piece of L tokens, that sequence's start and length, and its first token.

    Each of the N sequences has at least one piece. A number that no sequence needs starts at its
    sequence's end or beyond.
    """
    if PACKED:
        # The last sequence whose pieces begin here or before.
        n = piece * 0
        after = n + N
        while n + 1 < after:
            middle = (n + after) // 2
            begins = first_piece(middle, tl.load(cu_seqlens + middle), T, L, PACKED) <= piece
            n = tl.where(begins, middle, n)
            after = tl.where(begins, after, middle)
        n = n.to(tl.int64)
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - start).to(tl.int32)
    else:
        n = (piece // tl.maximum(tl.cdiv(T, L), 1)).to(tl.int64)
        start = n * T
        length = T
    before = (piece - first_piece(n, start, T, L, PACKED)).to(tl.int32) * L
    return n, start, length, before


@triton.jit
def load_rows(x, first, r, stride, channel, mask):
    """``x[first + r, channel]`` as a tile, zero where masked; channels of all heads are numbered.

    `first` alone is of 64 bits: offsets within a tile take half the registers.
    """
    return tl.load(x + first * stride + r[:, None] * stride + channel[None, :], mask, other=0.0)


@triton.jit
def load_transposed(x, first, r, stride, channel, live):
    """``x[first + r, channel]`` in float32 with tokens as columns, zero where they are not live."""
    return tl.trans(load_rows(x, first, r, stride, channel, live[:, None])).to(tl.float32)


@triton.jit
def store_rows(x, first, r, stride, channel, tile, mask):
    """``x[first + r, channel] = tile``."""
    to = x + first * stride + r[:, None] * stride + channel[None, :]
    tl.store(to, tile.to(x.dtype.element_ty), mask)


@triton.jit
def load_tokens(x, first, r, stride, head, mask):
    """``x[first + r, head]`` in float32, zero where masked: one number a token."""
    return tl.load(x + (first + r) * stride + head, mask, other=0.0).to(tl.float32)


@triton.jit
def load_gate(gate, first, r, stride, head, c, live, K: tl.constexpr, FORM: tl.constexpr):
    """A head's gate in float32 with tokens as columns: [BK, C] of the channels c, or [1, C]."""
    if FORM == 2:
        x = load_transposed(gate, first, r, stride, head * K + c, live)
    else:
        x = load_tokens(gate, first, r, stride, head, live)[None, :]
    return x


@triton.jit
def store_tokens(x, first, r, stride, head, column, mask):
    """``x[first + r, head] = column``."""
    to = x + (first + r) * stride + head
    tl.store(to, column.to(x.dtype.element_ty), mask)


@triton.jit
def load_start(starts, first, kc, vc, V, mask, TRANSFER: tl.constexpr, HAS_STARTS: tl.constexpr):
    """The state that a scan starts from; of a TRANSFER zeros, then as many columns of identity."""
    if TRANSFER:
        S = tl.where(kc[:, None] == (vc - V)[None, :], 1.0, 0.0)
    elif HAS_STARTS:
        S = load_rows(starts, first, kc, V, vc, mask)
    else:
        S = tl.zeros([kc.shape[0], vc.shape[0]], tl.float32)
    return S


def pieces(B: int, T: int, cu_seqlens: Tensor | None, L: int) -> int:
    """How many numbers the pieces of L tokens have (`locate`), whatever the packed lengths are."""
    if cu_seqlens is None:
        return B * max(triton.cdiv(T, L), 1)
    return T // L + len(cu_seqlens) - 1


def rows(x: Tensor) -> Tensor:
    """Tokens at one stride, the heads and channels of each side by side: x itself if it is so."""
    B, T = x.shape[:2]
    if x.numel() and x[0, 0].is_contiguous() and (B == 1 or x.stride(0) == T * x.stride(1)):
        return x
    return x.contiguous()


def matrix(x: Tensor, width: int | None = None) -> Tensor:
    """x as ``[rows, width]``, the numbers of a row side by side: x's memory if it is so.

    width: None for the channels of all heads where tokens lie apart, else for the last axis.
    """
    if width is None:
        apart = x.ndim > 2 and x.stride(-2) == x.shape[-1] and not x.is_contiguous()
        width = x.shape[-2:].numel() if apart else x.shape[-1:].numel()
    x = x.reshape(x.numel() // max(width, 1), width)
    return x if x.stride(1) == 1 else x.contiguous()
