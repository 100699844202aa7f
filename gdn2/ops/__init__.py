"""Tensors in, tensors out: the gated delta rule and the short convolution in front of it."""

from gdn2.ops.backends import BACKENDS, resolve_backend
from gdn2.ops.causal_conv import causal_conv, causal_conv_step
from gdn2.ops.gated_delta_rule import gated_delta_rule, gated_delta_step

__all__ = [
    "BACKENDS",
    "causal_conv",
    "causal_conv_step",
    "gated_delta_rule",
    "gated_delta_step",
    "resolve_backend",
]
