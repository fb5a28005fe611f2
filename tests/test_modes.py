"""Experts backends in compile modes, dtypes and kinds of shapes, on the CPU.

A choice in which any two values meet; ``MOE_REWRITE_MODES=full`` runs them all.
"""

from __future__ import annotations

import dataclasses

import modes
import pytest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_any_two_values_meet(device):
    values = modes.axes(device)
    met = [dataclasses.astuple(case) for case in modes.covering(device)]
    for i, one, j, other in modes.pairs_of(values):
        assert any((case[i], case[j]) == (one, other) for case in met)


@pytest.mark.parametrize("case", modes.cases("cpu"), ids=str)
def test_case(case):
    modes.check(case, "cpu")
