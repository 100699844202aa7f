"""Tensors in, tensors out: the gated delta rule, and what layers put before and after it."""

from gdn2.ops.backends import BACKENDS, resolve_backend
from gdn2.ops.causal_conv import causal_conv, causal_conv_step
from gdn2.ops.gated_delta_rule import gated_delta_rule, gated_delta_step
from gdn2.ops.norm import gated_rms_norm, l2_norm
from gdn2.ops.normed_conv import normed_conv
from gdn2.ops.shift import shift

__all__ = [
    "BACKENDS",
    "causal_conv",
    "causal_conv_step",
    "gated_delta_rule",
    "gated_delta_step",
    "gated_rms_norm",
    "l2_norm",
    "normed_conv",
    "resolve_backend",
    "shift",
]
