"""Scores between the rows and columns of a chunk under decay, for each rank of the decay.

Within a chunk, row r meets column s with everything decayed from s to r (Eqs. 20, 21):

    scores[r, y, s] = sum_d rows[r, y, d] k[s, d] exp(G[r, d] - G[s, d])     G: cumulative log-decay

where y runs over the kinds of row: the erase row (strictly lower triangular), if there is one, and
last the query row (lower triangular). Each class below also decays the rows from the start of the
chunk and k to its end, as the scan over chunks wants them; `rows` and `k` are overwritten by that.
`backward` differentiates all of it: from the gradients of rows, tails and scores, which it may
overwrite, and from each chunk's incoming state S and the gradient dS of its outgoing one (both
transposed, [M, W, K]), to the gradients of the raw rows, k and log-decay.

Every exponent is <= 0, and no difference of long cumulative sums is formed.

Axes: M chunks times heads, C tokens a chunk, Y kinds of row (1 or 2), K key channels.
"""

import torch
from torch import Tensor

from gdn2.ops.chunk_schedule import Workspace

# exp() of anything lower is denormal or zero in float32, and slow; the factor changes by 2e-38.
_LOWEST = -87.0


class NoDecay:
    """No decay: plain masked scores."""

    total = None

    def __init__(self, rows: Tensor, k: Tensor, empty: Workspace):
        self.rows, self.tails, self.raw_k, self.empty = rows, k, k, empty
        self.scores = _masked_product(rows, k, empty)

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, _S: Tensor, _dS: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        _mask_(dscores)
        _add_product(drows.flatten(1, 2), dscores.flatten(1, 2), self.tails, self.empty)
        _add_product(dtails, dscores.flatten(1, 2).mT, self.rows.flatten(1, 2), self.empty)
        return drows, dtails, None


class HeadDecay:
    """One log-decay [M, C, 1] a head: the decay between two tokens is one C x C matrix."""

    def __init__(self, rows: Tensor, k: Tensor, log_decay: Tensor, empty: Workspace, *, keep: bool):
        C = k.shape[1]
        self.empty = empty
        below = torch.ones(C, C, dtype=torch.bool, device=k.device).tril(-1)
        decay = log_decay.clamp_(min=_LOWEST).exp_()
        # between[r, s] = product of decay over s < i <= r: exact to a few rounding errors however
        # strong the decay, which the exponential of a sum is not.
        self.between = decay.where(below, 1.0).cumprod(1).tril_()
        self.prefix = decay.cumprod(1)  # [M, C, 1]
        self.scores = _masked_product(rows, k, empty).mul_(self.between.unsqueeze(2))
        if keep:
            self.raw_rows = empty("raw_rows", *rows.shape).copy_(rows)
            self.raw_k = empty("raw_k", *k.shape).copy_(k)
        self.rows = rows.mul_(self.prefix.unsqueeze(-1))
        self.tails = k.mul_(self.between[:, -1].unsqueeze(-1))
        self.total = self.prefix[:, -1]  # [M, 1]

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, S: Tensor, dS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _mask_(dscores)
        meetings = (self.scores * dscores).sum(2)  # [M, C, C]
        meetings.diagonal(dim1=1, dim2=2).zero_()  # a token meets itself undecayed
        at_end = _dot(self.tails, dtails, self.empty)
        dG = meetings.sum(2) - meetings.sum(1) - at_end
        dG += _dot(self.rows, drows, self.empty).sum(2)
        dG[:, -1] += at_end.sum(1) + (self.total * _column_dot(dS, S, self.empty)).sum(1)
        dscores.mul_(self.between.unsqueeze(2))
        drows.mul_(self.prefix.unsqueeze(-1))
        dtails.mul_(self.between[:, -1].unsqueeze(-1))
        _add_product(drows.flatten(1, 2), dscores.flatten(1, 2), self.raw_k, self.empty)
        _add_product(dtails, dscores.flatten(1, 2).mT, self.raw_rows.flatten(1, 2), self.empty)
        return drows, dtails, _reverse_cumsum(dG.unsqueeze(-1))


class ChannelDecay:
    """One log-decay [M, C, K] a key channel: blocks are merged pairwise, from single tokens up.

    A block of h tokens holds its rows decayed from its start and its columns decayed to its end.
    Where a lower block L meets an upper one U their product needs no further decay:

        scores[U, L] = rows_U k_L^T
        rows_U *= total_L    k_L *= total_U    total = total_L total_U

    All factors are products of exp(log_decay) <= 1: one exponential per token and channel. After
    the last merge, rows are decayed from the start of the whole chunk, columns to its end.
    """

    def __init__(self, rows: Tensor, k: Tensor, log_decay: Tensor, empty: Workspace, *, keep: bool):
        M, C, Y, K = rows.shape
        self.empty = empty
        self.decay = log_decay.clamp_(min=_LOWEST).exp_()
        self.scores = empty("scores", M, C, Y, C).zero_()
        itself = _dot(rows[:, :, -1], k, empty)
        self.scores[:, :, -1].diagonal(dim1=1, dim2=2).copy_(itself)
        if keep:
            self.raw_rows = empty("raw_rows", *rows.shape).copy_(rows)
            self.raw_k = empty("raw_k", *k.shape).copy_(k)
        self.rows, self.tails = rows.mul_(self.decay.unsqueeze(2)), k
        self.merges: list[tuple[Tensor, Tensor, Tensor]] = []
        total = self.decay
        h = 1
        while h < C:
            total = total.view(-1, 2, 1, K)  # [M C / 2h, lower and upper, 1, K]
            upper = self.rows.view(-1, 2, h * Y, K)[:, 1]
            lower = self.tails.view(-1, 2, h, K)[:, 0]
            if keep:
                self.merges.append(
                    (
                        empty(f"upper {h}", *upper.shape).copy_(upper),
                        empty(f"lower {h}", *lower.shape).copy_(lower),
                        total,
                    )
                )
            met = self._meet(upper, lower)
            _lower_left(self.scores, h).copy_(met.view(M, -1, h * Y, h).permute(0, 2, 3, 1))
            upper.mul_(total[:, 0])
            lower.mul_(total[:, 1])
            h *= 2
            merged = empty(f"total {h}", len(total), 1, K)
            total = torch.mul(total[:, 0], total[:, 1], out=merged)
        self.total = total.view(M, K)

    def _meet(self, upper: Tensor, lower: Tensor) -> Tensor:
        """``upper lower^T`` of many small blocks [b, h Y, K] and [b, h, K], in BLAS's best form."""
        b, h, K = lower.shape
        if h == 1:
            return _dot(upper, lower, self.empty).unsqueeze(-1)
        columns = lower.mT
        if h > 2:  # MKL is up to ten times faster where it need not transpose such small factors
            columns = self.empty("columns", b, K, h).copy_(columns)
        return torch.bmm(upper, columns, out=self.empty("met", b, upper.shape[1], h))

    def backward(
        self, drows: Tensor, dtails: Tensor, dscores: Tensor, S: Tensor, dS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, C, Y, K = drows.shape
        empty = self.empty
        # The end of the chunk enters through the columns' decay to it and through the state's.
        dend = _column_dot(self.tails, dtails, empty)
        dend.addcmul_(self.total, _column_dot(dS, S, empty))
        h = C // 2
        for upper, lower, total in reversed(self.merges):
            met = empty("met", len(upper), h * Y, h)
            met.view(len(drows), -1, h * Y, h).copy_(_lower_left(dscores, h).permute(0, 3, 1, 2))
            dupper = drows.view(-1, 2, h * Y, K)[:, 1].mul_(total[:, 0])
            dlower = dtails.view(-1, 2, h, K)[:, 0].mul_(total[:, 1])
            if h == 1:
                dupper.addcmul_(met, lower)
                dlower.add_(torch.mul(met, upper, out=empty("product", *upper.shape)).sum(1, True))
            else:
                _add_product(dupper, met, lower, empty)
                _add_product(dlower, met.mT, upper, empty)
            h //= 2
        drows.mul_(self.decay.unsqueeze(2))
        # G_r multiplies row r and divides column r wherever they meet another token.
        dG = torch.mul(self.raw_k, dtails, out=empty("product", *dtails.shape)).neg_()
        for y in range(Y):
            dG.addcmul_(self.raw_rows[:, :, y], drows[:, :, y])
        dlog_decay = _reverse_cumsum(dG).add_(dend.unsqueeze(1))
        itself = dscores[:, :, -1].diagonal(dim1=1, dim2=2).unsqueeze(-1)  # undecayed
        drows[:, :, -1].addcmul_(itself, self.raw_k)
        dtails.addcmul_(itself, self.raw_rows[:, :, -1])
        return drows, dtails, dlog_decay


def _masked_product(rows: Tensor, k: Tensor, empty: Workspace) -> Tensor:
    """``rows k^T`` [M, C, Y, C] below the diagonal; the query rows have the diagonal too."""
    M, C, Y, _ = rows.shape
    scores = empty("scores", M, C, Y, C)
    torch.bmm(rows.flatten(1, 2), k.mT, out=scores.flatten(1, 2))
    return _mask_(scores)


def _mask_(scores: Tensor) -> Tensor:
    scores[:, :, -1].tril_()
    if scores.shape[2] == 2:
        scores[:, :, 0].tril_(-1)
    return scores


def _dot(a: Tensor, b: Tensor, empty: Workspace) -> Tensor:
    """``(a * b).sum(-1)``, broadcast."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return torch.mul(a, b, out=empty("product", *shape)).sum(-1)


def _column_dot(a: Tensor, b: Tensor, empty: Workspace) -> Tensor:
    """``(a * b).sum(1)``."""
    return torch.mul(a, b, out=empty("product", *a.shape)).sum(1)


def _add_product(x: Tensor, a: Tensor, b: Tensor, empty: Workspace) -> None:
    """``x += a @ b``; x may have strides, into which a batched product itself would be slow."""
    x.add_(torch.bmm(a, b, out=empty("product", *x.shape)))


def _lower_left(scores: Tensor, h: int) -> Tensor:
    """View [M, h Y, h, C / 2h] of the blocks where upper halves of 2h tokens meet lower ones."""
    M, C, Y, _ = scores.shape
    blocks = scores.view(M, C // (2 * h), 2, h * Y, C // (2 * h), 2, h)
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3)


def _reverse_cumsum(x: Tensor) -> Tensor:
    """``y_t = sum_{r >= t} x_r`` along dim 1, as a product: fast, and in an order fixed by C."""
    C = x.shape[1]
    return torch.ones(C, C, dtype=x.dtype, device=x.device).triu() @ x
