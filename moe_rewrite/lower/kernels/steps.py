"""Epilogues: elementwise steps on products, in the kernels that compute these.

An *epilogue* is given as text: ``"silu v0;mul v2 v1"`` is ``silu(first product) * second product``. Words that start
with ``v`` are values: products, then the vectors of the expert, then the results of the steps before. Others are
numbers. ``lower/epilogue.py`` writes such programs.
"""

from __future__ import annotations

from moe_rewrite.lower.kernels.language import constexpr_function, jit, tl


@constexpr_function
def _length(epilogue):
    return len(epilogue.split(";")) if epilogue else 0


@constexpr_function
def _operator(epilogue, step):
    return epilogue.split(";")[step].split(" ")[0]


@constexpr_function
def _is_value(epilogue, step, number):
    return epilogue.split(";")[step].split(" ")[number][0] == "v"


@constexpr_function
def _index(epilogue, step, number):
    return int(epilogue.split(";")[step].split(" ")[number][1:])


@constexpr_function
def _constant(epilogue, step, number):
    return float(epilogue.split(";")[step].split(" ")[number])


@jit
def _operand(values, epilogue: tl.constexpr, step: tl.constexpr, number: tl.constexpr):
    if _is_value(epilogue, step, number):
        found = values[_index(epilogue, step, number)]
    else:
        found = tl.full((), _constant(epilogue, step, number), tl.float32)
    return found


@jit
def _binary(operator: tl.constexpr, a, b):
    if operator == "add":
        result = a + b
    elif operator == "sub":
        result = a - b
    elif operator == "mul":
        result = a * b
    elif operator == "div":
        result = a / b
    # Comparisons with NaN are false, so the next four keep it, as torch does.
    elif operator == "clamp_min":
        result = tl.where(a < b, b, a)
    elif operator == "clamp_max":
        result = tl.where(a > b, b, a)
    elif operator == "maximum":
        result = tl.where((a > b) | (a != a), a, b)
    else:
        tl.static_assert(operator == "minimum")
        result = tl.where((a < b) | (a != a), a, b)
    return result


@jit
def _unary(operator: tl.constexpr, a):
    if operator == "silu":
        result = a / (1.0 + tl.exp(-a))
    elif operator == "sigmoid":
        result = 1.0 / (1.0 + tl.exp(-a))
    elif operator == "relu":
        result = tl.where(a < 0.0, 0.0, a)
    elif operator == "gelu":
        result = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif operator == "gelu_tanh":  # 0.5 * (1 + tanh(y)) is sigmoid(2 y)
        result = a / (1.0 + tl.exp(-1.5957691216057308 * (a + 0.044715 * a * a * a)))
    elif operator == "exp":
        result = tl.exp(a)
    elif operator == "abs":
        result = tl.abs(a)
    elif operator == "neg":
        result = a * -1.0  # Triton's `-a` is `0 - a`, which loses the sign of a zero
    elif operator == "square":
        result = a * a
    elif operator == "bfloat16":
        result = a.to(tl.bfloat16).to(tl.float32)
    else:
        tl.static_assert(operator == "float16")
        result = a.to(tl.float16).to(tl.float32)
    return result


@constexpr_function
def _is_binary(epilogue, step):
    return len(epilogue.split(";")[step].split(" ")) == 3


@jit
def _run(values, epilogue: tl.constexpr):
    """What the last step of an epilogue gives; the first value where it has no steps."""
    for step in tl.static_range(_length(epilogue)):
        first = _operand(values, epilogue, step, 1)
        if _is_binary(epilogue, step):
            result = _binary(_operator(epilogue, step), first, _operand(values, epilogue, step, 2))
        else:
            result = _unary(_operator(epilogue, step), first)
        values = values + (result,)
    if _length(epilogue) == 0:
        last = values[0]
    else:
        last = values[len(values) - 1]
    return last


@jit
def _finish(first, second, vectors, others, PRODUCTS: tl.constexpr, VECTORS: tl.constexpr, EPILOGUE: tl.constexpr):
    """The epilogue over the products and vectors that there are."""
    values = (first,)
    if PRODUCTS == 2:
        values = values + (second,)
    if VECTORS >= 1:
        values = values + (vectors,)
    if VECTORS == 2:
        values = values + (others,)
    return _run(values, EPILOGUE)
