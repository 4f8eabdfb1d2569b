"""The function table: whatever is drawn from its rows reads back from text as it was, lies in its bounds, and means
the same in torch and in Triton. A new row is tested by being in the table."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton
import triton.language as tl

from stem_compile.algebra import functions, masks, symbolic, text
from stem_compile.algebra.functions import BOOLEAN, INTEGER, NUMBER, REAL, Distance, Function, Sort
from stem_compile.algebra.masks import environment
from stem_compile.algebra.rounding import BFloat16, Float16, Float32, Int32
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, SCORE, B, H, Q
from stem_compile.kernels import cache
from stem_compile.kernels.spec import KernelSpec
from stem_compile.kernels.triton import codegen
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.testing.tolerances import PRINTED
from tests.numerics import assert_close

SHAPE = (2, 2, 5, 7)
IDS = torch.tensor([[3, -2, 0, 5, 1, 9, 4], [0, 0, 2, 2, -7, 1, 6]])
SLOPES = torch.tensor([0.75, -1.25])
SCALAR = 3
SCORES = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

LEAVES: dict[Sort, list[Any]] = {
    INTEGER: [Q, KV, H, B, Q_LEN, KV_LEN, symbolic.scalar(0), symbolic.tensor(0)(B, KV), symbolic.tensor(0)(B, Q)],
    REAL: [SCORE, symbolic.tensor(1)(H)],
}
POWERS = (2, 3, -1, -2, sympy.Rational(1, 2), sympy.Rational(-1, 2), sympy.Float(0.3))


def env() -> dict[Any, Any]:
    axes = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(SHAPE)]
    return environment(SHAPE, [IDS, SLOPES], [SCALAR]) | dict(zip((B, H, Q, KV), axes)) | {SCORE: SCORES}


def box() -> dict[Any, Any]:
    whole = {s: (0, n - 1) for s, n in zip((B, H, Q, KV), SHAPE)}
    loads = {
        symbolic.tensor(0): lambda *_: (int(IDS.min()), int(IDS.max())),
        symbolic.tensor(1): lambda *_: (float(SLOPES.min()), float(SLOPES.max())),
    }
    lengths = {Q_LEN: (SHAPE[2],) * 2, KV_LEN: (SHAPE[3],) * 2, symbolic.scalar(0): (SCALAR, SCALAR)}
    return whole | loads | lengths | {SCORE: (float(SCORES.min()), float(SCORES.max()))}


@st.composite
def expressions(draw: Any, sort: Sort, depth: int, row: Function | None = None) -> Any:
    """Expressions of a sort, at most ``depth`` functions deep; ``row``: the outermost one."""
    if row is None:
        rows = [r for r in functions.table() if r.gives is sort or (r.gives is NUMBER and sort is not BOOLEAN)]
        if sort is not BOOLEAN and (depth == 0 or draw(st.integers(0, 3)) == 0):
            numbers = st.integers(-9, 9) if sort is INTEGER else st.floats(-2, 2, width=32).map(sympy.Float)
            return draw(st.one_of(st.sampled_from(LEAVES[sort]), numbers.map(sympy.sympify)))
        if depth <= 0:
            rows = [r for r in rows if BOOLEAN not in r.takes]
        row = draw(st.sampled_from(rows))
    takes = [*row.takes, *([row.takes[-1]] if row.variadic and draw(st.booleans()) else [])]
    # Comparisons of computed real numbers turn on their last bit.
    numeric = INTEGER if sort is BOOLEAN else sort
    args = [draw(expressions(numeric if t is NUMBER else t, depth - 1)) for t in takes]
    for place in row.constants:
        args[place] = draw(st.sampled_from(POWERS)) if row.name == "Pow" else draw(st.integers(1, 5))
    for place, domain in enumerate(row.domain):
        if domain is not None:
            low, high = symbolic.bounds(sympy.sympify(args[place]), box())
            if not (domain[0] <= low and high <= domain[1]):
                args[place] = sympy.Max(args[place], 1 if takes[place] is INTEGER else sympy.Float(0.25))
    return sympy.sympify(row.kind(*args))


def any_expression(depth: int = 3) -> st.SearchStrategy[Any]:
    """Expressions with each row of the table as often as any other at the top."""
    rows = st.sampled_from(functions.table())
    return rows.flatmap(lambda r: expressions(REAL if r.gives is NUMBER else r.gives, depth, r)).filter(_is_finite)


def _is_finite(expr: Any) -> bool:
    return not expr.has(sympy.nan, sympy.zoo, sympy.I) and not any(
        abs(n) > 1e9 for n in expr.atoms(sympy.Number) if n.is_finite
    )


@settings(max_examples=60)
@given(any_expression())
def test_text_reads_back_as_it_was(expr: Any) -> None:
    encoded = text.encode(expr)
    assert text.decode(encoded) == expr
    assert text.encode(text.decode(encoded)) == encoded


@settings(max_examples=60)
@given(any_expression())
def test_values_lie_within_bounds(expr: Any) -> None:
    value = torch.as_tensor(symbolic.evaluate(expr, env()), dtype=torch.float64)
    low, high = symbolic.bounds(expr, box())
    known = value[~value.isnan()]
    assert ((known >= float(low)) & (known <= float(high))).all(), (low, high, known.min(), known.max())


def magnitude(expr: Any, bound: dict[Any, Any]) -> float:
    """Largest number on the way to an expression's value: errors are measured against it."""
    worst = 0.0
    for part in sympy.preorder_traversal(expr):
        if part.is_number or isinstance(part, sympy.logic.boolalg.Boolean) or part.is_Symbol:
            continue
        worst = max(worst, float(torch.as_tensor(symbolic.evaluate(part, bound), dtype=torch.float64).abs().max()))
    return worst


@settings(max_examples=2, phases=[Phase.generate])
@pytest.mark.parametrize("row", functions.table(), ids=lambda r: r.name)
@given(data=st.data())
def test_triton_means_what_torch_does(row: Function, data: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    sorts = (INTEGER, REAL) if row.gives is NUMBER else (row.gives,)
    drawn = [data.draw(expressions(sort, 2, row)) for sort in sorts for _ in range(2)]
    usable = [e for e in drawn if _is_finite(e) and not e.is_number and e not in (sympy.true, sympy.false)]
    exprs = {f"f{n}": e for n, e in enumerate(usable)}
    results = run(exprs, tmp_path_factory.mktemp("triton"))
    bound = env()
    for name, expr in exprs.items():
        expected = torch.as_tensor(symbolic.evaluate(expr, bound), dtype=torch.float64).expand(SHAPE)
        size = magnitude(expr, bound)
        if not math.isfinite(size) or size > 1e6:
            continue
        tolerance = 1e-5 * max(size, 1.0) ** 2 if expr.is_integer is not True else 0.0
        wrong = ~((results[name] - expected).abs() <= tolerance)
        assert not wrong.any(), (text.encode(expr), results[name][wrong][:3], expected[wrong][:3])


def run(exprs: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Values of the printed expressions, [B, H, Q, KV] each, by Triton's interpreter."""
    mask = masks.encode(masks.predicate(sympy.Ge(symbolic.tensor(0)(B, KV), KV)))
    tensors, layouts, scalars = arguments([IDS, SLOPES], [SCALAR], mask, "s + T1(h)")
    body = ["from stem_compile.kernels.triton import codegen", codegen.functions_source(_all_loads(exprs))]
    body += ["@triton.jit", "def store_all(s, out, B, H, q_len, kv_len, tensors, layouts, scalars):"]
    body += ["    q = tl.arange(0, 8)[:, None]", "    kv = tl.arange(0, 8)[None, :]"]
    body += ["    inside = (q < q_len) & (kv < kv_len)", "    b, h = tl.program_id(0), tl.program_id(1)"]
    body += ["    at = ((b * H + h) * q_len + q) * kv_len + kv", "    x = tl.load(s + at, mask=inside, other=0.0)"]
    body += ["    size = B * H * q_len * kv_len"]
    for n, name in enumerate(exprs):
        value = f"{name}(x, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars)"
        body.append(f"    tl.store(out + {n} * size + at, (tl.zeros([8, 8], tl.float64) + {value}), mask=inside)")
    path = folder / "drawn.py"
    path.write_text("\n".join(body) + "\n")
    spec = importlib.util.spec_from_file_location("drawn", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.zeros(len(exprs), *SHAPE, dtype=torch.float64)
    module.store_all[SHAPE[:2]](SCORES, out, *SHAPE, tensors, layouts, scalars)
    return dict(zip(exprs, out))


def _all_loads(exprs: dict[str, Any]) -> dict[str, Any]:
    """Every expression beside one that reads both tensors, so that layouts are the same for all."""
    return exprs | {"both": symbolic.tensor(0)(B, KV) + symbolic.tensor(1)(H)}


def test_every_row_has_been_printed() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    assert {r.name for r in functions.table()} >= {"Xor", "Pow", "Where", "tanh", "FloorDiv", "Mod", "Le"}


@pytest.mark.parametrize(
    "expr",
    [
        sympy.Xor(sympy.Le(KV, Q), sympy.Lt(KV, 3)),
        Q ** sympy.Rational(-1, 2),
        1 / (KV + 1) ** 2,
        SCORE / (Q * (KV + 1)),
        sympy.Float(0.1) * SCORE,
        sympy.Float(1e-30) + SCORE,
        symbolic.Where(sympy.Le(KV, Q), SCORE, -sympy.oo),
        sympy.Max(SCORE, -sympy.Float(1e38)),
        sympy.Ge(5, KV, evaluate=False),
        sympy.Not(sympy.Le(KV, Q), evaluate=False),
        sympy.exp((KV - Q) / 2),
        sympy.exp(1) * SCORE + sympy.pi,
        sympy.Rational(1, 3) * Q - 2 * SCORE * (Q + KV),
        -(Q - KV) * SCORE,
        sympy.true,
        sympy.Integer(-7),
    ],
)
def test_spellings_that_text_once_lost(expr: Any) -> None:
    assert text.decode(text.encode(expr)) == expr


def test_xor_of_conditions_is_no_power() -> None:
    mask = masks.predicate(sympy.Xor(sympy.Le(KV, Q), sympy.Lt(KV, 3)))
    again = masks.decode(masks.encode(mask))
    q, kv = torch.arange(6)[:, None], torch.arange(6)[None]
    assert torch.equal(again.dense((1, 1, 6, 6))[0, 0], (kv <= q) ^ (kv < 3))


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("__import__('os').system('true')", "not"),
        ("q.real", "not an expression"),
        ("q ^ kv", "Xor"),
        ("a <= q", "unknown name"),
        ("q < kv < 5", "not one comparison"),
        ("sin(q)", "unknown function"),
        ("FloorDiv(q)", "takes 2"),
        ("'q'", "not a number"),
        ("T0", "unknown name"),
        ("[q]", "not an expression"),
    ],
)
def test_text_outside_the_language_is_refused(written: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        text.decode(written)


@pytest.mark.parametrize(
    ("expr", "name"),
    [
        (sympy.sin(Q) <= KV, "sin"),
        (sympy.Le(sympy.Symbol("u0"), KV), "u0"),
        (sympy.Piecewise((Q, KV > 3), (KV, True)) + SCORE, "Piecewise"),
        (SCORE * sympy.Float("0.1234567890123456789012", 25), "more digits"),
        (sympy.Pow(2, Q) + SCORE, "is no number"),
        (symbolic.tensor(16)(Q) + SCORE, "at most 16"),
    ],
)
def test_what_is_outside_the_algebra_is_named(expr: Any, name: str) -> None:
    with pytest.raises(symbolic.OutsideAlgebra, match=name):
        text.encode(expr)


def test_expanding_keeps_exponentials_whole() -> None:
    expr = symbolic.expand(SCORE * sympy.exp((KV - Q) / 2) * (Q + 1))
    assert expr.atoms(sympy.exp) == {sympy.exp(KV / 2 - Q / 2)} or len(expr.atoms(sympy.exp)) == 1


@pytest.fixture
def sign() -> Any:
    class Sign(sympy.Function):  # type: ignore[misc]
        nargs = (1,)

    row = Function(
        "Sign",
        Sign,
        (REAL,),
        REAL,
        lambda x: torch.sign(torch.as_tensor(x)),
        lambda a: (-1, 1),
        "{tl}.where({0} > 0, 1.0, {tl}.where({0} < 0, -1.0, 0.0))",
    )
    functions.register(row)
    yield Sign
    functions.unregister("Sign")


def test_a_registered_function_goes_everywhere(sign: Callable[..., Any], tmp_path: Path) -> None:
    expr = SCORE + sign(SCORE - symbolic.tensor(1)(H))
    assert text.decode(text.encode(expr)) == expr
    result = run({"f": expr}, tmp_path)["f"]
    assert_close(result, symbolic.evaluate(expr, env()).double(), PRINTED, torch.float32)
    assert symbolic.bounds(sign(SCORE), {}) == (-1, 1)
    with pytest.raises(ValueError, match="registered already"):
        functions.register(functions.by_name()["Sign"])


POSITIONS = torch.arange(64)
HALVES: dict[str, tuple[Any, Callable[[Any, Any], torch.Tensor]]] = {
    "fp32 products, difference": (
        lambda c: Float32(Float32(Float32(Q) * c) - Float32(Float32(KV) * c)) <= sympy.Float(0.5),
        lambda q, kv: (q * 0.02 - kv * 0.02) <= 0.5,
    ),
    "bf16 positions": (
        lambda c: BFloat16(BFloat16(KV) + 300) <= BFloat16(BFloat16(Q) + 300),
        lambda q, kv: kv.bfloat16() + 300 <= q.bfloat16() + 300,
    ),
    "fp16 quotient": (
        lambda c: Float16(Float16(KV) / 7) < Float16(Float16(Q) / 7),
        lambda q, kv: kv.half() / 7 < q.half() / 7,
    ),
    "int32 wraps": (
        lambda c: Int32(Int32(Q * 100_000_000) + KV) > 0,
        lambda q, kv: q.int() * 100_000_000 + kv.int() > 0,
    ),
}


@pytest.mark.parametrize("name", HALVES)
def test_arithmetic_in_a_dtype_is_that_of_torch(name: str, tmp_path: Path) -> None:
    build, torchs = HALVES[name]
    predicate = sympy.sympify(build(sympy.Float(torch.tensor(0.02).item())))
    expected = torchs(POSITIONS[:, None], POSITIONS[None, :])
    assert not torch.equal(expected, POSITIONS[:, None] >= POSITIONS)
    mask = masks.decode(masks.encode(masks.predicate(predicate)))
    assert mask.predicate == predicate
    assert torch.equal(mask.dense((1, 1, 64, 64))[0, 0], expected)
    module = cache.load(KernelSpec("portable", mask=masks.encode(mask)))
    printed = torch.zeros(64, 64, dtype=torch.int32)
    store_visible[(1,)](printed, 64, (), (), (), module.visible, BLOCK=64)
    assert torch.equal(printed.bool(), expected)
    for rows in POSITIONS.split(16):
        for keys in POSITIONS.split(16):
            at = {Q: (int(rows[0]), int(rows[-1])), KV: (int(keys[0]), int(keys[-1]))}
            certain, possible = symbolic.bounds(predicate, at)
            block = expected[rows][:, keys]
            assert block.all() or not certain
            assert possible or not block.any()


@triton.jit
def store_visible(out, n, tensors, layouts, scalars, visible: tl.constexpr, BLOCK: tl.constexpr):
    q = tl.arange(0, BLOCK)[:, None]
    kv = tl.arange(0, BLOCK)[None, :]
    tl.store(out + q * n + kv, visible(0, 0, q, kv, n, n, tensors, layouts, scalars).to(tl.int32))


@pytest.mark.parametrize(
    ("expr", "same"),
    [
        (Float32(BFloat16(Q)), BFloat16(Q)),
        (BFloat16(BFloat16(Q)), BFloat16(Q)),
        (BFloat16(sympy.Integer(257)), sympy.Float(256)),
        (BFloat16(sympy.Integer(256)), sympy.Integer(256)),
        (Float16(sympy.Rational(1, 3)), sympy.Float(torch.tensor(1 / 3).half().item())),
        (Int32(sympy.Integer(1 << 31)), sympy.Integer(-(1 << 31))),
    ],
)
def test_rounding_what_is_rounded_changes_nothing(expr: Any, same: Any) -> None:
    assert expr == same


@pytest.mark.parametrize(
    ("expr", "source"),
    [
        (Q * 1000 * KV, "(tl.cast(kv, tl.int64) * 1000 * q)"),
        (Q * 100 + KV, "(kv + (100 * q))"),
        (Q - symbolic.scalar(0), "(((-1) * S) + q)"),
        (Q + symbolic.tensor(0)(), "(long(load0(tensors, layouts)) + q)"),
        (Distance(KV, Q) * symbolic.tensor(0)(H), "(long(load0(h, tensors, layouts)) * (kv - q))"),
        (Distance(KV, Q) ** 2, "(tl.cast((kv - q), tl.int64) * (kv - q))"),
        (sympy.tanh(SCORE / 5), "tanh((0.2 * s))"),
        (sympy.exp(KV - Q), "tl.exp(((kv + ((-1) * q)) * 1.0))"),
    ],
)
def test_whole_numbers_are_as_wide_as_they_must_be(expr: Any, source: str) -> None:
    names = {Q: "q", KV: "kv", H: "h", SCORE: "s", symbolic.scalar(0): "S"}
    assert codegen.triton_expression(expr, names) == source


def test_expanding_leaves_what_is_rounded_alone() -> None:
    rounded = Float32(SCORE * (Q + KV))
    assert symbolic.expand(2 * rounded * (Q + 1)) == 2 * Q * rounded + 2 * rounded


def test_a_scalar_too_large_for_positions_is_refused() -> None:
    with pytest.raises(OverflowError, match=r"S0 is 1073741824"):
        arguments([], [1 << 30], "kv <= S0 + q")


@pytest.mark.parametrize(("a", "b"), itertools.product((-7, -6, 0, 5), (1, 2, 3)))
def test_division_floors_as_torch_does(a: int, b: int) -> None:
    x = torch.tensor([a])
    place = sympy.Symbol("x", integer=True)
    assert symbolic.evaluate(symbolic.FloorDiv(place, b), {place: x}) == torch.div(x, b, rounding_mode="floor")
    assert symbolic.evaluate(sympy.Mod(place, b), {place: x}) == torch.remainder(x, b)
