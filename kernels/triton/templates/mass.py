"""Block scores by pooled mass (``selection/mass.py``) in one pass, from the means of ``means.py``.

A program owns ROWS query groups, a whole number of query blocks, and walks the key groups that they may see. The
softmax of a query group is over all of them, so for every key block it keeps each group's log-sum in a scratch buffer,
and turns these into masses when the row's total is known. Logarithms are to base 2.
"""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
GROUP_Q = tl.constexpr(4)
GROUP_K = tl.constexpr(4)
CAUSAL = tl.constexpr(True)
BANDED = tl.constexpr(False)
MODIFIED = tl.constexpr(False)
SINK = tl.constexpr(False)
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
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(1.1754943508222875e-38)
D = tl.constexpr(max(16, triton.next_power_of_2(HEAD_DIM.value)))
GROUPS_Q = tl.constexpr(BLOCK_Q.value // GROUP_Q.value)
GROUPS_K = tl.constexpr(BLOCK_K.value // GROUP_K.value)


@triton.jit
def _rows(base, row, count, EVEN: tl.constexpr):
    column = tl.arange(0, D)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * HEAD_DIM + column
    if EVEN:
        return tl.load(pointers, mask=(row < count)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(row < count)[:, None] & (column < HEAD_DIM), other=0.0)


@triton.jit
def _counts_for(
    b, h, q, n, present_ptr, q_len, kv_len, before, tensors, layouts, scalars, PADDED: tl.constexpr, PAIRS: tl.constexpr
):
    """Bool [ROWS, COLUMNS]: key groups ``n`` that count for the query groups whose last queries are ``q``.

    PAIRS: 0 where only causal order decides, 1 where a query sees an interval of keys, 2 where every key is looked at.
    """
    counted = (q >= 0)[:, None] & (n * GROUP_K < kv_len)[None, :]
    if CAUSAL:
        counted = counted & ((n * GROUP_K + GROUP_K)[None, :] <= tl.minimum(q + before + 1, kv_len)[:, None])
    if PAIRS == 1:
        first = (n * GROUP_K)[None, :]
        final = (tl.minimum(n * GROUP_K + GROUP_K, kv_len) - 1)[None, :]
        counted = counted & visible(b, h, q[:, None], first, q_len, kv_len, tensors, layouts, scalars)
        counted = counted & visible(b, h, q[:, None], final, q_len, kv_len, tensors, layouts, scalars)
    elif PAIRS == 2:
        for i in tl.static_range(GROUP_K):
            kv = n * GROUP_K + i
            absent = kv >= kv_len
            if PADDED:
                absent = absent | (tl.load(present_ptr + kv, mask=kv < kv_len, other=0) == 0)
            counted = counted & (
                absent[None, :] | visible(b, h, q[:, None], kv[None, :], q_len, kv_len, tensors, layouts, scalars)
            )
    return counted


@triton.jit(
    do_not_specialize=[
        "items",
        "tiles",
        "rows",
        "first_row",
        "columns",
        "q_len",
        "kv_len",
        "visible_stride",
        "count_stride",
    ]
)
def mass(
    q_ptr,
    k_ptr,
    visible_ptr,
    count_ptr,
    last_ptr,
    value_ptr,
    scratch_ptr,
    scores_ptr,
    visible_stride,
    count_stride,
    items,
    tiles,
    heads,
    group,
    rows,
    first_row,
    all_rows,
    columns,
    pitch,
    q_len,
    kv_len,
    scale,
    tensors,
    layouts,
    scalars,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PADDED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Grid (at most items,), items = row tiles of ROWS query groups * B * H. scores: fp32 [B, H, rows, pitch],
    columns of which are written, rows counted from ``first_row``, log mass plus value term.

    q: means [B, H, all_rows * GROUPS_Q, HEAD_DIM]; k: [B, Hk, columns * GROUPS_K, HEAD_DIM]; value: fp32 [B, Hk,
    columns]. visible: uint8 [B or 1, kv_len], count: fp32 [B or 1, key groups], log2 of the keys a group, last: int32
    of its shape, position of the last of them (PADDED). scratch: fp32 [programs, tiles, ROWS, COLUMNS / GROUPS_K].
    """
    BLOCKS: tl.constexpr = COLUMNS // GROUPS_K
    HIGH: tl.constexpr = ROWS // GROUPS_Q
    EVEN: tl.constexpr = HEAD_DIM == D
    row_tiles = tl.cdiv(rows * GROUPS_Q, ROWS)
    before = 0
    if CAUSAL:
        before = offset(q_len, kv_len, tensors, layouts, scalars)
    lane, wide = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    cell = lane[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :]
    scratch_ptr += tl.program_id(0).to(tl.int64) * tiles * (ROWS * BLOCKS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Heavy rows first.
        row_tile, head_row = row_tiles - 1 - item // (items // row_tiles), item % (items // row_tiles)
        b, h = head_row // heads, head_row % heads
        bi, hi = b.to(tl.int64), h.to(tl.int64)
        top = first_row * BLOCK_Q + row_tile * (ROWS * GROUP_Q)
        m = first_row * GROUPS_Q + row_tile * ROWS + lane
        last = tl.minimum((m + 1) * GROUP_Q, q_len) - 1
        last = tl.where(m * GROUP_Q < q_len, last, -1)
        reach = kv_len
        if CAUSAL:
            reach = tl.minimum(tl.maximum(tl.minimum(top + ROWS * GROUP_Q, q_len) + before, 0), kv_len)
        end = tl.cdiv(tl.cdiv(reach, BLOCK_K), BLOCKS)
        begin = 0
        if BANDED:
            bottom = lowest(b, top, q_len, kv_len, tensors, layouts, scalars)
            begin = tl.minimum(tl.maximum(bottom, 0) // (BLOCK_K * BLOCKS), end)
        q = _rows(q_ptr + (bi * heads + hi) * all_rows * (GROUPS_Q * HEAD_DIM), m, all_rows * GROUPS_Q, EVEN)
        keys = k_ptr + (bi * (heads // group) + hi // group) * columns * (GROUPS_K * HEAD_DIM)
        peak = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for tile in tl.range(begin, end, num_stages=STAGES):
            n = tile * COLUMNS + wide
            k = _rows(keys, n, columns * GROUPS_K, EVEN)
            z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if MODIFIED:
                kv = tl.minimum(n * GROUP_K + GROUP_K, kv_len) - 1
                if PADDED:
                    kv = tl.load(last_ptr + bi * count_stride + n, mask=n < columns * GROUPS_K, other=0)
                z = score(z, b, h, last[:, None], kv[None, :], q_len, kv_len, tensors, layouts, scalars) * LOG2E
            if PADDED:
                number = tl.load(count_ptr + bi * count_stride + n, mask=n < columns * GROUPS_K, other=-float("inf"))
                z += number[None, :]
            else:
                number = tl.minimum(tl.maximum(kv_len - n * GROUP_K, 1), GROUP_K)
                z += tl.log2(number.to(tl.float32))[None, :]
            counted = _counts_for(
                b,
                h,
                last,
                n,
                visible_ptr + bi * visible_stride,
                q_len,
                kv_len,
                before,
                tensors,
                layouts,
                scalars,
                PADDED,
                PAIRS,
            )
            z = tl.where(counted, z, -float("inf"))
            higher = tl.maximum(peak, tl.max(z, 1))
            shift = tl.where(higher > -float("inf"), higher, 0.0)
            sums = tl.sum(tl.reshape(tl.exp2(z - shift[:, None]), [ROWS, BLOCKS, GROUPS_K]), 2)
            total = total * tl.exp2(peak - shift) + tl.sum(sums, 1)
            peak = higher
            tl.store(scratch_ptr + tile * (ROWS * BLOCKS) + cell, tl.log2(sums) + shift[:, None])
        if SINK:
            logit = sink(b, h, tensors, layouts, scalars) * LOG2E
            shift = tl.maximum(peak, logit)
            whole = tl.where(total > 0, shift + tl.log2(total * tl.exp2(peak - shift) + tl.exp2(logit - shift)), 0.0)
        else:
            whole = peak + tl.log2(total)
        whole = tl.where(total > 0, whole, float("inf"))
        seeing = tl.sum(tl.reshape((total > 0).to(tl.float32), [HIGH, GROUPS_Q]), 1)
        tl.debug_barrier()
        row = row_tile * HIGH + tl.arange(0, HIGH)
        out = scores_ptr + (head_row.to(tl.int64) * rows + row)[:, None] * pitch
        values = value_ptr + (bi * (heads // group) + hi // group) * columns
        for tile in range(begin, end):
            sums = tl.load(scratch_ptr + tile * (ROWS * BLOCKS) + cell)
            held = tl.exp2(sums - whole[:, None])
            held = tl.sum(tl.reshape(held, [HIGH, GROUPS_Q, BLOCKS]), 1) / tl.maximum(seeing, 1.0)[:, None]
            block = tile * BLOCKS + tl.arange(0, BLOCKS)
            value = tl.load(values + block, mask=block < columns, other=0.0)
            log_mass = tl.log2(tl.maximum(held, LEAST)) * LN2 + value[None, :]
            tl.store(out + block[None, :], log_mass, mask=(row < rows)[:, None] & (block < columns)[None, :])
        tl.debug_barrier()
