"""Block scores under max pooling: the largest anti-diagonal cell of each block pair (``oam.py``), cells never stored.

A cell pairs a group of STRIDE queries with a group of STRIDE keys: the sum over s of q[s] . k[STRIDE - 1 - s], so all
cells together are one matrix product [q_len / STRIDE, STRIDE * d] by its counterpart. The epilogue keeps one number a
block pair. Absent tokens do not count: a cell is the mean over its token pairs that exist. Tiles beyond the mask's
edges are left unwritten: ``select.py`` never reads them.
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
SLOTS = tl.constexpr(max(16, STRIDE.value))
CELLS_Q = tl.constexpr(BLOCK_Q.value // STRIDE.value)
CELLS_K = tl.constexpr(BLOCK_K.value // STRIDE.value)


@triton.jit
def _tokens(base, token, present, stride, column, EVEN: tl.constexpr):
    """Rows ``token`` of ``column`` elements each; zero where the token or the element does not exist."""
    pointers = base + token.to(tl.int64)[:, None] * stride + column[None, :]
    keep = present[:, None]
    if not EVEN:
        keep = keep & (column < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=keep, other=0.0)


@triton.jit(do_not_specialize=["rows", "first_row", "columns", "q_len", "kv_len", "visible_stride"])
def peak(
    q_ptr,
    k_ptr,
    visible_ptr,
    value_ptr,
    scores_ptr,
    q_strides,
    k_strides,
    visible_stride,
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
    PADDED: tl.constexpr,
    BULK: tl.constexpr,
    BAND: tl.constexpr,
):
    """Grid (row tiles * column tiles, B * H), tiles of ROWS x COLUMNS cells. scores: fp32 [B, H, rows, columns] from
    ``first_row`` on.

    visible: uint8 [B or 1, kv_len] under PADDED. BULK: q_ptr and k_ptr are descriptors of [B, H, groups, STRIDE, d]
    with [1, 1, ROWS or COLUMNS, 1, STEP] tiles; every group is whole and visible. BAND: row tiles that share the column
    tiles they read while these are in the cache.
    """
    tiles = tl.cdiv(columns * CELLS_K, COLUMNS)
    row_tiles = tl.cdiv(rows * CELLS_Q, ROWS)
    band = tl.program_id(0) // (BAND * tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    inside = tl.program_id(0) - band * (BAND * tiles)
    row_tile, column_tile = band * BAND + inside % height, inside // height
    if CAUSAL:
        bottom = (
            tl.minimum(first_row * BLOCK_Q + (row_tile + 1) * ROWS * STRIDE, q_len)
            - 1
            + offset(q_len, kv_len, tensors, layouts, scalars)
        )
        if column_tile * COLUMNS * STRIDE > bottom:
            return
    if BANDED:
        top = first_row * BLOCK_Q + row_tile * ROWS * STRIDE // BLOCK_Q * BLOCK_Q
        if (column_tile + 1) * COLUMNS * STRIDE <= lowest(
            tl.program_id(1) // heads, top, q_len, kv_len, tensors, layouts, scalars
        ):
            return
    head_row = tl.program_id(1)
    b, h = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    if not BULK:
        q_ptr += b * q_strides[0] + h * q_strides[1]
        k_ptr += b * k_strides[0] + (h // group) * k_strides[1]
    first_m, first_n = first_row * CELLS_Q + row_tile * ROWS, column_tile * COLUMNS
    m = first_row * CELLS_Q + row_tile * ROWS + tl.arange(0, ROWS)
    n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    CHUNKS: tl.constexpr = (HEAD_DIM + STEP - 1) // STEP
    EVEN: tl.constexpr = HEAD_DIM % STEP == 0
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.range(0, STRIDE * CHUNKS, num_stages=STAGES):
        slot = i // CHUNKS
        chunk = (i - slot * CHUNKS) * STEP
        if BULK:
            q = q_ptr.load([head_row // heads, head_row % heads, first_m, slot, chunk]).reshape([ROWS, STEP])
            k = k_ptr.load([head_row // heads, head_row % heads // group, first_n, STRIDE - 1 - slot, chunk]).reshape(
                [COLUMNS, STEP]
            )
        else:
            column = tl.arange(0, STEP) + chunk
            q_token, k_token = m * STRIDE + slot, n * STRIDE + STRIDE - 1 - slot
            q = _tokens(q_ptr, q_token, q_token < q_len, q_strides[2], column, EVEN)
            present = k_token < kv_len
            if PADDED:
                present = present & (tl.load(visible_ptr + b * visible_stride + k_token, mask=present, other=0) != 0)
            k = _tokens(k_ptr, k_token, present, k_strides[2], column, EVEN)
        product = tl.dot(q, tl.trans(k), product, input_precision=PRECISION)
    if PADDED:
        slot = tl.arange(0, SLOTS)
        q_here = ((m[:, None] * STRIDE + slot[None, :] < q_len) & (slot[None, :] < STRIDE)).to(tl.float16)
        token = n[:, None] * STRIDE + (STRIDE - 1) - slot[None, :]
        k_here = tl.load(
            visible_ptr + b * visible_stride + token, mask=(token < kv_len) & (slot[None, :] < STRIDE), other=0
        )
        pairs = tl.dot(q_here, tl.trans(k_here.to(tl.float16)))
    else:
        # Groups are cut only at the end: q's holds its first tokens, k's reversed its last slots.
        q_here = tl.minimum(tl.maximum(q_len - m * STRIDE, 0), STRIDE)
        k_here = tl.minimum(tl.maximum(kv_len - n * STRIDE, 0), STRIDE)
        pairs = tl.maximum(q_here[:, None] + k_here[None, :] - STRIDE, 0).to(tl.float32)
    cells = tl.where(pairs > 0, product / tl.maximum(pairs, 1.0), -float("inf"))
    best = tl.max(tl.reshape(cells, [ROWS, COLUMNS // CELLS_K, CELLS_K]), 2)
    best = tl.max(tl.reshape(best, [ROWS // CELLS_Q, CELLS_Q, COLUMNS // CELLS_K]), 1)
    best = tl.where(best > -float("inf"), best, 0.0)
    row = row_tile * (ROWS // CELLS_Q) + tl.arange(0, ROWS // CELLS_Q)
    block = column_tile * (COLUMNS // CELLS_K) + tl.arange(0, COLUMNS // CELLS_K)
    key_row = (b * (heads // group) + h // group) * columns
    value = tl.load(value_ptr + key_row + block, mask=block < columns, other=0.0)
    out = scores_ptr + (head_row.to(tl.int64) * rows + row)[:, None] * columns + block[None, :]
    tl.store(out, best * scale + value[None, :], mask=(row < rows)[:, None] & (block < columns)[None, :])
