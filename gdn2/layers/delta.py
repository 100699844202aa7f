"""The delta family: Gated DeltaNet-2, KDA, Gated DeltaNet and DeltaNet differ in gates alone.

Axes: B batch, T time, N sequences, D model width, H key heads, HV value heads (a multiple of H),
K key channels, V value channels, W taps of the short convolution. Equation numbers are those of
docs/math.md.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gdn2.modules.gates import Gates, low_rank, reset_rate, reset_step_bias, split_heads
from gdn2.modules.linear import XavierLinear, map_jointly
from gdn2.modules.norm import GatedRMSNorm
from gdn2.ops import causal_conv_step, gated_delta_rule, gated_delta_step, l2_norm, normed_conv
from gdn2.ops.gates import gate, log_decay

GATE_FORMS = ("channel", "head")
Maps = dict[str, Tensor]
Convolved = tuple[Tensor, Tensor]  # outputs by head, and the state


class DeltaState(NamedTuple):
    """What a delta layer remembers of N sequences, whatever their lengths.

    state: ``[N, HV, K, V]``, float32 (float64 in a float64 model).
    q_conv, k_conv, v_conv: ``[N, channels, W - 1]``, the last inputs of the short convolutions.
    """

    state: Tensor
    q_conv: Tensor
    k_conv: Tensor
    v_conv: Tensor

    @property
    def num_sequences(self) -> int:
        return self.state.shape[0]

    def select(self, index: Tensor) -> "DeltaState":
        """The states of the sequences `index`, copied."""
        return DeltaState(*(x[index] for x in self))


class DeltaMixer(nn.Module):
    """A gated delta rule with its projections; a member of the family says what its gates are.

        q = l2(silu(conv(x W_q))) / sqrt(K)    k = l2(silu(conv(x W_k)))    v = silu(conv(x W_v))
        o = gated_delta_rule(q, k, v, gates(x))                                        (Eq. 10)
        y = (RMSNorm(o) * act(x W_g)) W_o

    Args:
        hidden_size: D.
        num_heads: H. num_v_heads: HV, None for H.
        head_k_dim: K. head_v_dim: V, None for K.
        conv_size: W.
        erase_range: upper end of the erase gate, 1.0, or 2.0 to allow negative eigenvalues. Where
            erase and write are one gate (all but GDN-2), of both.
        decay_lower_bound: a negative number, of the logarithm of a decay (`ops.gates.log_decay`).
        output_gate: act, "silu" or "sigmoid". None: the member's own.
        output_gate_rank: rank of W_g. None: full. "native": the member's own.
        norm_eps: epsilon of the output norm.
    """

    native_output_gate: str
    native_gate_is_low_rank: bool  # through V channels
    gate_maps: tuple[str, ...]  # the maps of x that gates are made from
    rate_range = (1.0, 16.0)  # where exp(A_log) starts

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_v_heads: int | None = None,
        head_k_dim: int = 128,
        head_v_dim: int | None = None,
        conv_size: int = 4,
        erase_range: float = 1.0,
        decay_lower_bound: float | None = None,
        output_gate: str | None = None,
        output_gate_rank: int | Literal["native"] | None = "native",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        num_v_heads, head_v_dim = num_v_heads or num_heads, head_v_dim or head_k_dim
        if num_v_heads % num_heads:
            raise ValueError(
                f"num_v_heads must be a multiple of num_heads {num_heads}, got {num_v_heads}"
            )
        if erase_range not in (1.0, 2.0):
            raise ValueError(f"erase_range must be 1.0 or 2.0, got {erase_range}")
        self.hidden_size, self.num_heads, self.num_v_heads = hidden_size, num_heads, num_v_heads
        self.head_k_dim, self.head_v_dim = head_k_dim, head_v_dim
        self.erase_range, self.decay_lower_bound = erase_range, decay_lower_bound
        keys, values = num_heads * head_k_dim, num_v_heads * head_v_dim

        self.q_proj = XavierLinear(hidden_size, keys, bias=False)
        self.k_proj = XavierLinear(hidden_size, keys, bias=False)
        self.v_proj = XavierLinear(hidden_size, values, bias=False)
        self.q_conv1d = nn.Conv1d(keys, keys, conv_size, groups=keys, bias=False)
        self.k_conv1d = nn.Conv1d(keys, keys, conv_size, groups=keys, bias=False)
        self.v_conv1d = nn.Conv1d(values, values, conv_size, groups=values, bias=False)
        self.A_log: nn.Parameter | None = None  # of members that decay
        self.dt_bias: nn.Parameter | None = None
        self.build_gates()
        if decay_lower_bound is not None and not (self.A_log is not None and decay_lower_bound < 0):
            raise ValueError(
                "decay_lower_bound must be None or negative, and of a layer that decays, got "
                f"{decay_lower_bound}"
            )
        if output_gate_rank == "native":
            output_gate_rank = head_v_dim if self.native_gate_is_low_rank else None
        self.g_proj = low_rank(hidden_size, output_gate_rank, values, bias=True)
        activation = output_gate or self.native_output_gate
        self.o_norm = GatedRMSNorm(head_v_dim, norm_eps, activation=activation)
        self.o_proj = XavierLinear(values, hidden_size, bias=False)
        self.gate_means: dict[str, Tensor] = {}
        self.reset_parameters()

    def build_gates(self) -> None:
        """Create the parameters of `gates`."""
        raise NotImplementedError

    def gates(self, maps: Maps) -> Gates:
        """Gates of what `project` gives."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw A_log and dt_bias; submodules know their own laws."""
        if self.A_log is not None and self.dt_bias is not None:
            reset_rate(self.A_log, *self.rate_range)
            reset_step_bias(self.dt_bias)

    @property
    def operator_flops(self) -> int:
        """Of a token, per entry of the state: read to erase 2, write 2, read 2, and decay 1."""
        decay = int(self.A_log is not None)
        return (6 + decay) * self.num_v_heads * self.head_k_dim * self.head_v_dim

    def forward(
        self, x: Tensor, *, state: DeltaState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, DeltaState]:
        """``x [B, T, D] -> (y [B, T, D], state)``; the given state is left as it is.

        cu_seqlens ``[N + 1]`` packs N sequences into one row; without it N = B.
        """
        maps = self.project(x)

        def convolve(
            y: Tensor, weight: Tensor, past: Tensor | None, heads: int, normed: bool
        ) -> Convolved:
            y, last = normed_conv(
                y,
                weight,
                norm_channels=len(weight) if normed else 0,
                head_dim=len(weight) // heads,
                state=past,
                cu_seqlens=cu_seqlens,
            )
            return split_heads(y, heads), last

        q, k, v, *convs = self._queries_keys_values(maps, state, convolve)
        gates = self.gates(maps)
        if self.training:
            self.gate_means = gates.means()
        out, memory = gated_delta_rule(
            q,
            k,
            v,
            **gates._asdict(),
            scale=self.head_k_dim**-0.5,
            state=None if state is None else state.state,
            cu_seqlens=cu_seqlens,
        )
        return self._read_out(maps, out), DeltaState(memory, *convs)

    def step(self, x: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """One token, ``x [B, D] -> (y [B, D], state)``; the state is updated in place."""
        maps = self.project(x)

        def convolve(
            y: Tensor, weight: Tensor, past: Tensor, heads: int, normed: bool
        ) -> Convolved:
            y, last = causal_conv_step(y, weight, state=past)
            y = split_heads(y, heads)
            return l2_norm(y) if normed else y, last

        q, k, v, *_ = self._queries_keys_values(maps, state, convolve)
        out, _ = gated_delta_step(
            q,
            k,
            v,
            **self.gates(maps)._asdict(),
            scale=self.head_k_dim**-0.5,
            state=state.state,
        )
        return self._read_out(maps, out), state

    def project(self, x: Tensor) -> Maps:
        """Every map of ``x [..., D]``, by name."""
        names = ("q_proj", "k_proj", "v_proj", *self.gate_maps, "g_proj")
        modules = [getattr(self, name) for name in names]
        return dict(zip(names, map_jointly(modules, x), strict=True))

    def _queries_keys_values(
        self, maps: Maps, state: DeltaState | None, convolve: Callable[..., Convolved]
    ) -> list[Tensor]:
        """q, k ``[..., H, K]``, v ``[..., HV, V]`` and the three convolution states."""
        past = (None, None, None) if state is None else state[1:]
        H, HV = self.num_heads, self.num_v_heads
        q, q_conv = convolve(maps["q_proj"], self.q_conv1d.weight[:, 0], past[0], H, normed=True)
        k, k_conv = convolve(maps["k_proj"], self.k_conv1d.weight[:, 0], past[1], H, normed=True)
        v, v_conv = convolve(maps["v_proj"], self.v_conv1d.weight[:, 0], past[2], HV, normed=False)
        return [q, k, v, q_conv, k_conv, v_conv]

    def _read_out(self, maps: Maps, out: Tensor) -> Tensor:
        """Norm and output gate per value head, then the output map."""
        out = self.o_norm(out, split_heads(maps["g_proj"], self.num_v_heads))
        return self.o_proj(out.flatten(-2))

    def _log_decay(self, f: Tensor) -> Tensor:
        """Of ``f [..., heads * channels]``, per channel, or ``[..., heads]`` (Eq. 11)."""
        assert self.A_log is not None
        assert self.dt_bias is not None
        A_log: Tensor = self.A_log
        dt_bias: Tensor = self.dt_bias
        if A_log.shape != dt_bias.shape:
            f, dt_bias = split_heads(f, len(A_log)), split_heads(dt_bias, len(A_log))
            A_log = A_log.unsqueeze(1)
        return log_decay(f, A_log, dt_bias, lower_bound=self.decay_lower_bound)


class GatedDeltaNet2(DeltaMixer):
    """GDN-2 (Eq. 10): decay and erase per key channel, write per value channel (Eqs. 11, 12).

        log_decay = -exp(A_log) * softplus(f_proj(x) + dt_bias)     [B, T, H, K]
        erase     = erase_range * sigmoid(b_proj(x))                [B, T, H, K]
        write     = sigmoid(w_proj(x))                              [B, T, HV, V]

    Parameter names are those of the official checkpoints.

    Args:
        erase_gate, write_gate: "channel", or "head" for the mean over the head's channels, with the
            same parameters (the ablations of arXiv 2605.22791, Table 5).
        options: those of `DeltaMixer`.
    """

    native_output_gate = "silu"
    native_gate_is_low_rank = True
    gate_maps = ("f_proj", "b_proj", "w_proj")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        erase_gate: str = "channel",
        write_gate: str = "channel",
        **options: Any,
    ):
        for name, form in (("erase_gate", erase_gate), ("write_gate", write_gate)):
            if form not in GATE_FORMS:
                raise ValueError(f"{name} must be one of {GATE_FORMS}, got {form!r}")
        super().__init__(hidden_size, num_heads, **options)
        self.erase_gate, self.write_gate = erase_gate, write_gate

    def build_gates(self) -> None:
        keys, values = self.num_heads * self.head_k_dim, self.num_v_heads * self.head_v_dim
        self.f_proj = low_rank(self.hidden_size, self.head_v_dim, keys)
        self.b_proj = XavierLinear(self.hidden_size, keys, bias=False)
        self.w_proj = XavierLinear(self.hidden_size, values, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))

    def gates(self, maps: Maps) -> Gates:
        erase = gate(split_heads(maps["b_proj"], self.num_heads), self.erase_range)
        write = gate(split_heads(maps["w_proj"], self.num_v_heads))
        return Gates(
            log_decay=self._log_decay(maps["f_proj"]),
            erase=erase.mean(-1) if self.erase_gate == "head" else erase,
            write=write.mean(-1) if self.write_gate == "head" else write,
        )


class TiedMixer(DeltaMixer):
    """A member with one gate to erase and write, per value head.

    erase=write = erase_range * sigmoid(b_proj(x))              [B, T, HV]
    """

    decay_map: str | None  # the one of `gate_maps` that the decay is made from

    def build_gates(self) -> None:
        self.b_proj = XavierLinear(self.hidden_size, self.num_v_heads, bias=False)

    def gates(self, maps: Maps) -> Gates:
        beta = gate(maps["b_proj"], self.erase_range)
        decay = None if self.decay_map is None else self._log_decay(maps[self.decay_map])
        return Gates(log_decay=decay, erase=beta, write=beta)


class KimiDeltaAttention(TiedMixer):
    """KDA (Eq. 7): decay per key channel, one gate to erase and write, per value head.

    log_decay   = -exp(A_log) * softplus(f_proj(x) + dt_bias)   [B, T, HV, K]
    erase=write = erase_range * sigmoid(b_proj(x))              [B, T, HV]
    """

    native_output_gate = "sigmoid"
    native_gate_is_low_rank = True
    gate_maps = ("f_proj", "b_proj")
    decay_map = "f_proj"

    def build_gates(self) -> None:
        super().build_gates()
        keys = self.num_v_heads * self.head_k_dim
        self.f_proj = low_rank(self.hidden_size, self.head_v_dim, keys)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))


class GatedDeltaNet(TiedMixer):
    """Gated DeltaNet (Eq. 6): one decay and one gate to erase and write, per value head.

    log_decay   = -exp(A_log) * softplus(a_proj(x) + dt_bias)   [B, T, HV]
    erase=write = erase_range * sigmoid(b_proj(x))              [B, T, HV]
    """

    native_output_gate = "silu"
    native_gate_is_low_rank = False
    gate_maps = ("a_proj", "b_proj")
    decay_map = "a_proj"
    rate_range = (0.01, 16.0)

    def build_gates(self) -> None:
        super().build_gates()
        self.a_proj = XavierLinear(self.hidden_size, self.num_v_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_v_heads))


class DeltaNet(TiedMixer):
    """DeltaNet (arXiv 2406.06484): nothing decays, one gate to erase and write, per value head.

    erase=write = erase_range * sigmoid(b_proj(x))              [B, T, HV]
    """

    native_output_gate = "silu"
    native_gate_is_low_rank = False
    gate_maps = ("b_proj",)
    decay_map = None
