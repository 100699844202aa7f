"""The one operator: gated delta rule over sequences, and one token (or a few) of it for decoding.

Axes: B batch, T time, H key heads, HV value heads (a multiple of H), K key channels, V value
channels, N sequences (B, or the number of packed ones). Equation numbers are those of docs/math.md.
"""

import torch
from torch import Tensor

from gdn2.ops import chunked, reference, step

BACKENDS = ("chunked", "reference")
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

    No normalisation is applied to q or k, and no other scale.

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

    Source: arXiv 2605.22791, Eqs. 9 and 10.
    """
    _check_tensors(q, k, v, log_decay, erase, write)
    num_sequences = _check_boundaries(cu_seqlens, q)
    if state is not None:
        _check_state(state, (num_sequences, *v.shape[2:3], k.shape[-1], v.shape[-1]), q)
    run = {"chunked": chunked.gated_delta_rule, "reference": reference.gated_delta_rule}
    return run[resolve_backend(backend)](
        q, k, v, log_decay, erase, write, float(scale), state, cu_seqlens
    )


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
    gates = {"log_decay": log_decay, "erase": erase, "write": write}
    inputs = [x for x in (q, k, v, *gates.values(), state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise RuntimeError(
            "gated_delta_step updates the state in place and has no gradient: "
            "call gated_delta_rule, or decode under torch.no_grad()"
        )
    one_token = q.ndim == 3
    if one_token:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        gates = {name: x if x is None else x.unsqueeze(1) for name, x in gates.items()}
    _check_tensors(q, k, v, **gates)
    if q.shape[1] > MAX_STEP_TOKENS:
        raise ValueError(
            f"gated_delta_step takes at most {MAX_STEP_TOKENS} tokens, got {q.shape[1]}: "
            "use gated_delta_rule"
        )
    slots = state.shape[0] if state_indices is not None and state.ndim == 4 else q.shape[0]
    _check_state(state, (slots, v.shape[2], k.shape[-1], v.shape[-1]), q)
    if state_indices is not None:
        _check_state_indices(state_indices, q)
    run = {"chunked": step.gated_delta_step, "reference": reference.gated_delta_step}
    out = run[resolve_backend(backend)](
        q, k, v, **gates, scale=float(scale), state=state, state_indices=state_indices
    )
    out = out.to(q.dtype)
    return (out.squeeze(1) if one_token else out), state


def resolve_backend(request: str | None) -> str:
    """Name the backend that serves a call; a named request is returned or refused, never replaced.

    Raises:
        ValueError: the name is unknown.
    """
    if request not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {request!r}")
    return request or "chunked"


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    erase: Tensor | None,
    write: Tensor | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q and v must be [B, T, H, K] and [B, T, HV, V], got {tuple(q.shape)} and "
            f"{tuple(v.shape)}"
        )
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"v must have q's B and T, {tuple(q.shape[:2])}, got {tuple(v.shape[:2])}"
        )
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if min(H, K, HV, V) == 0 or HV % H:
        raise ValueError(
            f"H, K, HV and V must be positive and HV a multiple of H, got H={H}, K={K}, HV={HV}, "
            f"V={V}"
        )
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, gate, heads, channels in (
        ("log_decay", log_decay, {H, HV}, K),
        ("erase", erase, {H, HV}, K),
        ("write", write, {HV}, V),
    ):
        if gate is None:
            continue
        legal = [shape for h in sorted(heads) for shape in ((B, T, h), (B, T, h, channels))]
        if tuple(gate.shape) not in legal:
            raise ValueError(
                f"{name} must have one of the shapes {legal}, got {tuple(gate.shape)}"
            )
        if not gate.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {gate.dtype}")
    for name, x in (("k", k), ("v", v), ("log_decay", log_decay), ("erase", erase), ("write", write)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}")


def _check_boundaries(cu_seqlens: Tensor | None, q: Tensor) -> int:
    """Return N. The values are read only where that needs no synchronisation with a device."""
    if cu_seqlens is None:
        return q.shape[0]
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences along T and needs B == 1, got {q.shape[0]}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be a vector of int32 or int64, got "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens must be on q's device, {q.device}, got {cu_seqlens.device}")
    if cu_seqlens.numel() < 1:
        raise ValueError("cu_seqlens must hold N + 1 >= 1 boundaries, got none")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from 0 to T = {q.shape[1]} without falling, got {bounds}"
            )
    return cu_seqlens.numel() - 1


def _check_state(state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    dtype = state_dtype(q.dtype)
    if tuple(state.shape) != shape or state.dtype != dtype:
        raise ValueError(
            f"state must be {list(shape)} {dtype} for {q.dtype} inputs, got "
            f"{list(state.shape)} {state.dtype}"
        )
    if state.device != q.device:
        raise ValueError(f"state must be on q's device, {q.device}, got {state.device}")


def _check_state_indices(state_indices: Tensor, q: Tensor) -> None:
    if state_indices.shape != q.shape[:1] or state_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"state_indices must be [B] = [{q.shape[0]}] int32 or int64, got "
            f"{list(state_indices.shape)} {state_indices.dtype}"
        )
    if state_indices.device != q.device:
        raise ValueError(
            f"state_indices must be on q's device, {q.device}, got {state_indices.device}"
        )


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state and of every accumulation for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
