"""Mamba-2 (arXiv 2405.21060): the gated delta rule without erase.

Axes: B batch, T time, N sequences, D model width, G groups (key heads), HV value heads (a multiple
of G), K channels of a key, V channels of a value, W taps of the short convolution.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn2.modules.gates import Gates, reset_rate, reset_step_bias, split_heads
from gdn2.modules.linear import OutputLinear
from gdn2.modules.norm import GroupedRMSNorm
from gdn2.ops import causal_conv_step, gated_delta_rule, gated_delta_step, normed_conv
from gdn2.ops.precision import upcast


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers of N sequences, whatever their lengths.

    state: ``[N, HV, K, V]``, float32 (float64 in a float64 model).
    conv: ``[N, HV V + 2 G K, W - 1]``, the last inputs of the short convolution.
    """

    state: Tensor
    conv: Tensor

    @property
    def num_sequences(self) -> int:
        return self.state.shape[0]

    def select(self, index: Tensor) -> "Mamba2State":
        """The states of the sequences `index`, copied."""
        return Mamba2State(*(x[index] for x in self))


class Mamba2(nn.Module):
    """Mamba-2, with the parameter names of mamba-ssm.

        z, (v, k, q), dt = x W_in,    v, k, q = silu(conv(v, k, q)),    dt = softplus(dt + dt_bias)
        S_t = exp(-exp(A_log) dt_t) S_{t-1} + k_t (dt_t v_t)^T,    o_t = S_t^T q_t        (Eq. 4)
        y = RMSNorm((o + D * v) * silu(z)) W_out

    Args:
        hidden_size: D.
        inner_size: HV V. head_dim: V. state_size: K. num_groups: G, also of the norm.
        conv_size: W. conv_bias: whether the convolution adds a bias.
        norm_eps: epsilon of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        inner_size: int,
        *,
        head_dim: int = 64,
        state_size: int = 64,
        num_groups: int = 1,
        conv_size: int = 4,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.num_heads, self.num_groups = count_heads(inner_size, head_dim, num_groups), num_groups
        self.inner_size, self.state_size = inner_size, state_size
        keys = num_groups * state_size
        convolved = inner_size + 2 * keys
        self.sizes = [inner_size, convolved, self.num_heads]
        self.convolved_sizes = [inner_size, keys, keys]

        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(convolved, convolved, conv_size, groups=convolved, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GroupedRMSNorm(inner_size, num_groups, norm_eps)
        self.out_proj = OutputLinear(inner_size, hidden_size, bias=False)
        self.gate_means: dict[str, Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A_log and dt_bias, D is 1; submodules know their own laws."""
        reset_rate(self.A_log, 1.0, 16.0)
        reset_step_bias(self.dt_bias)
        nn.init.ones_(self.D)

    @property
    def operator_flops(self) -> int:
        """Of a token, per entry of the state: decay 1, write 2, read 2."""
        return 5 * self.state_size * self.inner_size

    def forward(
        self, x: Tensor, *, state: Mamba2State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """``x [B, T, D] -> (y [B, T, D], state)``; the given state is left as it is.

        cu_seqlens ``[N + 1]`` packs N sequences into one row; without it N = B.
        """
        z, vkq, dt = self._project(x)
        past = None if state is None else state.conv
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        vkq, conv = normed_conv(
            vkq,
            weight,
            bias,
            norm_channels=0,
            head_dim=self.inner_size // self.num_heads,
            state=past,
            cu_seqlens=cu_seqlens,
        )
        q, k, v = self._split(vkq)
        gates = self.gates(dt)
        if self.training:
            self.gate_means = gates.means()
        past = None if state is None else state.state
        out, memory = gated_delta_rule(
            q, k, v, **gates._asdict(), state=past, cu_seqlens=cu_seqlens
        )
        return self._read_out(out, v, z), Mamba2State(memory, conv)

    def step(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One token, ``x [B, D] -> (y [B, D], state)``; the state is updated in place."""
        z, vkq, dt = self._project(x)
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        vkq, _ = causal_conv_step(vkq, weight, bias, state=state.conv)
        q, k, v = self._split(vkq)
        out, _ = gated_delta_step(q, k, v, **self.gates(dt)._asdict(), state=state.state)
        return self._read_out(out, v, z), state

    def gates(self, dt: Tensor) -> Gates:
        """Of the map ``dt [..., HV]``: the step size is what is written, and a rate of decay."""
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias))
        return Gates(log_decay=-upcast(self.A_log).exp() * dt, erase=None, write=dt)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split(self.sizes, -1)

    def _split(self, vkq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k ``[..., G, K]`` and v ``[..., HV, V]``."""
        v, k, q = vkq.split(self.convolved_sizes, -1)
        G = self.num_groups
        return split_heads(q, G), split_heads(k, G), split_heads(v, self.num_heads)

    def _read_out(self, out: Tensor, v: Tensor, z: Tensor) -> Tensor:
        """The skip, the gate, then the norm, in float32; then the output map."""
        y = upcast(out) + upcast(self.D).unsqueeze(-1) * upcast(v)
        y = self.norm(y.flatten(-2) * F.silu(upcast(z)))
        return self.out_proj(y.to(z.dtype))


def count_heads(inner_size: int, head_dim: int, num_groups: int) -> int:
    """HV; ValueError unless the heads fill `inner_size`, and the groups have equally many."""
    if inner_size < 1 or inner_size % (head_dim * num_groups):
        raise ValueError(
            "inner_size must be a positive multiple of head_dim x num_groups = "
            f"{head_dim} x {num_groups}, got {inner_size}"
        )
    return inner_size // head_dim
