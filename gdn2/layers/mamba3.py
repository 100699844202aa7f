"""Mamba-3 (arXiv 2603.15569), SISO and MIMO: the gated delta rule without erase, a token late.

Axes: B batch, T time, N sequences, D model width, R rank (1: SISO), G groups of keys and queries,
H heads, K channels of a key, V channels of a value, A angles. Equation numbers are those of
docs/math.md.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.layers.mamba2 import count_heads
from gdn2.modules.gates import Gates, reset_step_bias, split_heads
from gdn2.modules.linear import OutputLinear
from gdn2.modules.norm import GroupedRMSNorm, RMSNorm
from gdn2.modules.rotary import rotate
from gdn2.ops import gated_delta_rule, gated_delta_step, shift
from gdn2.ops.contract import check_boundaries, no_autocast
from gdn2.ops.gated_delta_rule import MAX_STEP_TOKENS
from gdn2.ops.precision import upcast

SSM_DECAYS = ("softplus", "rational")
MOST_RANKS = MAX_STEP_TOKENS  # a step of R tokens
SLOWEST = 1e-4  # the smallest rate of decay, of mamba-ssm
Operator = Callable[..., tuple[Tensor, Tensor]]


class Mamba3State(NamedTuple):
    """What a Mamba-3 layer remembers of N sequences, whatever their lengths.

    state: U of (M3), ``[N, H, K, V]``, float32 (float64 in a float64 model), in which the last
        token is not yet written. Of that token:
    key: ``[N, R, H, K]``, rotated. value: ``[N, H, V]``. weight: zeta ``[N, H]``, as the state.
    angle: ``[N, H, A]`` in [0, 2 pi), as the state.
    """

    state: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    angle: Tensor

    @property
    def num_sequences(self) -> int:
        return self.state.shape[0]

    def select(self, index: Tensor) -> "Mamba3State":
        """The states of the sequences `index`, copied."""
        return Mamba3State(*(x[index] for x in self))


class Mamba3(nn.Module):
    """Mamba-3 (arXiv 2603.15569), with the parameter names of mamba-ssm.

        z, v, k, q, dt, a, lambda, theta = x W_in,    dt = softplus(dt + dt_bias)
        alpha = exp(-softplus(a) dt),    zeta = sigmoid(lambda) dt,    nu = dt - zeta
        k, q = RMSNorm(k) + B_bias, RMSNorm(q) + C_bias,  turned by the sum of pi dt tanh(theta)
        S_t = alpha_t (S_{t-1} + nu_t k_{t-1} v_{t-1}^T) + zeta_t k_t v_t^T,  o_t = S_t^T q_t   (M1)
        y = ((o + D * v) * silu(z)) W_out

    A value is written when the next token comes, with both of its weights at once, and reaches its
    own token beside the state (M3, M4). With a rank R there are R keys and queries a step, the
    values v * mimo_x and gates z * mimo_z, and outputs are summed with the weights mimo_o (M5).

    Args:
        hidden_size: D.
        inner_size: H V. head_dim: V. state_size: K. num_groups: G.
        mimo_rank: R, up to 16. Pairs of channels are rotated that lie side by side if it is 1, and
            half the channels apart if not, as mamba-ssm's kernels have it.
        rope_fraction: share of the channels of keys and queries that are rotated.
        ssm_decay: how the rate of decay follows from its map a: "softplus", or "rational" for
            1 + a (a >= 0) and 1 / (1 - a), as mamba-ssm has it since June 2026.
        output_norm: whether each head's output is normed before the gate.
        norm_eps: epsilon of the norms.
    """

    mimo_x: nn.Parameter  # [H, R, V], and so are the others; none if R is 1
    mimo_z: nn.Parameter
    mimo_o: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        *,
        head_dim: int = 64,
        state_size: int = 64,
        num_groups: int = 1,
        mimo_rank: int = 1,
        rope_fraction: float = 0.5,
        ssm_decay: str = "softplus",
        output_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if not 1 <= mimo_rank <= MOST_RANKS:
            raise ValueError(f"mimo_rank must be 1 to {MOST_RANKS}, got {mimo_rank}")
        if ssm_decay not in SSM_DECAYS:
            raise ValueError(f"ssm_decay must be one of {SSM_DECAYS}, got {ssm_decay!r}")
        self.num_heads = H = count_heads(inner_size, head_dim, num_groups)
        self.head_dim, self.state_size, self.num_groups = head_dim, state_size, num_groups
        self.mimo_rank, self.ssm_decay = mimo_rank, ssm_decay
        self.num_angles = count_angles(state_size, rope_fraction)
        keys = mimo_rank * num_groups * state_size
        self.sizes = [inner_size, inner_size, keys, keys, H, H, H, self.num_angles]

        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.B_bias = nn.Parameter(torch.empty(H, mimo_rank, state_size))
        self.C_bias = nn.Parameter(torch.empty(H, mimo_rank, state_size))
        self.B_norm = RMSNorm(state_size, norm_eps)
        self.C_norm = RMSNorm(state_size, norm_eps)
        self.D = nn.Parameter(torch.empty(H))
        if mimo_rank > 1:
            for name in ("mimo_x", "mimo_z", "mimo_o"):
                setattr(self, name, nn.Parameter(torch.empty(H, mimo_rank, head_dim)))
        self.norm = GroupedRMSNorm(inner_size, H, norm_eps) if output_norm else None
        self.out_proj = OutputLinear(inner_size, hidden_size, bias=False)
        self.gate_means: dict[str, Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw dt_bias; the others start at 1, or 1 / R; submodules know their own laws."""
        reset_step_bias(self.dt_bias)
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)
        if self.mimo_rank > 1:
            nn.init.constant_(self.mimo_x, 1 / self.mimo_rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / self.mimo_rank)

    @property
    def operator_flops(self) -> int:
        """Of a token: per entry of the state decay 1, write 2 R, read 2 R; and what is beside it.

        That is 2 (K + V) for each query and value that meet outside of the state.
        """
        R, K, V = self.mimo_rank, self.state_size, self.head_dim
        pairs = R * R + R * (R - 1) // 2
        return self.num_heads * ((1 + 4 * R) * K * V + pairs * 2 * (K + V))

    def forward(
        self, x: Tensor, *, state: Mamba3State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State]:
        """``x [B, T, D] -> (y [B, T, D], state)``; the given state is left as it is.

        cu_seqlens ``[N + 1]`` packs N sequences into one row; without it N = B.
        """
        N, maps = check_boundaries(cu_seqlens, x), self.in_proj(x)
        past = self._fresh(N, maps) if state is None else _of(N, state)
        ends = None if cu_seqlens is None else self.mimo_rank * cu_seqlens
        operate = partial(gated_delta_rule, state=past.state, cu_seqlens=ends)
        with no_autocast(maps):
            y, state = self._mix(maps, past, cu_seqlens, operate)
        return self.out_proj(y), state

    def step(self, x: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        """One token, ``x [B, D] -> (y [B, D], state)``; the state is updated in place."""
        operate = partial(gated_delta_step, state=_of(len(x), state).state)
        maps = self.in_proj(x).unsqueeze(1)
        with no_autocast(maps):
            y, new = self._mix(maps, state, None, operate)
        for old, last in zip(state[1:], new[1:], strict=True):
            old.copy_(last)
        return self.out_proj(y.squeeze(1)), state

    def _fresh(self, N: int, like: Tensor) -> Mamba3State:
        H, K, V = self.num_heads, self.state_size, self.head_dim
        wide = torch.promote_types(like.dtype, torch.float32)
        return Mamba3State(
            state=like.new_zeros(N, H, K, V, dtype=wide),
            key=like.new_zeros(N, self.mimo_rank, H, K),
            value=like.new_zeros(N, H, V),
            weight=like.new_zeros(N, H, dtype=wide),
            angle=like.new_zeros(N, H, self.num_angles, dtype=wide),
        )

    def _mix(
        self, maps: Tensor, past: Mamba3State, cu_seqlens: Tensor | None, operate: Operator
    ) -> tuple[Tensor, Mamba3State]:
        """All between the input and the output map; `operate` is the operator on `past`."""
        R, H = self.mimo_rank, self.num_heads
        z, value, B, C, dt, a, trap, theta = maps.split(self.sizes, -1)
        value, dt = split_heads(value, H), F.softplus(upcast(dt) + upcast(self.dt_bias))
        log_decay = -self._rate(upcast(a)).clamp(min=SLOWEST) * dt  # [B, T, H]
        zeta = upcast(trap).sigmoid() * dt  # what is left of dt was for the token before
        turn = math.pi * dt.unsqueeze(-1) * upcast(theta).tanh().unsqueeze(-2)
        angles, angle = accumulate(turn, past.angle, cu_seqlens)
        k = self._normed(self.B_norm, B, self.B_bias)  # [B, T, R, H, K]
        q = self._normed(self.C_norm, C, self.C_bias)
        k, q = rotate((k, q), angles.unsqueeze(2), adjacent=R == 1, dtype=maps.dtype)

        last_k, key = shift(k, past.key, cu_seqlens)
        last_value, last = shift(value, past.value, cu_seqlens)
        last_zeta, weight = shift(zeta, past.weight, cu_seqlens)
        write = log_decay.exp() * (last_zeta + dt - zeta)
        if self.training:
            self.gate_means = Gates(log_decay, None, write).means()
        v, last_v = self._values(value), self._values(last_value)  # [B, T, R, H, V]
        out, memory = operate(
            *(y.flatten(1, 2) for y in (q, last_k, last_v)),
            log_decay=F.pad(log_decay.unsqueeze(2), (0, 0, 0, R - 1)).flatten(1, 2),
            write=write.unsqueeze(2).expand(-1, -1, R, -1).flatten(1, 2),
        )
        own = zeta[..., None, None] * _scores(q, k) + torch.diag_embed(
            upcast(self.D).unsqueeze(-1).expand(H, R)
        )
        out = upcast(out).unflatten(1, (-1, R)) + _attend(own, v)
        if R > 1:  # of the writes of one step, the operator shows query r the first r
            unseen = write[..., None, None] * _scores(q, last_k).triu(1)
            out = out + _attend(unseen, last_v)
        return self._gated(out, z), Mamba3State(memory, key, last, weight, angle)

    def _rate(self, a: Tensor) -> Tensor:
        if self.ssm_decay == "softplus":
            return F.softplus(a)
        return torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))

    def _normed(self, norm: RMSNorm, x: Tensor, bias: Tensor) -> Tensor:
        """``x [B, T, R * G * K] -> [B, T, R, H, K]``: keys or queries of every head."""
        y = norm(upcast(x).unflatten(-1, (self.mimo_rank, self.num_groups, 1, -1)))
        bias = upcast(bias).transpose(0, 1).unflatten(1, (self.num_groups, -1))
        return (y + bias).flatten(-3, -2)  # [R, G, H / G, K] to [R, H, K]

    def _values(self, value: Tensor) -> Tensor:
        """``[B, T, H, V] -> [B, T, R, H, V]``."""
        value = value.unsqueeze(2)
        return value if self.mimo_rank == 1 else value * self.mimo_x.transpose(0, 1).to(value.dtype)

    def _gated(self, out: Tensor, z: Tensor) -> Tensor:
        """Norm and gate of ``out [B, T, R, H, V]``, and the sum over ranks, ``[B, T, H * V]``."""
        gate = upcast(split_heads(z, self.num_heads)).unsqueeze(2)
        if self.mimo_rank > 1:
            gate = gate * self.mimo_z.transpose(0, 1)
        y = out if self.norm is None else self.norm(out.flatten(-2)).view_as(out)
        y = y * F.silu(gate)
        if self.mimo_rank > 1:
            y = y * self.mimo_o.transpose(0, 1)
        return y.sum(2).flatten(-2).to(z.dtype)


def _of(N: int, state: Mamba3State) -> Mamba3State:
    if state.num_sequences != N:
        raise ValueError(f"state must be that of {N} sequences, got {state.num_sequences}")
    return state


def accumulate(turn: Tensor, angle: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The angles after each turn ``[B, T, H, A]``, modulo 2 pi, and the last, from ``[N, H, A]``.

    They are sums of all turns of a sequence, so they are added in float64; between calls they are
    float32. By the operator, as a memory with one key: it starts anew at every boundary, and gives
    the same bits each time, which a cumulative sum does not promise on a GPU.
    """
    B, T, H, A = turn.shape
    if T == 1 and cu_seqlens is None:
        angles = angle.unsqueeze(1).double() + turn.double()
        angles = angles.remainder(2 * math.pi).to(turn.dtype)
        return angles, angles[:, 0]
    one = turn.new_ones(B, T, 1, 1, dtype=torch.float64)
    total, last = gated_delta_rule(
        one,
        one,
        turn.double().reshape(B, T, 1, H * A),
        state=angle.double().reshape(-1, 1, 1, H * A),
        cu_seqlens=cu_seqlens,
        backend="chunked",
    )
    angles, last = (y.remainder(2 * math.pi).to(turn.dtype) for y in (total, last))
    return angles.view_as(turn), last.view_as(angle)


def count_angles(state_size: int, rope_fraction: float) -> int:
    """Pairs of channels that are rotated; ValueError if there is none, or a channel without one."""
    if state_size % 2:
        raise ValueError(f"state_size must be even (rotary pairs), got {state_size}")
    if not (0 < rope_fraction <= 1 and state_size * rope_fraction >= 2):
        raise ValueError(
            "rope_fraction must be in (0, 1] and rotate at least one pair of the "
            f"state_size = {state_size} channels, got {rope_fraction}"
        )
    return int(state_size * rope_fraction) // 2


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of every query and every key of a step, ``[B, T, H, R, R]``."""
    q, k = upcast(q), upcast(k)
    if q.shape[2] == 1:  # matrices of one number would take longer
        return torch.linalg.vecdot(q, k)[:, :, 0, :, None, None]
    return torch.einsum("btrhk,btshk->bthrs", q, k)


def _attend(scores: Tensor, v: Tensor) -> Tensor:
    if v.shape[2] == 1:
        return scores.squeeze(-1).unsqueeze(2) * upcast(v)
    return torch.einsum("bthrs,btshv->btrhv", scores, upcast(v))
