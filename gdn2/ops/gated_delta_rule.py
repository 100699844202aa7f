"""The one operator: gated delta rule over sequences, and one token (or a few) of it for decoding.

Axes: B batch, T time, H key heads, HV value heads (a multiple of H), K key channels, V value
channels, N sequences (B, or the number of packed ones). Equation numbers are those of docs/math.md.
"""

from types import ModuleType

from torch import Tensor

from gdn2.ops import chunked, reference, step
from gdn2.ops.backends import resolve_backend, triton_operators
from gdn2.ops.contract import (
    Operands,
    check_boundaries,
    check_operands,
    check_state,
    check_state_indices,
)
from gdn2.ops.in_place import refuse_gradients

MAX_STEP_TOKENS = 16


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule (Eq. 10) over sequences; differentiable in every tensor.

        S'_t = Diag(exp(log_decay_t)) S_{t-1}                         decay
        S_t  = S'_t + k_t (write_t * v_t - S'_t^T (erase_t * k_t))^T  erase and write
        o_t  = scale * S_t^T q_t                                      read

    No normalisation is applied to q or k, and no other scale. Inputs must be finite, and so
    must what becomes of them: where something overflows, outputs before it need not be finite.

    Args:
        q, k: ``[B, T, H, K]``, one floating dtype shared with v.
        v: ``[B, T, HV, V]``. Key head h serves the value heads ``h*HV/H ... (h+1)*HV/H - 1``.
        log_decay: natural logarithm of the decay, <= 0: ``[B, T, H or HV]`` per head or
            ``[B, T, H or HV, K]`` per key channel, any floating dtype (float32 advised).
            None: nothing decays.
        erase: ``[B, T, H or HV]`` or ``[B, T, H or HV, K]``, in [0, 1], or [0, 2] to allow
            negative eigenvalues. None: nothing is erased.
        write: ``[B, T, HV]`` or ``[B, T, HV, V]``. None: values are written whole (1).
        scale: factor of the read.
        state: ``[N, HV, K, V]``, float32 (float64 for float64 inputs). It is not modified.
            None: zeros.
        cu_seqlens: ``[N + 1]`` int32 or int64 boundaries ``0 = c_0 <= ... <= c_N = T`` on q's
            device: B must be 1, and sequence n is ``[c_n, c_{n+1})``. Nothing crosses a boundary.
        backend: one of `BACKENDS`. None: the fastest that supports the call. A backend that is
            named is used, or an error says why it can not be.

    Returns:
        ``(out, state)``: ``[B, T, HV, V]`` in q's dtype and ``[N, HV, K, V]`` after the last token.

    Raises:
        ValueError: a tensor's shape, dtype or device breaks the contract, or an unknown backend.
        NotImplementedError: the backend that is named can not serve the call.

    Source: arXiv 2605.22791, Eqs. 9 and 10.
    """
    x = Operands(q, k, v, log_decay, erase, write)
    check_operands(x)
    num_sequences = check_boundaries(cu_seqlens, q)
    if state is not None:
        check_state(state, num_sequences, x)
    name = resolve_backend(backend, x)
    run = chunked if name == "chunked" else _implementation(name)
    return run.gated_delta_rule(x, float(scale), state, cu_seqlens)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token, or by a few, in place (Eq. 9); no autograd.

    Args:
        q, k, v, log_decay, erase, write: as in `gated_delta_rule` without the T axis
            (``[B, H, K]``, ``[B, HV, V]``, ...), or with it for T <= 16 tokens.
        scale: factor of the read.
        state: ``[B, HV, K, V]``, float32 (float64 for float64 inputs), updated in place; with
            `state_indices` a pool ``[slots, HV, K, V]``.
        state_indices: ``[B]`` int32 or int64, distinct slots of the pool. A negative index leaves
            the pool alone and gives a row of zeros.
        backend: as in `gated_delta_rule`.

    Returns:
        ``(out, state)``: ``[B, HV, V]`` or ``[B, T, HV, V]`` in q's dtype, and the given state.

    Raises:
        ValueError: the contract is broken. RuntimeError: a gradient is asked for.
    """
    x = Operands(q, k, v, log_decay, erase, write)
    refuse_gradients("gated_delta_step", "gated_delta_rule", (*x, state))
    one_token = q.ndim == 3
    if one_token:
        x = x.map(lambda t: t.unsqueeze(1))
    check_operands(x)
    if x.q.shape[1] > MAX_STEP_TOKENS:
        raise ValueError(
            f"gated_delta_step takes at most {MAX_STEP_TOKENS} tokens, got {x.q.shape[1]}: "
            "use gated_delta_rule"
        )
    if state_indices is not None:
        check_state_indices(state_indices, q)
    check_state(state, q.shape[0] if state_indices is None else state.shape[0], x)
    name = resolve_backend(backend, x)
    run = step if name == "chunked" else _implementation(name)
    out = run.gated_delta_step(x, float(scale), state, state_indices)
    return (out.squeeze(1) if one_token else out), state


def _implementation(name: str) -> ModuleType:
    return reference if name == "reference" else triton_operators()
