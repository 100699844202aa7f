"""Scores between the rows and columns of a chunk under decay, for each rank of the decay.

Within a chunk, row r meets column s with everything decayed from s to r (Eqs. 20, 21):

    scores[r, s] = sum_d rows[r, d] k[s, d] exp(G[r, d] - G[s, d])     G: cumulative log-decay

for the erase rows, if there are any (strictly lower triangular), and for the query rows (lower
triangular). Each class below also decays the rows from the start of the chunk and k to its end, as
the scan over chunks wants them, and differentiates all of it.

An instance serves all segments of one shape: its buffers and views are made once. The caller fills

    raw_rows, raw_k, log_decay        then `forward` makes the scores, rows, tails, total
    drows, dk, dscores                then `backward` turns drows, dk into those of the raw ones

where `drows`, `dk` come as gradients of `rows` and `tails`. Every exponent is <= 0, and no
difference of long cumulative sums is formed.

Axes: M chunks times heads, C tokens a chunk, Y kinds of row (erase, query), K key channels. Buffers
of the key side have the tokens of a chunk first, so that an operation runs over M K consecutive
numbers. Everywhere the tokens lie in time, or by reversed bits (see `TokenOrder`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn2.ops.chunk_schedule import TokenOrder, Workspace
from gdn2.ops.triangular import BlockInverse


def smallest_factor(dtype: torch.dtype) -> float:
    """Decays, and rows and columns that decayed, are zero where they are smaller than this.

    Denormal numbers are up to a hundred times slower, in products above all. The margin keeps
    products with keys and states out of that range too.
    """
    return 1e-300 if dtype == torch.float64 else 1e-30


class NoDecay:
    """No decay: plain masked scores.

    Attributes:
        raw_rows, rows: ``[Y, C, M, K]``, as given, and decayed from the chunk's start.
        raw_k, tails: ``[C, M, K]``, as given, and decayed to the chunk's end.
        total: ``[M, K or 1]``, the decay over a whole chunk; None without decay.
        query_scores: ``[M, C, C]``.
        block_inverse: that of the erase scores, where there are erase rows.
        drows, dk, dscores: gradients, as rows, raw_k, and ``[M, Y C, C]``.
    """

    bits_reversed = False
    total: Tensor | None = None

    def __init__(self, Y: int, C: int, M: int, K: int, empty: Workspace, *, keep: bool):
        self.empty = empty
        self.raw_rows = self.rows = empty("raw rows", Y, C, M, K)
        self.raw_k = self.tails = empty("raw k", C, M, K)
        self.log_decay = empty("decay", C, M, 0)
        self.scores = empty("scores", M, Y * C, C)
        self.query_scores = self.scores[:, -C:]
        order = TokenOrder(C, bits_reversed=False)
        self.block_inverse = BlockInverse(M, C, order, empty) if Y == 2 else None
        if keep:
            self.drows, self.dk, self.dscores = _gradients(Y, C, M, K, empty)

    def forward(self) -> None:
        self._meet()
        self._invert()

    def _meet(self) -> None:
        k = self.raw_k.permute(1, 2, 0)
        columns = self.empty("columns", *k.shape).copy_(k)
        torch.bmm(_by_chunk(self.raw_rows), columns, out=self.scores)
        _mask_(self.scores)

    def _invert(self) -> None:
        if self.block_inverse is not None:
            self.block_inverse.compute(self.scores[:, : self.scores.shape[2]])

    def backward(self) -> Tensor | None:
        """Returns the gradient of G, ``[C, M, K or 1]``, in this class's order."""
        _mask_(self.dscores)
        self._add_score_gradients()
        return None

    def _add_score_gradients(self) -> None:
        M, rows, C = self.dscores.shape
        K = self.dk.shape[-1]
        product = self.empty("product", M, rows, K)
        torch.bmm(self.dscores, self.raw_k.transpose(0, 1), out=product)
        self.drows.flatten(0, 1).add_(product.transpose(0, 1))
        product = self.empty("product", M, C, K)
        torch.bmm(self.dscores.mT, _by_chunk(self.raw_rows), out=product)
        self.dk.add_(product.transpose(0, 1))


class HeadDecay(NoDecay):
    """One log-decay ``[C, M, 1]`` a head: the decay between two tokens is one C x C matrix."""

    def __init__(self, Y: int, C: int, M: int, K: int, empty: Workspace, *, keep: bool):
        super().__init__(Y, C, M, K, empty, keep=keep)
        self.log_decay = empty("decay", C, M, 1)
        self.rows = empty("rows", Y, C, M, K)
        self.tails = empty("tails", C, M, K)
        self.prefix = empty("prefix", C, M, 1)
        self.total = self.prefix[-1]
        self.below = torch.ones(C, C, dtype=torch.bool, device=empty.device).tril(-1)

    def forward(self) -> None:
        self._meet()
        M, _, C = self.scores.shape
        decay, tiny = self.log_decay.exp_(), smallest_factor(self.log_decay.dtype)
        # between[r, s] = product of decay over s < i <= r: exact to a few rounding errors however
        # strong the decay, which the exponential of a sum is not.
        between = decay.transpose(0, 1).where(self.below, 1.0).cumprod(1).tril_()  # [M, C, C]
        self.between = F.threshold(between, tiny, 0.0, inplace=True)
        F.threshold(torch.cumprod(decay, 0, out=self.prefix), tiny, 0.0, inplace=True)
        self.to_end = self.between[:, -1].t().unsqueeze(-1)  # [C, M, 1]
        self.scores.view(M, -1, C, C).mul_(self.between.unsqueeze(1))
        torch.mul(self.raw_rows, self.prefix, out=self.rows)
        torch.mul(self.raw_k, self.to_end, out=self.tails)
        self._invert()

    def backward(self) -> Tensor:
        M, _, C = self.dscores.shape
        _mask_(self.dscores)
        self.dscores.view(M, -1, C, C).mul_(self.between.unsqueeze(1))
        self.drows.mul_(self.prefix)
        self.dk.mul_(self.to_end)
        diagonal = self.dscores[:, -C:].diagonal(dim1=1, dim2=2)
        itself = diagonal.t().unsqueeze(-1).clone()
        diagonal.zero_()
        self._add_score_gradients()
        return _decay_gradient(self, itself).sum(-1, keepdim=True)


class ChannelDecay:
    """One log-decay ``[C, M, K]`` a key channel: blocks are merged pairwise, from single tokens up.

    A block of h tokens holds its rows decayed from its start and its columns decayed to its end.
    Where a lower block L meets an upper one U their product needs no further decay:

        scores[U, L] = rows_U k_L^T
        rows_U *= total_L    k_L *= total_U    total = total_L total_U

    All factors are products of exp(log_decay) <= 1: one exponential per token and channel. After
    the last merge, rows are decayed from the start of the whole chunk, columns to its end.
    Attributes as in `NoDecay`.
    """

    bits_reversed = True

    def __init__(self, Y: int, C: int, M: int, K: int, empty: Workspace, *, keep: bool):
        self.empty, self.keep = empty, keep
        self.raw_rows = self.rows = empty("raw rows", Y, C, M, K)
        self.raw_k = self.tails = empty("raw k", C, M, K)
        if keep:
            self.rows, self.tails = empty("rows", Y, C, M, K), empty("tails", C, M, K)
            self.drows, self.dk, self.dscores = _gradients(Y, C, M, K, empty)
        self.log_decay = self.decay = empty("decay", C, M, K)
        self.query_scores = empty("query scores", M, C, C, zero=True)  # stays so in the future
        self.itself = self.query_scores.diagonal(dim1=1, dim2=2).t()  # [C, M]
        self.block_inverse = None
        if Y == 2:
            order = TokenOrder(C, bits_reversed=True)
            self.block_inverse = BlockInverse(M, C, order, empty)
            self.erase_scores = empty("erase scores", M, C, C, zero=True)
        self.total = self.decay
        self.merges = []
        while len(self.total) > 1:
            self.merges.append(_Merge(self, C // len(self.total)))
            self.total = self.merges[-1].total
        self.total = self.total.squeeze(0)

    def forward(self) -> None:
        F.threshold(self.decay.exp_(), smallest_factor(self.decay.dtype), 0.0, inplace=True)
        product = self.empty("product", *self.raw_k.shape)
        torch.mul(self.raw_rows[-1], self.raw_k, out=product)
        self.itself.copy_(product.sum(-1))
        torch.mul(self.raw_rows, self.decay, out=self.rows)
        if self.keep:
            self.tails.copy_(self.raw_k)
        for merge in self.merges:
            merge.forward()
        for x in (self.rows, self.tails):
            torch.ops.aten.hardshrink.out(x, smallest_factor(x.dtype), out=x)
        if self.block_inverse is not None:
            self.block_inverse.compute(self.erase_scores)

    def backward(self) -> Tensor:
        for merge in reversed(self.merges):
            merge.backward()
        self.drows.mul_(self.decay)
        C = len(self.dk)
        itself = self.dscores[:, -C:].diagonal(dim1=1, dim2=2).t()
        return _decay_gradient(self, itself.unsqueeze(-1))


class _Merge:
    """Pairs of blocks of h tokens become blocks of 2h.

    Tokens lie by reversed bits: along ``[h, 2, J, M]`` come the place in the block, lower or upper,
    the pair (J = C / 2h of them), and the chunk. All pairs of all chunks are b = J M products.
    """

    def __init__(self, x: ChannelDecay, h: int):
        Y, C, M, K = x.rows.shape
        J = C // (2 * h)
        b, empty = J * M, x.empty
        self.h, self.keep = h, x.keep
        self.total_lower, self.total_upper = x.total.view(2, b, K)
        self.total = empty(f"total {2 * h}", J, M, K)
        self.merged = self.total.view(b, K)
        self.upper = x.rows.view(Y * h, 2, b, K)[:, 1]
        self.lower = x.tails.view(h, 2, b, K)[:, 0]
        # Of one token: a sum. Of two and four: columns by rows; of more: rows by columns, which are
        # copied first. MKL is up to ten times slower in other forms of such small products.
        self.swapped = 1 < h <= 4
        self.rows, self.columns = self.upper.transpose(0, 1), self.lower.permute(1, 2, 0)
        if h == 1:
            self.product, self.met = empty("product", Y, b, K), empty("met", Y, b)
            met = self.met.view(Y, J, M, 1, 1).permute(1, 2, 0, 3, 4)
        elif self.swapped:
            self.met = empty("met", b, h, Y * h)
            met = self.met.view(J, M, h, Y, h).permute(0, 1, 3, 4, 2)
        else:
            self.own_columns, self.met = empty("columns", b, K, h), empty("met", b, Y * h, h)
            met = self.met.view(J, M, Y, h, h)
        self.places = [(_meeting_places(x.query_scores, h), met[:, :, -1])]
        if x.block_inverse is not None:
            self.places.append((_meeting_places(x.erase_scores, h), met[:, :, 0]))
        if x.keep:
            self.kept_upper = empty(f"upper {h}", Y * h, b, K)
            self.kept_lower = empty(f"lower {h}", h, b, K)
            self.dupper = x.drows.view(Y * h, 2, b, K)[:, 1]
            self.dlower = x.dk.view(h, 2, b, K)[:, 0]
            self.dmet = empty("dmet", b, Y * h, h)
            places = [_meeting_places(scores, h) for scores in x.dscores.split(C, 1)]
            self.dplaces = list(zip(self.dmet.view(J, M, Y, h, h).unbind(2), places, strict=True))
            self.dproducts = empty("product", b, Y * h, K), empty("other product", b, h, K)

    def forward(self) -> None:
        if self.keep:
            self.kept_upper.copy_(self.upper)
            self.kept_lower.copy_(self.lower)
        if self.h == 1:
            torch.mul(self.upper, self.lower, out=self.product)
            torch.sum(self.product, -1, out=self.met)
        elif self.swapped:
            torch.bmm(self.columns.mT, self.rows.mT, out=self.met)
        else:
            torch.bmm(self.rows, self.own_columns.copy_(self.columns), out=self.met)
        for place, met in self.places:
            place.copy_(met)
        self.upper.mul_(self.total_lower)
        self.lower.mul_(self.total_upper)
        torch.mul(self.total_lower, self.total_upper, out=self.merged)
        F.threshold(self.merged, smallest_factor(self.merged.dtype), 0.0, inplace=True)

    def backward(self) -> None:
        for met, place in self.dplaces:
            met.copy_(place)
        if self.h == 1:
            self.dupper.mul_(self.total_lower)
            self.dlower.mul_(self.total_upper)
            met = self.dmet.transpose(0, 1)  # [Y, b, 1]
            self.dupper.addcmul_(met, self.kept_lower)
            for dscore, row in zip(met, self.kept_upper, strict=True):
                self.dlower.addcmul_(dscore, row)
            return
        by_row, by_column = self.dproducts
        torch.bmm(self.dmet, self.kept_lower.transpose(0, 1), out=by_row)
        torch.bmm(self.dmet.mT, self.kept_upper.transpose(0, 1), out=by_column)
        torch.addcmul(by_row.transpose(0, 1), self.dupper, self.total_lower, out=self.dupper)
        torch.addcmul(by_column.transpose(0, 1), self.dlower, self.total_upper, out=self.dlower)


def _gradients(Y: int, C: int, M: int, K: int, empty: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    return empty("drows", Y, C, M, K), empty("dk", C, M, K), empty("dscores", M, Y * C, C)


def _decay_gradient(x: HeadDecay | ChannelDecay, itself: Tensor) -> Tensor:
    """dG; then add the gradients where a token meets itself, `itself` ``[C, M, 1]``.

    G_r multiplies row r and divides column r wherever they meet another token.
    """
    dG = torch.mul(x.raw_k, x.dk, out=x.empty("product", *x.dk.shape)).neg_()
    for raw, gradient in zip(x.raw_rows, x.drows, strict=True):
        dG.addcmul_(raw, gradient)
    x.drows[-1].addcmul_(itself, x.raw_k)
    x.dk.addcmul_(itself, x.raw_rows[-1])
    return dG


def _by_chunk(rows: Tensor) -> Tensor:
    """View ``[Y, C, M, K]`` as ``[M, Y C, K]``."""
    return rows.flatten(0, 1).transpose(0, 1)


def _mask_(scores: Tensor) -> Tensor:
    """Zero what is not below the diagonal (query rows: above it) of ``[M, Y C, C]``."""
    C = scores.shape[2]
    scores[:, -C:].tril_()
    if scores.shape[1] > C:
        scores[:, :C].tril_(-1)
    return scores


def _meeting_places(scores: Tensor, h: int) -> Tensor:
    """View of ``scores [M, C, C]`` where upper halves of blocks of 2h tokens meet lower ones.

    Shape ``[J, M, h, h]``, as `_Merge` has the pairs.
    """
    M, C, _ = scores.shape
    split = scores.view(M, h, 2, C // (2 * h), h, 2, C // (2 * h))
    meet = split.select(2, 1).select(4, 0)  # [M, h, J, h, J]
    return meet.diagonal(dim1=2, dim2=4).permute(3, 0, 1, 2)
