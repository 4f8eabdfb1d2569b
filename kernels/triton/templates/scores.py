"""Block scores under mean pooling: the product of the query and key summaries of ``summaries.py`` plus the value term
(``oam.py``).

Summaries hold means over a block's groups; the score wants the mean over the token pairs that exist, so the product is
rescaled by (groups of a query block * groups of a key block) / pairs. Tiles beyond the mask's edges are left unwritten:
``select.py`` never reads them.
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
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


@triton.jit
def lowest(b, q, q_len, kv_len, tensors, layouts, scalars):
    return 0


# generated: end
SLOTS = tl.constexpr(max(16, STRIDE.value))  # a matrix product's inner size is at least 16


@triton.jit
def _summaries(pointers, keep, inner, WIDTH: tl.constexpr, STEP: tl.constexpr):
    if WIDTH % STEP == 0:
        return tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=keep[:, None] & (inner < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=["rows", "first_row", "columns", "q_len", "kv_len"])
def mean(
    q_ptr,
    k_ptr,
    count_ptr,
    value_ptr,
    scores_ptr,
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
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (row tiles * column tiles, B * H). scores: fp32 [B, H, rows, columns], rows counted from ``first_row``."""
    WIDTH: tl.constexpr = STRIDE * HEAD_DIM
    tiles = tl.cdiv(columns, COLUMNS)
    m = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    if CAUSAL:
        bottom = tl.minimum((first_row + (tl.program_id(0) // tiles + 1) * ROWS) * BLOCK_Q, q_len) - 1
        bottom += offset(q_len, kv_len, tensors, layouts, scalars)
        if (tl.program_id(0) % tiles) * COLUMNS * BLOCK_K > bottom:
            return
    if BANDED:
        top = (first_row + tl.program_id(0) // tiles * ROWS) * BLOCK_Q
        if (tl.program_id(0) % tiles + 1) * COLUMNS * BLOCK_K <= lowest(
            tl.program_id(1) // heads, top, q_len, kv_len, tensors, layouts, scalars
        ):
            return
    head_row = tl.program_id(1)
    b, h = head_row // heads, head_row % heads
    key_row = (b * (heads // group) + h // group).to(tl.int64) * columns
    inner = tl.arange(0, STEP)
    q_tile = q_ptr + (head_row.to(tl.int64) * rows + m)[:, None] * WIDTH + inner[None, :]
    k_tile = k_ptr + (key_row + n)[:, None] * WIDTH + inner[None, :]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.range(0, tl.cdiv(WIDTH, STEP), num_stages=STAGES):
        q = _summaries(q_tile + i * STEP, m < rows, i * STEP + inner, WIDTH, STEP)
        k = _summaries(k_tile + i * STEP, n < columns, i * STEP + inner, WIDTH, STEP)
        product = tl.dot(q, tl.trans(k), product, input_precision=PRECISION)
    slot = tl.arange(0, SLOTS)
    # Groups that hold slot s of a query block: all of them except at the ragged end.
    left = q_len - (first_row + m[:, None]) * BLOCK_Q - slot[None, :]
    held = tl.minimum(tl.maximum((left + STRIDE - 1) // STRIDE, 0), BLOCK_Q // STRIDE)
    held = tl.where((slot[None, :] < STRIDE) & (left > 0), held, 0).to(tl.float16)
    key_held = count_ptr + (b.to(tl.int64) * columns + n)[:, None] * STRIDE + slot[None, :]
    key_held = tl.load(key_held, mask=(n < columns)[:, None] & (slot[None, :] < STRIDE), other=0.0)
    pairs = tl.dot(held, tl.trans(key_held))
    value = tl.load(value_ptr + key_row + n, mask=n < columns, other=0.0)
    scores = product * (scale * (BLOCK_Q // STRIDE) * (BLOCK_K // STRIDE) / tl.maximum(pairs, 1.0)) + value[None, :]
    out = scores_ptr + (head_row.to(tl.int64) * rows + m)[:, None] * columns + n[None, :]
    tl.store(out, scores, mask=(m < rows)[:, None] & (n < columns)[None, :])
