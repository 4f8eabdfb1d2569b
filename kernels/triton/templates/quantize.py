"""fp8 copies of queries or keys for block scores: e4m3 with one scale a block, so that a block pair's score is its
cells' peak times two scales."""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(128)
# generated: end
D = tl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit(do_not_specialize=["length", "first_block"])
def quantize(x_ptr, out_ptr, scale_ptr, strides, heads, length, first_block, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Grid (blocks, B * H), blocks counted from ``first_block``. out: e4m3 [B, H, blocks * BLOCK, WIDTH], zeros past
    the end. scale: fp32 [B, H, blocks]."""
    head_row = tl.program_id(1)
    b, h = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    start = (first_block + tl.program_id(0)) * BLOCK
    x_ptr += b * strides[0] + h * strides[1] + start.to(tl.int64) * strides[2]
    token, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + token * strides[2] + column, mask=(start + token < length) & (column < HEAD_DIM), other=0.0).to(
        tl.float32
    )
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), 1.1754943508222875e-38) / LARGEST
    where = head_row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale_ptr + where, scale)
    tl.store(out_ptr + (where * BLOCK + token) * WIDTH + column, (x / scale).to(tl.float8e4nv), mask=column < WIDTH)
