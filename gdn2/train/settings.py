"""Values as annotations want them: only lossless conversions, anything else is an error."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, Union, get_args, get_origin


def conform(value: Any, kind: Any, path: str) -> Any:
    """``value`` as the annotation ``kind``; ValueError names ``path``."""
    try:
        return _fit(value, kind)
    except _MisfitError:
        raise ValueError(f"{path} must be {_name(kind)}, got {value!r}") from None


def parse(text: str, kind: Any, path: str) -> Any:
    """``text`` as ``kind``: 3e-4, 100_000_000, 1e9 (as int), true, none, a,b, ["a", "b"]."""
    for value in _readings(text):
        with suppress(_MisfitError):
            return _fit(value, kind)
    raise ValueError(f"{path} must be {_name(kind)}, got {text!r}")


WORDS = {"none": None, "null": None, "true": True, "false": False}


class _MisfitError(Exception):
    pass


def _fit(value: Any, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    number = type(value) in (int, float)  # a bool is not a number
    several = isinstance(value, list | tuple)
    if (
        kind is Any
        or (kind is type(None) and value is None)
        or (kind in (bool, str, dict) and type(value) is kind)
        or (origin is Literal and value in args)
    ):
        return value
    if origin in (Union, types.UnionType):
        for option in args:
            with suppress(_MisfitError):
                return _fit(value, option)
    elif kind is int and number and value % 1 == 0:
        return int(value)
    elif kind is float and number:
        with suppress(OverflowError):
            return float(value)
    elif origin is tuple and Ellipsis not in args:
        if several and len(value) == len(args):
            return tuple(map(_fit, value, args))
    elif origin in (list, tuple, Sequence) and several:
        return [_fit(item, args[0]) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {_fit(key, args[0]): _fit(item, args[1]) for key, item in value.items()}
    raise _MisfitError


def _readings(text: str) -> Iterator[Any]:
    """What ``text`` may mean, the narrowest meaning first."""
    if text.lower() in WORDS:
        yield WORDS[text.lower()]
    for number in (int, float):
        with suppress(ValueError):
            yield number(text)
    if text.startswith(("[", "{")):
        with suppress(json.JSONDecodeError, RecursionError):
            yield json.loads(text)
    elif "," in text:
        yield [next(_readings(part.strip())) for part in text.split(",")]
    yield text


def _name(kind: Any) -> str:
    """An annotation as it is written: int | 'native' | None."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_name, args))
    if kind is type(None):
        return "None"
    return kind.__name__ if isinstance(kind, type) and not args else str(kind)
