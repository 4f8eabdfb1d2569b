"""One pass over Q, K and V that leaves what block scores need (``oam.py``): group sums, presence counts, value norms.

Tokens of a block are grouped by STRIDE; slot s of a summary holds the mean over the block's groups of their token s.
Keys are stored in reverse (slot s holds token STRIDE - 1 - s), so that the anti-diagonal mean of a block pair is the
plain dot product of two summaries. Absent tokens (past the end, hidden by padding) count as zero. 16-bit inputs leave
fp16 summaries: means cannot overflow where the inputs did not come near 65504 (they are clamped there), and rounding to
11 bits costs 2^-12 of a summand where bf16 would cost 2^-9.
"""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(64)
VALUE_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
STRIDE = tl.constexpr(16)
# generated: end
D = tl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
DV = tl.constexpr(triton.next_power_of_2(VALUE_DIM.value))


@triton.jit
def _store_summary(out_ptr, where, slot, values):
    column = tl.arange(0, D)[None, :]
    if out_ptr.dtype.element_ty == tl.float16:
        values = tl.clamp(values, -65504.0, 65504.0)
    out = out_ptr + where * (STRIDE * HEAD_DIM) + slot[:, None] * HEAD_DIM + column
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit(do_not_specialize=["q_len", "first_row"])
def queries(q_ptr, out_ptr, strides, heads, q_len, first_row):
    """Grid (rows, B * H), rows counted from ``first_row``. out: [B, H, rows, STRIDE * HEAD_DIM]."""
    head_row = tl.program_id(1)
    b, h = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    start = (first_row + tl.program_id(0)) * BLOCK_Q
    q_ptr += b * strides[0] + h * strides[1] + start.to(tl.int64) * strides[2]
    slot = tl.arange(0, STRIDE)
    column = tl.arange(0, D)[None, :]
    total = tl.zeros([STRIDE, D], tl.float32)
    for group in tl.static_range(BLOCK_Q // STRIDE):
        token = group * STRIDE + slot
        keep = (start + token < q_len)[:, None] & (column < HEAD_DIM)
        total += tl.load(q_ptr + token[:, None] * strides[2] + column, mask=keep, other=0.0).to(tl.float32)
    _store_summary(
        out_ptr, head_row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), slot, total / (BLOCK_Q // STRIDE)
    )


@triton.jit(do_not_specialize=["kv_len", "visible_stride"])
def keys(
    k_ptr,
    v_ptr,
    visible_ptr,
    out_ptr,
    count_ptr,
    value_ptr,
    k_strides,
    v_strides,
    visible_stride,
    heads,
    kv_len,
    beta,
    PADDED: tl.constexpr,
    RAW: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Grid (key blocks, B * Hk). out: [B, Hk, blocks, STRIDE * HEAD_DIM] (SUMS). count: fp16 [B, blocks, STRIDE],
    groups that hold each slot.

    value: fp32 [B, Hk, blocks]: beta * max(0, log max ||v||), or max ||v|| itself (RAW). visible: uint8 [B or 1,
    kv_len] (PADDED).
    """
    head_row = tl.program_id(1)
    b, h = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    block = tl.program_id(0)
    start = block * BLOCK_K
    k_ptr += b * k_strides[0] + h * k_strides[1] + start.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + h * v_strides[1] + start.to(tl.int64) * v_strides[2]
    slot = tl.arange(0, STRIDE)
    column, value_column = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    total = tl.zeros([STRIDE, D], tl.float32)
    count = tl.zeros([STRIDE], tl.float32)
    peak = tl.zeros([STRIDE], tl.float32)
    for group in tl.static_range(BLOCK_K // STRIDE):
        token = group * STRIDE + slot
        present = start + token < kv_len
        if PADDED:
            present = present & (tl.load(visible_ptr + b * visible_stride + start + token, mask=present, other=0) != 0)
        if SUMS:
            keep = present[:, None] & (column < HEAD_DIM)
            total += tl.load(k_ptr + token[:, None] * k_strides[2] + column, mask=keep, other=0.0).to(tl.float32)
        count += present.to(tl.float32)
        keep = present[:, None] & (value_column < VALUE_DIM)
        v = tl.load(v_ptr + token[:, None] * v_strides[2] + value_column, mask=keep, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.sum(v * v, 1))
    where = head_row.to(tl.int64) * tl.num_programs(0) + block
    norm = tl.sqrt(tl.max(peak, 0))
    if not RAW:
        norm = beta * tl.maximum(tl.log(tl.maximum(norm, 1.1754943508222875e-38)), 0.0)
    tl.store(value_ptr + where, norm)
    if SUMS:
        _store_summary(out_ptr, where, (slot * -1) + (STRIDE - 1), total / (BLOCK_K // STRIDE))
        if h == 0:
            tl.store(count_ptr + (b * tl.num_programs(0) + block) * STRIDE + STRIDE - 1 - slot, count.to(tl.float16))
