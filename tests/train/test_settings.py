from collections.abc import Sequence
from typing import Any, Literal

import pytest

from gdn2.train.settings import conform, parse


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("3e-4", float, 3e-4),
        ("1", float, 1.0),
        ("12", int, 12),
        ("100_000_000", int, 100_000_000),
        ("1e9", int, 1_000_000_000),
        ("-1", int, -1),
        ("true", bool, True),
        ("False", bool, False),
        ("none", int | None, None),
        ("null", str | None, None),
        ("64", int | None, 64),
        ("12", str, "12"),
        ("a,b", str, "a,b"),
        ("channel", Literal["channel", "head"], "channel"),
        ("0.9,0.95", tuple[float, float], (0.9, 0.95)),
        ("[0.9, 1]", tuple[float, float], (0.9, 1.0)),
        ('["gdn2", "kda"]', list[str], ["gdn2", "kda"]),
        ("gdn2,kda", Sequence[str] | None, ["gdn2", "kda"]),
        ("gdn2, kda", str | list[str], ["gdn2", "kda"]),
        ("gdn2", str | list[str], "gdn2"),
        ("2,3", tuple[int, ...], [2, 3]),
        ('{"a": 1}', dict[str, int], {"a": 1}),
        ("anything", Any, "anything"),
    ],
)
def test_text_becomes_what_the_annotation_says(text, kind, expected):
    value = parse(text, kind, "x.y")
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("abc", int),
        ("1.5", int),
        ("1e-3", int),
        ("inf", int),
        ("nan", int),
        ("true", int),
        ("1", bool),
        ("yes", bool),
        ("none", int),
        ("", float),
        ("true", float),
        ("heads", Literal["channel", "head"]),
        ("0.9", tuple[float, float]),
        ("0.9,0.95,0.99", tuple[float, float]),
        ("0.9,x", tuple[float, float]),
        ('["gdn2"', list[str]),
        ("[1]", list[str]),
    ],
)
def test_other_text_is_refused_by_name(text, kind):
    with pytest.raises(ValueError, match=r"^x\.y must be .*got "):
        parse(text, kind, "x.y")


def test_values_are_converted_without_loss_or_not_at_all():
    assert conform(1e9, int, "n") == 10**9
    assert type(conform(3, float, "x")) is float
    assert conform([0.9, 0.95], tuple[float, float], "b") == (0.9, 0.95)
    for value, kind in [("1", int), (1.5, int), (True, int), (1, bool), (1, str), (None, int)]:
        with pytest.raises(ValueError, match="n must be"):
            conform(value, kind, "n")
