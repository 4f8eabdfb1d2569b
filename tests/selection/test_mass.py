"""Pooled mass against its definition token by token, and what every selection promises."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.selection import FULL, Attention, BlockSelection, SelectionSpec, packed, tpd, unpacked
from stem_compile.selection.mass import log_masses
from stem_compile.selection.oam import hides_pairs
from tests.kernels.kernel_cases import ALIBI, BIAS, CAUSAL, EDGED, MASKS, PADDED, SINK, SOFTCAP, Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def cases(draw: st.DrawFn, longest: int = 120, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Case:
    mask = draw(st.sampled_from([*MASKS, *EDGED]))
    q_len, key_heads = draw(st.integers(1, longest)), draw(st.integers(1, 2))
    return Case(
        q_len=q_len,
        kv_len=q_len + (0 if "T0(b" in mask and mask != PADDED else draw(st.integers(0, 60))),
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([16, 24])),
        value_dim=draw(st.sampled_from([16, 24])),
        dtype=draw(st.sampled_from(dtypes)),
        mask=mask,
        kind=draw(st.sampled_from(["", SOFTCAP, ALIBI, BIAS, SINK, SOFTCAP + SINK])),
        pad=draw(st.sampled_from(["left", "right", "holes"])),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def mass_specs(draw: st.DrawFn, shares: tuple[str, ...] = ("none", "heads", "group")) -> SelectionSpec:
    return SelectionSpec(
        policy=draw(st.sampled_from(["stem", "output_aware"])),
        budget=draw(st.sampled_from([0.15, 0.4, 0.8])),
        mu=draw(st.sampled_from([0.3, 1.0])),
        pooling="mass",
        stride=draw(st.sampled_from([4, 8])),
        key_stride=draw(st.sampled_from([0, 4, 16])),
        block_q=draw(st.sampled_from([16, 32])),
        block_k=draw(st.sampled_from([16, 32])),
        sink_blocks=draw(st.integers(0, 1)),
        local_blocks=1,
        share=draw(st.sampled_from(shares)),
        kept=draw(st.sampled_from([0.0, 0.5, 1.0])),
        coverage=draw(st.sampled_from([None, None, 0.5, 0.95, 1.0])),
    )


def select(attention: Attention) -> BlockSelection:
    return tpd.tpd_select(log_masses(attention), attention.spec, attention.reach, attention.k.shape[1])


def brute_force(attention: Attention) -> torch.Tensor:
    """Every score, token by token, of an attention whose score is plain."""
    spec, (batch, heads, q_len, kv_len) = attention.spec, attention.shape
    (rows, columns), (size_q, size_k) = attention.blocks, spec.group_sizes
    causal = attention.mask.parts.causal
    shown = attention.mask.visible
    shown = torch.ones(1, kv_len, dtype=torch.bool) if shown is None else shown
    shown = shown.expand(batch, -1)
    visible = attention.mask.dense().expand(attention.shape)
    offset = None if causal is None else attention.mask.causal_offset
    scores = torch.full((batch, heads, rows, columns), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            key_head = h // attention.group
            masses = [[0.0] * columns for _ in range(rows)]
            seeing = [0] * rows
            counted: list[set[int]] = [set() for _ in range(rows)]
            for first in range(0, q_len, size_q):
                last = min(first + size_q, q_len) - 1
                q = attention.q[b, h, first : last + 1].mean(0)
                weights = {}
                for key in range(0, kv_len, size_k):
                    mine = [n for n in range(key, min(key + size_k, kv_len)) if shown[b, n]]
                    whole = offset is None or key + size_k - 1 <= min(last + offset, kv_len - 1)
                    if mine and whole and all(visible[b, h, last, n] for n in mine):
                        z = float(q @ attention.k[b, key_head, mine].mean(0)) * attention.scale
                        weights[key] = len(mine) * math.exp(z)
                if weights:
                    seeing[first // spec.block_q] += 1
                counted[first // spec.block_q].update(weights)
                for key, weight in weights.items():
                    masses[first // spec.block_q][key // spec.block_k] += weight / sum(weights.values())
            for r in range(rows):
                for c in range(columns):
                    mine = [n for n in range(c * spec.block_k, min((c + 1) * spec.block_k, kv_len)) if shown[b, n]]
                    if hides_pairs(attention):
                        mine = [n for n in mine if n // size_k * size_k in counted[r]]
                    norm = max((float(attention.v[b, key_head, n].norm()) for n in mine), default=0.0)
                    mass = masses[r][c] / max(seeing[r], 1)
                    tiny = torch.finfo(torch.float32).tiny
                    scores[b, h, r, c] = math.log(max(mass, tiny)) + spec.beta * max(0.0, math.log(max(norm, tiny)))
    return scores.masked_fill(~attention.candidates, -torch.inf)


@settings(max_examples=25, deadline=None)
@given(cases(longest=50), mass_specs(shares=("none",)))
def test_scores_follow_their_definition(case: Case, spec: SelectionSpec) -> None:
    case = dataclasses.replace(case, kind="")
    attention = case.attention(spec_text=spec.text()).to(torch.float64)
    torch.testing.assert_close(log_masses(attention), brute_force(attention))


def test_with_groups_of_one_a_mass_is_the_softmax_itself() -> None:
    spec = SelectionSpec(budget=0.5, pooling="mass", stride=1, beta=0.0, block_q=16, block_k=16)
    attention = Case(q_len=96, kv_len=96, kind=SOFTCAP + SINK).attention(spec_text=spec.text()).to(torch.float64)
    logits = attention.q @ attention.k.repeat_interleave(attention.group, 1).mT * attention.scale
    logits = attention.score.apply(logits, attention.mask.environment)
    logits = logits.masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(), -torch.inf)
    sink = attention.score.sink_logits(attention.shape, attention.tensors, attention.scalars, logits)
    assert sink is not None
    weights = torch.cat([logits, sink.expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :96]
    expected = weights.unflatten(-1, (6, 16)).sum(-1).unflatten(2, (6, 16)).mean(3).log()
    expected = expected.masked_fill(~attention.candidates, -torch.inf)
    torch.testing.assert_close(log_masses(attention), expected)


@settings(max_examples=40, deadline=None)
@given(cases(dtypes=DTYPES), mass_specs())
def test_lists_are_valid_and_budgets_are_met(case: Case, spec: SelectionSpec) -> None:
    attention = case.attention(spec_text=spec.text())
    lists = select(attention)
    candidates = attention.candidates.expand(*lists.counts.shape, lists.key_blocks)
    lists.check(candidates)
    dense, counts = lists.dense(candidates), lists.counts
    assert dense[tpd.forced(candidates, spec)].all()
    uniform = tpd.row_counts(candidates.sum(-1), spec, attention.reach).expand(counts.shape)
    assert torch.equal(uniform == FULL, counts == FULL)
    together = spec.sharing_heads(case.heads, case.key_heads)
    asked, given_ = (x.clamp(min=0).unflatten(1, (-1, together)).sum(2) for x in (uniform, counts))
    if spec.coverage is None:
        assert torch.equal(asked, given_), "a row computes as many blocks as its heads may together"
        kept = (uniform.clamp(min=0) * spec.kept).ceil().int()
        assert (counts >= torch.where(counts == FULL, FULL, kept)).all()
    else:
        assert (given_ <= asked).all()


@settings(max_examples=30, deadline=None)
@given(cases(), mass_specs())
def test_coverage_is_reached_with_the_fewest_blocks(case: Case, spec: SelectionSpec) -> None:
    spec = dataclasses.replace(spec, coverage=0.7, budget=0.9, share="none")
    attention = case.attention(spec_text=spec.text())
    weight = log_masses(attention).double().exp()
    lists = select(attention)
    dense = lists.dense(attention.candidates)
    listed = lists.counts > 0
    covered = (weight * dense).sum(-1) / weight.sum(-1).clamp(min=1e-300)
    free = dense & ~tpd.forced(attention.candidates.expand(dense.shape), spec)
    least = torch.where(free, weight, torch.inf).amin(-1)
    without = covered - torch.where(least.isinf(), 0, least) / weight.sum(-1).clamp(min=1e-300)
    limit = tpd.row_limits(attention.candidates.sum(-1), spec, attention.reach).expand(lists.counts.shape)
    assert ((covered >= 0.7 - 1e-5) | (lists.counts == limit) | ~listed).all()
    assert ((without < 0.7 + 1e-5) | ~free.any(-1) | ~listed).all(), "one block fewer would have been enough"


@settings(max_examples=30, deadline=None)
@given(cases(), mass_specs())
def test_hidden_keys_are_never_read(case: Case, spec: SelectionSpec) -> None:
    case = dataclasses.replace(case, mask=PADDED, kind="" if "T#" in case.kind else case.kind)
    attention = case.attention(spec_text=spec.text())
    assert attention.mask.visible is not None
    hidden = ~attention.mask.visible[:, None, :, None]
    poisoned = dataclasses.replace(
        attention, k=attention.k.masked_fill(hidden, torch.nan), v=attention.v.masked_fill(hidden, torch.nan)
    )
    assert torch.equal(log_masses(poisoned), log_masses(attention))
    assert all(map(torch.equal, cpu.select(poisoned, "cpu mass"), cpu.select(attention, "cpu mass")))


@settings(max_examples=30, deadline=None)
@given(cases(longest=100), mass_specs(), st.integers(0, 5))
def test_nothing_of_later_tokens(case: Case, spec: SelectionSpec, row: int) -> None:
    case = dataclasses.replace(case, mask=CAUSAL, kind="", kv_len=case.q_len)
    attention = case.attention(spec_text=dataclasses.replace(spec, prompt_length=case.q_len).text())
    row %= attention.blocks[0]
    end = min((row + 1) * spec.block_q, case.q_len)
    later = torch.arange(case.q_len)[None, None, :, None] >= end
    changed = dataclasses.replace(
        attention,
        q=attention.q.masked_fill(later, 7.0),
        k=attention.k.masked_fill(later, torch.nan),
        v=attention.v.masked_fill(later, 0.0),
    )
    before, after = log_masses(attention)[:, :, : row + 1], log_masses(changed)[:, :, : row + 1]
    own = torch.arange(before.shape[-1]) < end // spec.block_k  # the diagonal block's value term reads its last keys
    torch.testing.assert_close(after[..., own], before[..., own])


@settings(max_examples=20, deadline=None)
@given(cases(), mass_specs())
def test_batch_rows_do_not_meet(case: Case, spec: SelectionSpec) -> None:
    case = dataclasses.replace(case, batch=2, mask=CAUSAL, kind="")
    both = case.attention(spec_text=spec.text())
    one = dataclasses.replace(both, q=both.q[1:], k=both.k[1:], v=both.v[1:])
    dense = select(both).dense(both.candidates)
    torch.testing.assert_close(log_masses(both)[1:], log_masses(one))
    assert (select(one).dense(one.candidates) == dense[1:]).float().mean() > 0.99  # but for ties


@pytest.mark.parametrize("share", ["none", "heads", "group"])
def test_chunks_select_as_one_shot_does(share: str) -> None:
    spec = SelectionSpec(
        budget=0.3, pooling="mass", stride=4, key_stride=8, block_q=32, block_k=16, sink_blocks=0, local_blocks=1,
        share=share, prompt_length=203,
    )  # fmt: skip
    whole = Case(q_len=203, kv_len=203, heads=4, key_heads=2, mask=CAUSAL).attention(spec_text=spec.text())
    dense = select(whole).dense(whole.candidates)
    for start, end in ((0, 64), (64, 160), (160, 203)):
        chunk = dataclasses.replace(
            whole, q=whole.q[:, :, start:end], k=whole.k[:, :, :end], v=whole.v[:, :, :end],
            mask_text=f"kv <= q + {start}",
        )  # fmt: skip
        rows = slice(start // 32, -(-end // 32))
        assert torch.equal(select(chunk).dense(chunk.candidates), dense[:, :, rows, : -(-end // 16)])
        longer = dataclasses.replace(
            chunk,
            k=torch.nn.functional.pad(chunk.k, (0, 0, 0, 100), value=torch.nan),
            v=torch.nn.functional.pad(chunk.v, (0, 0, 0, 100)),
        )
        assert torch.equal(
            select(longer).dense(longer.candidates)[..., : -(-end // 16)], dense[:, :, rows, : -(-end // 16)]
        )


@settings(max_examples=40, deadline=None)
@given(cases(dtypes=DTYPES), mass_specs())
def test_the_cpu_selects_as_the_definition_does(case: Case, spec: SelectionSpec) -> None:
    attention = case.attention(spec_text=spec.text())
    expected = select(attention)
    indices, counts = cpu.select(attention, "cpu mass")
    ours = attention.selection(indices, counts)
    assert ours.indices.shape == expected.indices.shape or spec.share == "none"
    ours.check(attention.candidates)
    assert torch.equal(counts == FULL, expected.counts == FULL)
    differing = ours.dense(attention.candidates) != expected.dense(attention.candidates)
    scores = log_masses(attention)
    # Only near ties may fall otherwise: what one took and the other did not lies at the threshold.
    spread = torch.where(differing, scores, torch.nan)
    together = spec.sharing_heads(case.heads, case.key_heads)
    rows = spread.unflatten(1, (-1, together)).transpose(2, 3).flatten(3)
    gap = rows.nan_to_num(nan=-torch.inf).amax(-1) - rows.nan_to_num(nan=torch.inf).amin(-1)
    assert (gap <= 1e-3).all() or (spec.coverage is not None and differing.float().mean() < 0.02)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_packing_keeps_every_list(heads: int, rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-1, width + 1, (2, heads, rows), generator=generator)
    lists = torch.randint(0, 99, (2, heads, rows, width), generator=generator)
    flat = packed(lists, counts, width)
    assert flat.shape == (2, rows, heads * width)
    listed = torch.arange(width) < counts.unsqueeze(-1)
    assert torch.equal(unpacked(flat, counts, width)[listed], lists[listed].int())


def test_budgets_move_to_the_heads_that_need_them() -> None:
    case = Case(q_len=512, kv_len=512, heads=2, key_heads=2, mask=CAUSAL, head_dim=16)
    spec = SelectionSpec(
        budget=0.5, mu=1.0, pooling="mass", stride=4, block_q=32, block_k=32, sink_blocks=1, local_blocks=1,
        share="heads", kept=0.5,
    )  # fmt: skip
    attention = case.attention(spec_text=spec.text())
    q = attention.q.clone()
    q[:, 1] = 0.0  # looks everywhere alike
    q[:, 0], attention.k[:, 0, :32] = 6.0, 6.0  # looks at the first block
    lists = select(dataclasses.replace(attention, q=q))
    rows = slice(10, 15)
    assert (lists.counts[0, 1, rows] > lists.counts[0, 0, rows]).all()
    uniform = tpd.row_counts(attention.candidates.sum(-1), spec)[0, 0, rows]
    assert torch.equal(lists.counts[0, 0, rows], ((uniform + 1) // 2).clamp(min=spec.sinks + spec.locals).int())
