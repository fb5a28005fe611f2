"""Experts backends in compile modes, dtypes and kinds of shapes, on the CPU.

Of a choice in which any two values meet, those that take some seconds; inductor takes a minute for shapes that change.
``MOE_REWRITE_MODES=choice`` runs the whole choice, ``MOE_REWRITE_MODES=full`` every case there is.
"""

from __future__ import annotations

import dataclasses
import os

import modes
import pytest


def is_quick(case: modes.Case) -> bool:
    """Whether a case takes some seconds only. The loop itself, ``eager``, is stock Dynamo's.

    Triton interprets the kernels: numbers of tokens that change are in ``test_triton.py``, at fewer tokens.
    """
    if case.experts == "triton" and case.shapes == "dynamic":
        return False
    return case.compiler.startswith("aot_eager") or (case.shapes == "static" and case.experts != "eager")


CASES = [case for case in modes.cases("cpu") if is_quick(case) or "MOE_REWRITE_MODES" in os.environ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_any_two_values_meet(device):
    values = modes.axes(device)
    met = [dataclasses.astuple(case) for case in modes.covering(device)]
    for i, one, j, other in modes.pairs_of(values):
        assert any((case[i], case[j]) == (one, other) for case in met)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    modes.check(case, "cpu")
