"""GELU and its derivative, inside of kernels. Importing this module imports triton."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _tail(x):
    """P(X > \\|x\\|) of a normal X to 3e-5 of itself, and exp(-x²/2): erfc as Abramowitz and Stegun's 7.1.26 has it, a
    polynomial in 1 / (1 + p·\\|x\\|) times the exponential, with coefficients for the relative error instead."""
    bell = tl.exp(-0.5 * x * x)
    t = 1 / (1 + 0.3747665940388722 * tl.abs(x))
    rest = 0.16452166617155900 + t * (0.40394472780425406 + t * -0.18237953245441643)
    return 0.5 * t * (0.29785724446681877 + t * (0.31603917106569650 + t * rest)) * bell, bell


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x · Φ(x); EXACT for results that are kept in float32, else good for 16 bits."""
    if EXACT:
        return 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))
    tail, _ = _tail(x)
    return x * tl.where(x < 0, tail, 1 - tail)


@triton.jit
def gelu_and_derivative(x, EXACT: tl.constexpr):
    """GELU, and Φ(x) + x · density(x)."""
    if EXACT:
        below = 0.5 * (1 + tl.erf(x * _SQRT_HALF))
        return x * below, below + x * (_DENSITY_AT_0 * tl.exp(-0.5 * x * x))
    tail, bell = _tail(x)
    below = tl.where(x < 0, tail, 1 - tail)
    return x * below, below + x * (_DENSITY_AT_0 * bell)
