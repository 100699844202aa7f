"""Gated DeltaNet-2 and its family: one gated delta rule, one model, one trainer."""

from gdn2.registration import register

__version__ = "0.1.0"

register()
