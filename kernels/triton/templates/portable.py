"""Portable block-sparse attention: one program per (ROWS queries of a block, query head), online softmax over the
listed key blocks.

q: [B, H, q_len, HEAD_DIM], k: [B, Hk, kv_len, HEAD_DIM], v: [B, Hk, kv_len, VALUE_DIM], o like q with VALUE_DIM; last
stride 1, others any.
indices: int32 [B, H, rows, width], ascending; counts: int32 [B, H, rows], -1 for every block in the causal range. A
listed row's blocks that no query of the row sees entirely come last, so the mask is evaluated on those only, unless the
mask is more than causal (GENERAL). A mask with a far edge (BANDED) bounds what a row without a list reads; where it
hides nothing between its edges (EDGES), the tiles between skip it too.
Scores are kept in powers of two: exp2 with log2(e) folded into the scale. Hidden scores are -inf and a row's peak
starts at a finite FLOOR, so that no step makes a NaN and hidden weights are exactly 0; a row that saw none gives 0 and
a log-sum-exp of -inf. A sink is where a row's softmax
starts: its peak, with a total of 1.

Where weights have the exponents of float32 (FIXED), a row's peak is that of its first tile and no tile waits for its
largest score; rows whose sum leaves the range for which that serves are marked, and ``attend_marked`` computes them
again with a peak that follows the scores.
"""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(64)
VALUE_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
CAUSAL = tl.constexpr(True)
GENERAL = tl.constexpr(False)
BANDED = tl.constexpr(False)
EDGES = tl.constexpr(False)
MODIFIED = tl.constexpr(False)
SINK = tl.constexpr(False)
FIXED = tl.constexpr(True)
PRECISION = tl.constexpr("tf32")


@triton.jit
def visible(b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):
    return kv <= q


@triton.jit
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


@triton.jit
def lowest(b, q, q_len, kv_len, tensors, layouts, scalars):
    return 0


@triton.jit
def score(s, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):
    return s


@triton.jit
def sink(b, h, tensors, layouts, scalars):
    return 0.0


# generated: end
FLOOR = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)
# FIXED, as in ``hopper.py``: how far (log2) the peak lies above the first tile's largest score, and the sums that are
# in range.
SHIFT = tl.constexpr(32.0)
LEAST = tl.constexpr(2.0**-90)
MOST = tl.constexpr(2.0**64)
D: tl.constexpr = tl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
DV: tl.constexpr = tl.constexpr(triton.next_power_of_2(VALUE_DIM.value))


@triton.jit
def _load_rows(pointers, present, WIDTH: tl.constexpr, PADDED: tl.constexpr, RAGGED: tl.constexpr):
    """Rows of WIDTH elements padded with zeros to PADDED. RAGGED: rows where ``present`` is False are zero; else every
    row exists."""
    if WIDTH != PADDED:
        column = tl.arange(0, PADDED)[None, :] < WIDTH
        if RAGGED:
            return tl.load(pointers, mask=present[:, None] & column, other=0.0)
        else:
            return tl.load(pointers, mask=column, other=0.0)
    elif RAGGED:
        return tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _hide(scores, kv, rows, b, h, q_len, kv_len, tensors, layouts, scalars):
    """Scores with what the mask hides, and keys past the end, at -inf."""
    shown = visible(b, h, rows[:, None], kv, q_len, kv_len, tensors, layouts, scalars) & (kv < kv_len)
    return tl.where(shown, scores, -float("inf"))


@triton.jit
def _scores(
    i,
    q,
    k_ptr,
    index_ptr,
    listed,
    rows,
    b,
    h,
    hk,
    q_len,
    kv_len,
    stride_k,
    natural,
    tensors,
    layouts,
    scalars,
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
    BULK: tl.constexpr,
):
    """(first key, scores) of the list's i-th tile; products, or what the softmax takes if they are MODIFIED."""
    SPLIT: tl.constexpr = BLOCK_K // TILE
    column = tl.arange(0, TILE)
    block = tl.load(index_ptr + i // SPLIT, mask=listed, other=0)
    start = tl.where(listed, block * BLOCK_K + (i - i // SPLIT * SPLIT) * TILE, i * TILE)
    if BULK:
        k = k_ptr.load([b, hk, start, 0]).reshape([TILE, D])
    else:
        k_offsets = column[:, None] * stride_k + tl.arange(0, D)[None, :]
        k = _load_rows(k_ptr + start.to(tl.int64) * stride_k + k_offsets, start + column < kv_len, HEAD_DIM, D, RAGGED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MODIFIED:
        scores = score(
            scores * natural, b, h, rows[:, None], start + column[None, :], q_len, kv_len, tensors, layouts, scalars
        )
    return start, scores


@triton.jit
def _sweep(
    acc,
    peak,
    total,
    q,
    k_ptr,
    v_ptr,
    index_ptr,
    listed,
    first,
    last,
    far,
    near,
    rows,
    b,
    h,
    hk,
    q_len,
    kv_len,
    stride_k,
    stride_v,
    scale,
    tensors,
    layouts,
    scalars,
    MASKED: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    BULK: tl.constexpr,
    FOLLOW: tl.constexpr,
):
    """Online softmax over the tiles [first, last) of this row's list. Under EDGES the mask hides nothing between keys
    ``far`` and ``near``.

    scale: turns products into powers of two; for MODIFIED scores it is the attention's own. FOLLOW: the peak rises with
    the scores.
    """
    natural = scale
    if MODIFIED:
        scale = LOG2E
    column = tl.arange(0, TILE)
    v_offsets = column[:, None] * stride_v + tl.arange(0, DV)[None, :]
    for i in tl.range(first, last, num_stages=STAGES):
        start, scores = _scores(
            i,
            q,
            k_ptr,
            index_ptr,
            listed,
            rows,
            b,
            h,
            hk,
            q_len,
            kv_len,
            stride_k,
            natural,
            tensors,
            layouts,
            scalars,
            MASKED,
            TILE,
            BULK,
        )
        if MASKED:
            if EDGES:
                if (start < far) | (start + TILE > near):
                    scores = _hide(
                        scores, start + column[None, :], rows, b, h, q_len, kv_len, tensors, layouts, scalars
                    )
            else:
                scores = _hide(scores, start + column[None, :], rows, b, h, q_len, kv_len, tensors, layouts, scalars)
        if FOLLOW:
            higher = tl.maximum(peak, tl.max(scores, 1) * scale)
            shrink = tl.exp2(peak - higher)
            total = total * shrink
            acc = acc * shrink[:, None]
            peak = higher
        weights = tl.exp2(scores * scale - peak[:, None])
        total += tl.sum(weights, 1)
        if BULK:
            v = v_ptr.load([b, hk, start, 0]).reshape([TILE, DV])
        else:
            v = _load_rows(
                v_ptr + start.to(tl.int64) * stride_v + v_offsets, start + column < kv_len, VALUE_DIM, DV, MASKED
            )
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def _attend(
    part,
    head_row,
    marks_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    heads,
    group,
    q_len,
    kv_len,
    width,
    scale,
    tensors,
    layouts,
    scalars,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    LSE: tl.constexpr,
    BULK: tl.constexpr,
    PACKED: tl.constexpr,
    FOLLOW: tl.constexpr,
):
    """ROWS query rows, the ``part``-th of their head. FOLLOW: the peak rises with the scores; else they are marked or
    not. The rest as ``attend``'s."""
    PARTS: tl.constexpr = BLOCK_Q // ROWS
    row = part // PARTS
    part_row = part * ROWS
    b, h = head_row // heads, head_row % heads
    bi, hi, hk = b.to(tl.int64), h.to(tl.int64), h // group
    rows = part_row + tl.arange(0, ROWS)
    inside = rows < q_len
    lane = tl.arange(0, ROWS)
    first_row = part_row.to(tl.int64)
    q_tile = q_ptr + bi * q_strides[0] + hi * q_strides[1] + first_row * q_strides[2]
    q = _load_rows(q_tile + lane[:, None] * q_strides[2] + tl.arange(0, D)[None, :], inside, HEAD_DIM, D, True)
    if not BULK:
        k_ptr += bi * k_strides[0] + hk.to(tl.int64) * k_strides[1]
        v_ptr += bi * v_strides[0] + hk.to(tl.int64) * v_strides[1]

    # Blocks [0, whole) are visible to every row, blocks [reach, ...) to none.
    reach, whole = kv_len, kv_len
    if CAUSAL:
        before = offset(q_len, kv_len, tensors, layouts, scalars)
        reach = tl.minimum(kv_len, tl.minimum(row * BLOCK_Q + BLOCK_Q, q_len) + before)
        whole = tl.minimum(kv_len, row * BLOCK_Q + 1 + before)
    reach = tl.cdiv(tl.maximum(reach, 0), BLOCK_K)
    whole = tl.maximum(whole, 0) // BLOCK_K
    all_rows = tl.cdiv(q_len, BLOCK_Q)
    where = head_row.to(tl.int64) * all_rows + row
    count = tl.load(counts_ptr + where)
    index_ptr = indices_ptr + where * width
    if PACKED > 0:
        other = tl.arange(0, PACKED)
        lengths = tl.load(counts_ptr + (b * heads + other) * all_rows + row, mask=other < h, other=0)
        index_ptr = indices_ptr + (b * all_rows + row).to(tl.int64) * heads * width
        index_ptr += tl.sum(tl.maximum(lengths, 0), 0)
    listed = count >= 0
    blocks = tl.where(listed, count, reach)
    easy = tl.minimum(whole, blocks)
    if listed:
        # At most the last TAIL listed blocks can be cut.
        TAIL: tl.constexpr = triton.next_power_of_2(triton.cdiv(BLOCK_Q, BLOCK_K) + 2)
        place = blocks - 1 - tl.arange(0, TAIL)
        ends = tl.load(index_ptr + place, mask=place >= 0, other=0)
        easy = blocks - tl.sum(((ends >= whole) & (place >= 0)).to(tl.int32), 0)
    if GENERAL:
        easy = blocks * 0
    far, near = 0, kv_len
    if BANDED:
        lowest_block = tl.maximum(lowest(b, row * BLOCK_Q, q_len, kv_len, tensors, layouts, scalars), 0) // BLOCK_K
        easy = tl.where(listed, 0, tl.minimum(lowest_block, blocks))
        far = lowest(b, tl.minimum(part_row + ROWS, q_len) - 1, q_len, kv_len, tensors, layouts, scalars)
        if CAUSAL:
            near = tl.minimum(kv_len, part_row + 1 + before)
    SPLIT: tl.constexpr = BLOCK_K // TILE

    begin = 0
    if GENERAL:
        begin = easy * SPLIT
    peak = tl.full([ROWS], FLOOR, tl.float32)
    if SINK:
        peak = tl.maximum(peak, sink(b, h, tensors, layouts, scalars) * LOG2E)
    if not FOLLOW:
        # Hidden scores count: a row may see no key of this tile, and they are as large as others. An empty list has a
        # tile all the same.
        _, scores = _scores(
            begin,
            q,
            k_ptr,
            index_ptr,
            listed & (blocks > 0),
            rows,
            b,
            h,
            hk,
            q_len,
            kv_len,
            k_strides[2],
            scale,
            tensors,
            layouts,
            scalars,
            True,
            TILE,
            BULK,
        )
        factor = scale
        if MODIFIED:
            factor = LOG2E
        peak = tl.maximum(peak, tl.max(scores, 1) * factor) + SHIFT
    total = tl.zeros([ROWS], tl.float32)
    if SINK:
        total += tl.exp2(sink(b, h, tensors, layouts, scalars) * LOG2E - peak)
    acc = tl.zeros([ROWS, DV], tl.float32)
    if not GENERAL:
        acc, peak, total = _sweep(
            acc,
            peak,
            total,
            q,
            k_ptr,
            v_ptr,
            index_ptr,
            listed,
            0,
            easy * SPLIT,
            far,
            near,
            rows,
            b,
            h,
            hk,
            q_len,
            kv_len,
            k_strides[2],
            v_strides[2],
            scale,
            tensors,
            layouts,
            scalars,
            False,
            TILE,
            STAGES,
            BULK,
            FOLLOW,
        )
    acc, peak, total = _sweep(
        acc,
        peak,
        total,
        q,
        k_ptr,
        v_ptr,
        index_ptr,
        listed,
        easy * SPLIT,
        blocks * SPLIT,
        far,
        near,
        rows,
        b,
        h,
        hk,
        q_len,
        kv_len,
        k_strides[2],
        v_strides[2],
        scale,
        tensors,
        layouts,
        scalars,
        True,
        TILE,
        STAGES,
        BULK,
        FOLLOW,
    )

    if not FOLLOW:
        # NaN and 0 are marked too.
        mark = tl.max(((total >= LEAST) & (total <= MOST)).to(tl.int32) ^ 1, 0)
        tl.store(marks_ptr + head_row.to(tl.int64) * (tl.cdiv(q_len, BLOCK_Q) * PARTS) + part, mark)
    # total is 0 where nothing was visible, and NaN where the input was: that one must show.
    acc = acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    o_tile = o_ptr + bi * o_strides[0] + hi * o_strides[1] + first_row * o_strides[2]
    column = tl.arange(0, DV)[None, :]
    tl.store(
        o_tile + lane[:, None] * o_strides[2] + column,
        acc.to(o_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < VALUE_DIM),
    )
    if LSE:
        tl.store(
            lse_ptr + head_row.to(tl.int64) * q_len + rows, (peak + tl.log2(total)) * 0.6931471805599453, mask=inside
        )


@triton.jit(do_not_specialize=["q_len", "kv_len", "width"])
def attend(
    marks_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    heads,
    group,
    q_len,
    kv_len,
    width,
    scale,
    tensors,
    layouts,
    scalars,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    LSE: tl.constexpr,
    BULK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (rows * BLOCK_Q / ROWS, B * H). scale: softmax scale, times log2(e) unless MODIFIED. strides: (batch, head,
    token).

    marks: int32 [B, H, rows, BLOCK_Q / ROWS], written under FIXED: 1 where the output of these rows is not to be used.
    lse: fp32 [B, H, q_len], natural log. BULK: k_ptr and v_ptr are tensor descriptors of [1, 1, TILE, D or DV] tiles.
    PACKED: heads, padded to 2^n, where they share budgets and lists lie end to end, indices int32 [B, rows, H * width],
    else 0.
    """
    _attend(
        tl.num_programs(0) - 1 - tl.program_id(0),
        tl.program_id(1),  # heavy rows first
        marks_ptr,
        q_ptr,
        k_ptr,
        v_ptr,
        o_ptr,
        lse_ptr,
        indices_ptr,
        counts_ptr,
        q_strides,
        k_strides,
        v_strides,
        o_strides,
        heads,
        group,
        q_len,
        kv_len,
        width,
        scale,
        tensors,
        layouts,
        scalars,
        ROWS,
        TILE,
        STAGES,
        LSE,
        BULK,
        PACKED,
        not FIXED,
    )


@triton.jit(do_not_specialize=["marks", "q_len", "kv_len", "width"])
def attend_marked(
    marks_ptr,
    marks,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    indices_ptr,
    counts_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    heads,
    group,
    q_len,
    kv_len,
    width,
    scale,
    tensors,
    layouts,
    scalars,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    LSE: tl.constexpr,
    BULK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """``attend`` for the parts that are marked, of ``marks`` in all; the others keep what they have.

    Grid (marks / SHARE,): as a rule no part is marked, and a program ends after one look at its share.
    """
    first = tl.program_id(0) * SHARE
    lane = first + tl.arange(0, SHARE)
    if tl.max(tl.load(marks_ptr + lane, mask=lane < marks, other=0), 0) != 0:
        parts = tl.cdiv(q_len, BLOCK_Q) * (BLOCK_Q // ROWS)
        for item in range(first, tl.minimum(first + SHARE, marks)):
            if tl.load(marks_ptr + item) != 0:
                _attend(
                    item % parts,
                    item // parts,
                    marks_ptr,
                    q_ptr,
                    k_ptr,
                    v_ptr,
                    o_ptr,
                    lse_ptr,
                    indices_ptr,
                    counts_ptr,
                    q_strides,
                    k_strides,
                    v_strides,
                    o_strides,
                    heads,
                    group,
                    q_len,
                    kv_len,
                    width,
                    scale,
                    tensors,
                    layouts,
                    scalars,
                    ROWS,
                    TILE,
                    STAGES,
                    LSE,
                    BULK,
                    PACKED,
                    True,
                )
