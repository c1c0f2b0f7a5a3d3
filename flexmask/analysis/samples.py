"""Places at which a claim may fail: values of expressions at a few points of the index space, to give up early on what is not true."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..ir import BOOL, INT, OPS, Expr
from .linear import Linear

POINTS = 12
# nothing that reads tables, and nothing that may fail
_KNOWN = {"add", "sub", "mul", "neg", "abs", "sign", "min", "max", "where", "lt", "le", "eq", "ne", "and", "or", "xor", "not"}
Values = tuple[int, ...] | None


class Samples:
    """Points of the index space, with lengths and scalars of the given signs; the same ones in every process.

    >>> from flexmask.ir import K, Q
    >>> from flexmask.analysis.linear import linear
    >>> Samples(()).refute(linear(Q - K), ()), Samples(()).refute(linear(Q), ()), Samples(()).refute(linear(Q - K), (K <= Q,))
    (True, False, False)
    """

    def __init__(self, signs: tuple[int, ...]):
        draw = random.Random(7)
        self._signs, self._draw = signs, draw
        self._values: dict[Expr, Values] = {}
        self._holding: dict[tuple[Expr, ...], tuple[int, ...]] = {}
        q_len, kv_len = ([draw.choice((1, 2, 9, 40, 300)) for _ in range(POINTS)] for _ in range(2))
        lengths = {"q_len": q_len, "kv_len": kv_len, "b": [4] * POINTS, "h": [9] * POINTS}
        limits = lengths | {"q_idx": q_len, "kv_idx": kv_len}
        self._indices = {name: tuple(draw.randrange(n) for n in limit) for name, limit in limits.items()}
        self._indices |= {"q_len": tuple(q_len), "kv_len": tuple(kv_len)}

    def refute(self, x: Linear, facts: Sequence[Expr]) -> bool:
        """Whether x < 0 at some point where all `facts` hold. Where not everything can be computed, no."""
        terms = [(c, values) for m, c in x.terms.items() if (values := self.values(m)) is not None]
        if len(terms) < len(x.terms):
            return False
        return any(x.constant + sum(c * values[i] for c, values in terms) < 0 for i in self._where(tuple(facts)))

    def _where(self, facts: tuple[Expr, ...]) -> tuple[int, ...]:
        """The points at which all facts are known to hold."""
        if facts not in self._holding:
            found = [self.values(fact) for fact in facts]
            self._holding[facts] = tuple(i for i in range(POINTS) if all(values is not None and values[i] for values in found))
        return self._holding[facts]

    def values(self, e: Expr) -> Values:
        """The value of `e` at each point, None where it depends on captured tensors or floats."""
        if e not in self._values:
            self._values[e] = self._computed(e)
        return self._values[e]

    def _computed(self, e: Expr) -> Values:
        if e.kind not in (INT, BOOL):
            return None
        if e.op == "const":
            return (e.value,) * POINTS
        if e.op == "index":
            return self._indices[e.value]
        if e.op == "scalar":
            return self._scalar(e.value)
        args = [values for a in e.args if (values := self.values(a)) is not None]
        if len(args) < len(e.args):
            return None
        divides = e.op in ("floordiv", "mod") and e.args[1].op == "const" and e.args[1].value > 0
        python = OPS[e.op].python if divides or e.op in _KNOWN else None
        return None if python is None else tuple(python(*point) for point in zip(*args, strict=True))

    def _scalar(self, number: int) -> Values:
        sizes = [self._draw.choice((1, 2, 5, 16, 130)) for _ in range(POINTS)]
        sign = self._signs[number] if number < len(self._signs) else None
        return tuple(n * (self._draw.choice((-1, 1)) if sign is None else sign) for n in sizes)
