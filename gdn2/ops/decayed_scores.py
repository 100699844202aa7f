"""Scores between the rows and columns of a chunk under decay, for each rank of the decay.

Within a chunk, row r meets column s < r with everything decayed from s to r (Eq. 20):

    scores[r, y, s] = sum_d rows[r, y, d] k[s, d] exp(G[r, d] - G[s, d])     G: cumulative log-decay

where y runs over the kinds of row: the (negated) erase row, strictly lower triangular, and last the
query row, lower triangular. Each class below also decays the rows to the start of the chunk and k
to its end, as the scan over chunks wants them. `backward` differentiates all of it: from the
gradients of rows, tails and scores, which it may overwrite, and from each chunk's incoming state S
and the gradient dS of its outgoing one, to the gradients of the raw rows, k and log-decay.

The exponent of every exponential is <= 0 and no difference of long cumulative sums is formed.

Axes: M chunks times heads, C tokens a chunk, Y kinds of row (1 or 2), K key channels.
"""

import torch
from torch import Tensor

# exp() of anything lower is denormal or zero in float32, and slow; the factor changes by 2e-38.
_LOWEST = -87.0


class NoDecay:
    """No decay: plain masked scores."""

    def __init__(self, rows: Tensor, k: Tensor):
        self.rows, self.tails, self.total = rows, k, None
        self.scores = _masked_product(rows, k)

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, _S: Tensor, _dS: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        _mask_(dscores)
        drows += _rows_times(dscores, self.tails)
        dtails += _rows_transposed_times(dscores, self.rows)
        return drows, dtails, None


class HeadDecay:
    """One log-decay [M, C, 1] a head: the decay between two tokens is one C x C matrix."""

    def __init__(self, rows: Tensor, k: Tensor, log_decay: Tensor):
        C = k.shape[1]
        below = torch.ones(C, C, dtype=torch.bool, device=k.device).tril(-1)
        decay = log_decay.clamp(min=_LOWEST).exp_()
        # between[r, s] = product of decay over s < i <= r: exact to a few rounding errors however
        # strong the decay, which the exponential of a sum is not.
        self.between = decay.where(below, 1.0).cumprod(1).tril_()
        self.prefix = decay.cumprod(1)  # [M, C, 1]
        self.raw_rows, self.k = rows, k
        self.scores = _masked_product(rows, k).mul_(self.between.unsqueeze(2))
        self.rows = rows * self.prefix.unsqueeze(-1)
        self.tails = k * self.between[:, -1].unsqueeze(-1)
        self.total = self.prefix[:, -1]  # [M, 1]

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, S: Tensor, dS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _mask_(dscores)
        meetings = (self.scores * dscores).sum(2)  # [M, C, C]
        meetings.diagonal(dim1=1, dim2=2).zero_()  # a token meets itself undecayed
        at_end = (self.tails * dtails).sum(-1)
        dG = meetings.sum(2) - meetings.sum(1) + (self.rows * drows).sum((2, 3)) - at_end
        dG[:, -1] += at_end.sum(1) + (self.total * (dS * S).sum(-1)).sum(1)
        dscores *= self.between.unsqueeze(2)
        drows = (drows * self.prefix.unsqueeze(-1)).add_(_rows_times(dscores, self.k))
        dk = (dtails * self.between[:, -1].unsqueeze(-1)).add_(
            _rows_transposed_times(dscores, self.raw_rows)
        )
        return drows, dk, _reverse_cumsum(dG.unsqueeze(-1))


class ChannelDecay:
    """One log-decay [M, C, K] a key channel: blocks are merged pairwise, from single tokens up.

    A block of h tokens holds its rows decayed from its start and its columns decayed to its end.
    Where a lower block L meets an upper one U their product needs no further decay:

        scores[U, L] = rows_U k_L^T
        rows_U *= total_L    k_L *= total_U    total = total_L total_U

    All factors are products of exp(log_decay) <= 1: one exponential per token and channel. After
    the last merge, rows are decayed from the start of the whole chunk, columns to its end.
    """

    def __init__(self, rows: Tensor, k: Tensor, log_decay: Tensor, *, keep: bool):
        M, C, Y, K = rows.shape
        self.k = k
        self.decay = log_decay.clamp(min=_LOWEST).exp_()
        self.scores = rows.new_zeros(M, C, Y, C)
        self.scores[:, :, -1].diagonal(dim1=1, dim2=2).copy_((rows[:, :, -1] * k).sum(-1))
        self.raw_rows = rows
        self.rows = rows * self.decay.unsqueeze(2)
        self.tails = k.clone()
        self.merges: list[tuple[Tensor, Tensor, Tensor]] = []
        total = self.decay
        h = 1
        while h < C:
            total = total.view(-1, 2, 1, K)  # [M C / 2h, lower and upper, 1, K]
            upper = self.rows.view(-1, 2, h * Y, K)[:, 1]
            lower = self.tails.view(-1, 2, h, K)[:, 0]
            if keep:
                self.merges.append((upper.clone(), lower.clone(), total))
            met = (upper * lower).sum(-1, keepdim=True) if h == 1 else upper @ lower.mT
            _lower_left(self.scores, h).copy_(met.view(M, -1, h * Y, h).permute(0, 2, 3, 1))
            upper.mul_(total[:, 0])
            lower.mul_(total[:, 1])
            total = total[:, 0] * total[:, 1]
            h *= 2
        self.total = total.view(M, K)

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, S: Tensor, dS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, C, Y, K = drows.shape
        # The end of the chunk enters through the columns' decay to it and through the state's.
        dend = (self.tails * dtails).sum(1) + self.total * (dS * S).sum(-1)
        h = C // 2
        for upper, lower, total in reversed(self.merges):
            dmet = _lower_left(dscores, h).permute(0, 3, 1, 2).reshape(-1, h * Y, h)
            dupper = drows.view(-1, 2, h * Y, K)[:, 1]
            dlower = dtails.view(-1, 2, h, K)[:, 0]
            if h == 1:
                from_upper, from_lower = dmet * lower, (dmet * upper).sum(1, keepdim=True)
            else:
                from_upper, from_lower = dmet @ lower, dmet.mT @ upper
            torch.addcmul(from_upper, dupper, total[:, 0], out=dupper)
            torch.addcmul(from_lower, dlower, total[:, 1], out=dlower)
            h //= 2
        drows.mul_(self.decay.unsqueeze(2))
        # G_r multiplies row r and divides column r wherever they meet another token.
        dG = (self.raw_rows * drows).sum(2).addcmul_(self.k, dtails, value=-1)
        dlog_decay = _reverse_cumsum(dG).add_(dend.unsqueeze(1))
        itself = dscores[:, :, -1].diagonal(dim1=1, dim2=2).unsqueeze(-1)  # undecayed
        drows[:, :, -1].addcmul_(itself, self.k)
        dtails.addcmul_(itself, self.raw_rows[:, :, -1])
        return drows, dtails, dlog_decay


def _masked_product(rows: Tensor, k: Tensor) -> Tensor:
    """``rows k^T`` [M, C, Y, C] below the diagonal; the query rows have the diagonal too."""
    return _mask_((rows.flatten(1, 2) @ k.mT).unflatten(1, rows.shape[1:3]))


def _mask_(scores: Tensor) -> Tensor:
    scores[:, :, -1].tril_()
    if scores.shape[2] == 2:
        scores[:, :, 0].tril_(-1)
    return scores


def _rows_times(scores: Tensor, k: Tensor) -> Tensor:
    return (scores.flatten(1, 2) @ k).unflatten(1, scores.shape[1:3])


def _rows_transposed_times(scores: Tensor, rows: Tensor) -> Tensor:
    return scores.flatten(1, 2).mT @ rows.flatten(1, 2)


def _lower_left(scores: Tensor, h: int) -> Tensor:
    """View [M, h Y, h, C / 2h] of the blocks where upper halves of 2h tokens meet lower ones."""
    M, C, Y, _ = scores.shape
    blocks = scores.view(M, C // (2 * h), 2, h * Y, C // (2 * h), 2, h)
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)


def _reverse_cumsum(x: Tensor) -> Tensor:
    """``y_t = sum_{r >= t} x_r`` along dim 1, as a product: fast, and in an order fixed by C."""
    C = x.shape[1]
    return torch.ones(C, C, dtype=x.dtype, device=x.device).triu() @ x
