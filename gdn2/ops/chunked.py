from gdn2.ops.reference import gated_delta_rule  # noqa: F401
