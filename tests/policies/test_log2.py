"""Own logarithms against the library's, and compiled against plain Python, bit for bit."""

from __future__ import annotations

import math
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from moeflow.policies.compiled import COMPILED
from moeflow.policies.log2 import log2_each

POSITIVE = st.floats(sys.float_info.min, sys.float_info.max)
BESIDE_ONE = st.floats(1 - 1e-6, 1 + 1e-6)


@given(st.lists(st.one_of(POSITIVE, BESIDE_ONE), min_size=1, max_size=40))
def test_as_close_as_a_double_comes(values):
    found = np.array(values)
    log2_each(found)
    for x, log in zip(values, found.tolist(), strict=True):
        expected = math.log2(x)
        assert (
            abs(log - expected) <= 4.5e-16 * max(abs(expected), abs(x - 1) if abs(x - 1) < 0.5 else 0)
            or log == expected
        )


@given(st.lists(POSITIVE, min_size=1, max_size=40))
def test_plain_python_finds_the_same_bits(values):
    found, plain = np.array(values), np.array(values)
    log2_each(found)
    (log2_each.py_func if COMPILED else log2_each)(plain)
    assert found.tobytes() == plain.tobytes()


@given(st.integers(-1022, 1023))
def test_powers_of_two_are_exact(power):
    found = np.array([2.0**power])
    log2_each(found)
    assert found[0] == power
