"""The arithmetic laws of the simplifier, proved by sympy for all integers (the others are checked by brute force beside this)."""

import pytest
import sympy

from flexmask.ir import LAWS, make, parse, walk

VARIABLES = {name: make("var", (), name, "int") for name in "IJLCD"}
MEANING = {
    "add": sympy.Add, "sub": lambda x, y: x - y, "mul": sympy.Mul, "neg": lambda x: -x, "min": sympy.Min, "max": sympy.Max,
    "abs": sympy.Abs, "floordiv": lambda x, y: sympy.floor(x / y), "mod": sympy.Mod,
}  # fmt: skip


def read(text):
    try:
        return parse(text, variables=VARIABLES)
    except ValueError:  # a law about bools
        return None


def arithmetic(law):
    sides = [read(text) for text in law]
    nodes = [node for side in sides if side is not None for node in walk(side)]
    return None not in sides and all(node.op in MEANING or node.op in ("var", "const") for node in nodes)


def meaning(expr):
    if expr.op == "const":
        return sympy.Integer(expr.value)
    if expr.op == "var":
        return sympy.Symbol(expr.value, integer=True)
    return MEANING[expr.op](*(meaning(a) for a in expr.args))


PROVED = [law for law in LAWS if arithmetic(law)]


def test_most_arithmetic_laws_are_here():
    assert len(PROVED) >= 20


@pytest.mark.parametrize("law", PROVED, ids=" = ".join)
def test_law(law):
    left, right = (meaning(read(text)) for text in law)
    assert sympy.simplify((left - right).rewrite(sympy.Piecewise)) == 0
