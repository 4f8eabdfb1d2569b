"""Pooled block scores where the mask hides single pairs (``oam.scores_of_pairs``): what a row of blocks does not see
says nothing about its scores.

A cell pairs a group of STRIDE queries with a group of STRIDE keys: the sum over s of q[s] . k[STRIDE - 1 - s] over the
pairs that are visible. Other than in ``cells.py`` the mask is asked for every pair, so the products of the slots are
summed one by one. Beside the pooled product each block pair gets the largest norm of a value whose key counts.
"""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
STRIDE = tl.constexpr(16)
CAUSAL = tl.constexpr(True)
BANDED = tl.constexpr(False)
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


# generated: end
D = tl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
CELLS_Q = tl.constexpr(BLOCK_Q.value // STRIDE.value)
CELLS_K = tl.constexpr(BLOCK_K.value // STRIDE.value)


@triton.jit
def _tokens(base, token, length, stride):
    """[len(token), D] rows ``token``; zero where the token does not exist."""
    column = tl.arange(0, D)
    keep = (token < length)[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(base + token.to(tl.int64)[:, None] * stride + column[None, :], mask=keep, other=0.0)


@triton.jit
def _by_block(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[row blocks, cells, column blocks, cells] of cells [ROWS, COLUMNS]."""
    return tl.reshape(x, [ROWS // CELLS_Q, CELLS_Q, COLUMNS // CELLS_K, CELLS_K])


@triton.jit(do_not_specialize=["rows", "first_row", "columns", "q_len", "kv_len"])
def pool(
    q_ptr,
    k_ptr,
    norms_ptr,
    pooled_ptr,
    largest_ptr,
    q_strides,
    k_strides,
    heads,
    group,
    rows,
    first_row,
    columns,
    q_len,
    kv_len,
    scale,
    tensors,
    layouts,
    scalars,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PEAK: tl.constexpr,
):
    """Grid (row tiles * column tiles, B * H), tiles of ROWS x COLUMNS cells. pooled, largest: fp32 [B, H, rows,
    columns] from ``first_row`` on; tiles beyond the mask's edges are left unwritten. norms: fp32 [B, Hk, kv_len] of the
    values. PEAK: the largest cell of a block pair in place of its mean."""
    column_tiles = tl.cdiv(columns * CELLS_K, COLUMNS)
    row_tile, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    if CAUSAL:
        bottom = tl.minimum(first_row * BLOCK_Q + (row_tile + 1) * ROWS * STRIDE, q_len) - 1
        if column_tile * COLUMNS * STRIDE > bottom + offset(q_len, kv_len, tensors, layouts, scalars):
            return
    if BANDED:
        top = first_row * BLOCK_Q + row_tile * ROWS * STRIDE // BLOCK_Q * BLOCK_Q
        if (column_tile + 1) * COLUMNS * STRIDE <= lowest(
            tl.program_id(1) // heads, top, q_len, kv_len, tensors, layouts, scalars
        ):
            return
    head_row = tl.program_id(1)
    b, h = head_row // heads, head_row % heads
    wide_b, key_head = b.to(tl.int64), (h // group).to(tl.int64)
    q_ptr += wide_b * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += wide_b * k_strides[0] + key_head * k_strides[1]
    norms_ptr += (wide_b * (heads // group) + key_head) * kv_len
    m = first_row * CELLS_Q + row_tile * ROWS + tl.arange(0, ROWS)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    pairs = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    for slot in tl.range(0, STRIDE):
        q_token, k_token = m * STRIDE + slot, n * STRIDE + STRIDE - 1 - slot
        q = _tokens(q_ptr, q_token, q_len, q_strides[2])
        k = _tokens(k_ptr, k_token, kv_len, k_strides[2])
        product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        shown = visible(b, h, q_token[:, None], k_token[None, :], q_len, kv_len, tensors, layouts, scalars)
        shown = shown & (q_token < q_len)[:, None] & (k_token < kv_len)[None, :]
        # Not by a factor of 0: what is hidden may be NaN.
        total += tl.where(shown, product, 0.0)
        pairs += shown.to(tl.float32)
        norm = tl.load(norms_ptr + k_token, mask=k_token < kv_len, other=0.0)
        largest = tl.maximum(largest, tl.where(shown, norm[None, :], 0.0))
    if PEAK:
        cells = tl.where(pairs > 0, total / tl.maximum(pairs, 1.0), -float("inf"))
        best = tl.max(tl.max(_by_block(cells, ROWS, COLUMNS), 3), 1)
        best = tl.where(best > -float("inf"), best, 0.0)
    else:
        held = tl.sum(tl.sum(_by_block(pairs, ROWS, COLUMNS), 3), 1)
        best = tl.sum(tl.sum(_by_block(total, ROWS, COLUMNS), 3), 1) / tl.maximum(held, 1.0)
    row = row_tile * (ROWS // CELLS_Q) + tl.arange(0, ROWS // CELLS_Q)
    block = column_tile * (COLUMNS // CELLS_K) + tl.arange(0, COLUMNS // CELLS_K)
    where = (head_row.to(tl.int64) * rows + row)[:, None] * columns + block[None, :]
    inside = (row < rows)[:, None] & (block < columns)[None, :]
    tl.store(pooled_ptr + where, best * scale, mask=inside)
    tl.store(largest_ptr + where, tl.max(tl.max(_by_block(largest, ROWS, COLUMNS), 3), 1), mask=inside)
