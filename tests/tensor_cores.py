"""Triton's interpreter with the arithmetic of tensor cores.

By itself it computes every product in float32 where `input_precision` asks for tf32, takes the bits
of bfloat16 for integers in products, and cuts bfloat16 off instead of rounding it. It also prepares
the language anew for each call of a function in a kernel, a fifth of its time: here once a module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


@contextmanager
def tensor_cores() -> Iterator[None]:
    with (
        mock.patch.object(InterpreterBuilder, "create_dot", _dot),
        mock.patch.object(InterpreterBuilder, "cast_impl", _cast),
        mock.patch.object(InterpretedFunction, "__call__", _call),
    ):
        yield


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even, as bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Cut off after 10 bits, as the units that take float32's bits for tf32 do."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _operand(x: TensorHandle, precision: Any) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return from_bfloat16(x.data)
    if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
        return to_tf32(x.data)
    return x.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_operand(a, input_precision), _operand(b, input_precision))
    return TensorHandle(product + d.data, d.dtype.scalar)


_prepared: set[str] = set()


def _call(self, *args, **kwargs):
    if self.fn.__module__ not in _prepared:  # what this prepares is never undone
        interpreter._patch_lang(self.fn)
        _prepared.add(self.fn.__module__)
    return self.rewrite()(*args, **kwargs)


_plain_cast = InterpreterBuilder.cast_impl


def _cast(self, src, dst_type):
    pair = src.dtype.scalar, dst_type.scalar
    if pair == (tl.float32, tl.bfloat16):
        return TensorHandle(to_bfloat16(src.data), dst_type.scalar)
    if pair == (tl.bfloat16, tl.float32):
        return TensorHandle(from_bfloat16(src.data), dst_type.scalar)
    return _plain_cast(self, src, dst_type)
