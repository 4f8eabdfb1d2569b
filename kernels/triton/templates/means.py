"""Means of groups of adjacent queries and of adjacent keys (``mass.py``), and the values' norms: one pass over Q, K, V.

A mean is over the tokens that exist and that padding leaves. 16-bit inputs leave fp16 means, clamped to what fp16
holds: 11 bits, where bfloat16 would round a score eight times as coarsely. For ``mass_hopper.py``, which averages
queries itself, the means of keys are centred on those of the first group, and ordered as its tiles want them.
"""

import triton
import triton.language as tl

# generated: begin
HEAD_DIM = tl.constexpr(64)
VALUE_DIM = tl.constexpr(64)
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
GROUP_Q = tl.constexpr(4)
GROUP_K = tl.constexpr(4)
# generated: end
D = tl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
DV = tl.constexpr(triton.next_power_of_2(VALUE_DIM.value))


@triton.jit
def _store_mean(total, count, out_ptr, first, GROUPS: tl.constexpr):
    """total [GROUPS, D] over count [GROUPS], to rows ``first``... of out."""
    mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    _store(mean, out_ptr, first + tl.arange(0, GROUPS))


@triton.jit
def _store(mean, out_ptr, row):
    if out_ptr.dtype.element_ty == tl.float16:
        mean = tl.clamp(mean, -65504.0, 65504.0)
    elif out_ptr.dtype.element_ty == tl.float8e4nv:
        mean = tl.clamp(mean, -448.0, 448.0)
    column = tl.arange(0, D)[None, :]
    place = row.to(tl.int64)[:, None] * HEAD_DIM + column
    tl.store(out_ptr + place, mean.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


@triton.jit
def _early_mean(k_ptr, step, kv_len, GROUP: tl.constexpr):
    """Mean [1, D] of the tokens that exist of key group GROUP, the first or second; 0 where there are none."""
    token, column = GROUP * GROUP_K + tl.arange(0, GROUP_K), tl.arange(0, D)[None, :]
    keep = (token < kv_len)[:, None] & (column < HEAD_DIM)
    k = tl.load(k_ptr + token.to(tl.int64)[:, None] * step + column, mask=keep, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(kv_len - GROUP * GROUP_K, 1), GROUP_K)
    return (tl.sum(k, 0) / count.to(tl.float32))[None, :]


@triton.jit
def _store_tiled(mean, count, unit, out_ptr, norm_ptr, first, GROUPS: tl.constexpr):
    """Means of key groups ``first``... over ``unit``, in the order of ``mass_hopper.py``'s tiles of 128, and their
    largest norm."""
    norm = tl.where(count > 0, tl.sum(mean * mean, 1), 0.0)
    tl.store(norm_ptr, tl.sqrt(tl.max(norm, 0)))
    group = first + tl.arange(0, GROUPS)
    place, pair = group % 128 // 32, group % 32
    _store(mean / unit, out_ptr, group // 128 * 128 + pair // 2 * 8 + place * 2 + pair % 2)


@triton.jit(do_not_specialize=["q_len", "kv_len", "visible_stride", "rows", "columns", "k_groups"])
def means(
    q_ptr,
    k_ptr,
    v_ptr,
    visible_ptr,
    q_out_ptr,
    k_out_ptr,
    count_ptr,
    value_ptr,
    norm_ptr,
    unit_ptr,
    q_strides,
    k_strides,
    v_strides,
    visible_stride,
    heads,
    key_heads,
    rows,
    columns,
    q_len,
    kv_len,
    beta,
    k_groups,
    k_factor,
    PADDED: tl.constexpr,
    RAW: tl.constexpr,
    TILED: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Grid (max(rows, columns), B * (H + Hk)): query blocks first, then key blocks; heads = 0 leaves out the former.

    q_out: [B, H, rows * BLOCK_Q / GROUP_Q, HEAD_DIM]; k_out: [B, Hk, k_groups, HEAD_DIM]. visible: uint8 [B or 1,
    kv_len], count: fp32 [B, columns * BLOCK_K / GROUP_K], log2 of the keys a group (PADDED). value: fp32 [B, Hk,
    columns]: beta * max(0, log max ||v||), or max ||v|| itself (RAW). TILED: k_out in the order of tiles, norm: fp32
    [B, Hk, columns], the largest of each block's means; k_factor times them; CENTRED: less the first group's mean.
    Where k_out is e4m3 it is over unit, fp32 [B, Hk], which belongs to the queries' means.
    """
    block = tl.program_id(0)
    both = heads + key_heads
    b, head = (tl.program_id(1) // both).to(tl.int64), tl.program_id(1) % both
    column, value_column = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    if head < heads:
        if block < rows:
            groups: tl.constexpr = BLOCK_Q // GROUP_Q
            q_ptr += b * q_strides[0] + head.to(tl.int64) * q_strides[1]
            total = tl.zeros([groups, D], tl.float32)
            first = block * BLOCK_Q + tl.arange(0, groups) * GROUP_Q
            for i in tl.static_range(GROUP_Q):
                keep = (first + i < q_len)[:, None] & (column < HEAD_DIM)
                token = (first + i).to(tl.int64)[:, None] * q_strides[2]
                total += tl.load(q_ptr + token + column, mask=keep, other=0.0).to(tl.float32)
            count = tl.minimum(tl.maximum(q_len - first, 0), GROUP_Q)
            out = q_out_ptr + (b * heads + head) * (rows * groups).to(tl.int64) * HEAD_DIM
            _store_mean(total, count, out, block * groups, groups)
    else:
        if block < columns:
            h = (head - heads).to(tl.int64)
            key_groups: tl.constexpr = BLOCK_K // GROUP_K
            k_ptr += b * k_strides[0] + h * k_strides[1]
            v_ptr += b * v_strides[0] + h * v_strides[1]
            total = tl.zeros([key_groups, D], tl.float32)
            count = tl.zeros([key_groups], tl.int32)
            peak = tl.zeros([key_groups], tl.float32)
            first = block * BLOCK_K + tl.arange(0, key_groups) * GROUP_K
            for i in tl.static_range(GROUP_K):
                token = first + i
                present = token < kv_len
                if PADDED:
                    present = present & (tl.load(visible_ptr + b * visible_stride + token, mask=present, other=0) != 0)
                count += present.to(tl.int32)
                place = token.to(tl.int64)[:, None]
                keep = present[:, None] & (column < HEAD_DIM)
                total += tl.load(k_ptr + place * k_strides[2] + column, mask=keep, other=0.0).to(tl.float32)
                keep = present[:, None] & (value_column < VALUE_DIM)
                v = tl.load(v_ptr + place * v_strides[2] + value_column, mask=keep, other=0.0).to(tl.float32)
                peak = tl.maximum(peak, tl.sum(v * v, 1))
            out = k_out_ptr + (b * key_heads + h) * k_groups.to(tl.int64) * HEAD_DIM
            if TILED:
                mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
                second = _early_mean(k_ptr, k_strides[2], kv_len, 1)
                if CENTRED:
                    first_mean = _early_mean(k_ptr, k_strides[2], kv_len, 0)
                    mean -= first_mean
                    second -= first_mean
                mean *= k_factor
                unit = 1.0
                if out.dtype.element_ty == tl.float8e4nv:
                    # A power of 2 that brings means to where e4m3 is most exact, of early tokens alone.
                    size = tl.sqrt(tl.sum(tl.sum(second * second, 1), 0)) * k_factor
                    unit = tl.exp2(tl.floor(tl.log2(tl.clamp(size, 1e-6, 1e6)))) / 32.0
                    tl.store(unit_ptr + b * key_heads + h, unit)
                norms = norm_ptr + (b * key_heads + h) * columns + block
                _store_tiled(mean, count, unit, out, norms, block * key_groups, key_groups)
            else:
                _store_mean(total, count, out, block * key_groups, key_groups)
            if PADDED:  # noqa: SIM102 (decided when it is compiled)
                if h == 0:
                    number = tl.where(count > 0, tl.log2(tl.maximum(count, 1).to(tl.float32)), -float("inf"))
                    group = block * key_groups + tl.arange(0, key_groups)
                    tl.store(count_ptr + b * (columns * key_groups) + group, number)
            norm = tl.sqrt(tl.max(peak, 0))
            if not RAW:
                norm = beta * tl.maximum(tl.log(tl.maximum(norm, 1.1754943508222875e-38)), 0.0)
            tl.store(value_ptr + (b * key_heads + h) * columns + block, norm)
