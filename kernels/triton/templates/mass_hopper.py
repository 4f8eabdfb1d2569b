"""Block scores by pooled mass for Hopper in Gluon: ``mass.py`` with warps in roles, where means come by TMA.

A persistent program owns 256 query groups of one head. A producer warp fetches their means and walks the key groups in
tiles that both consumer warpgroups share. A consumer owns two halves of 64 query groups: the product of one runs while
the softmax of the other turns scores into sums, one a query group and key block, which go to a scratch buffer with the
peak that they are relative to. When the totals are known they become masses, while the other consumer keeps the tensor
cores busy. Exponentials bind as much as products do (one for every 256 floating-point operations at head dim 128): of
each four columns of registers, POLYNOMIAL are computed by a polynomial in place of the special function unit.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# generated: begin
HEAD_DIM = gl.constexpr(128)
BLOCK_Q = gl.constexpr(128)
BLOCK_K = gl.constexpr(128)
GROUP_Q = gl.constexpr(4)
GROUP_K = gl.constexpr(4)
CAUSAL = gl.constexpr(True)
SINK = gl.constexpr(False)


@gluon.jit
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


@gluon.jit
def sink(b, h, tensors, layouts, scalars):
    return 0.0


# generated: end
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LEAST = gl.constexpr(1.1754943508222875e-38)
D = gl.constexpr(max(16, triton.next_power_of_2(HEAD_DIM.value)))
GROUPS_Q = gl.constexpr(BLOCK_Q.value // GROUP_Q.value)
GROUPS_K = gl.constexpr(BLOCK_K.value // GROUP_K.value)
ROWS = gl.constexpr(64)  # query groups a half: one wgmma tile
HALVES = gl.constexpr(4)  # of 64 query groups, two a consumer
HIGH = gl.constexpr(ROWS.value // GROUPS_Q.value)  # query blocks a half
MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, left in the low bits
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after triton 3.6


@gluon.jit
def _item(item, items, row_tiles, heads, first_row, q_len, kv_len, before, COLUMNS: gl.constexpr):
    """(batch row, head, first query group of the row tile counted from the chunk's, key tiles) of work item
    ``item``."""
    head_rows = items // row_tiles
    row_tile = row_tiles - 1 - item // head_rows  # heavy rows first
    group = row_tile * (ROWS * HALVES)
    reach = kv_len
    if CAUSAL:
        end = first_row * BLOCK_Q + (group + ROWS * HALVES) * GROUP_Q
        reach = gl.minimum(gl.maximum(gl.minimum(end, q_len) + before, 0), kv_len)
    head_row = item % head_rows
    return head_row // heads, head_row % heads, group, gl.cdiv(gl.cdiv(reach, BLOCK_K), COLUMNS // GROUPS_K)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    rings,
    items,
    row_tiles,
    heads,
    group,
    first_row,
    q_len,
    kv_len,
    before,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_ring, k_ring, q_ready, q_free, k_ready, k_free = rings[:6]
    stage, phase, turn = 0, 1, 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, first, tiles = _item(item, items, row_tiles, heads, first_row, q_len, kv_len, before, COLUMNS)
        for half in gl.static_range(HALVES):
            if half % 2 == 0:
                mbarrier.wait(q_free.index(half // 2), turn)
                mbarrier.expect(q_ready.index(half // 2), q_desc.block_type.nbytes * 2)
            group_q = first_row * GROUPS_Q + first + half * ROWS
            load_tile(q_desc, [b, h, group_q, 0], q_ready.index(half // 2), q_ring.index(half))
        turn ^= 1
        for tile in range(tiles):
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [b, h // group, tile * COLUMNS, 0], k_ready.index(stage), k_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _power(x):
    """2^x for x of at most 0, by a polynomial: relative error below 2e-4."""
    x = gl.maximum(x, -126.0)
    rounded = x + MAGIC
    x = x - (rounded - MAGIC)
    value = 0.05550411 * x + 0.24022651
    value = value * x + 0.69314718
    value = value * x + 1.0
    bits = value.to(gl.int32, bitcast=True) + (rounded.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _sums(x, POLYNOMIAL: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums of 2^x over each key block: [ROWS, COLUMNS / GROUPS_K]."""
    if POLYNOMIAL == 0:
        power = gl.exp2(x)
    else:
        # Halves and quarters of a thread's own columns: no value changes its register.
        left, right = x.reshape([ROWS, 2, COLUMNS // 2]).permute((0, 2, 1)).split()
        if POLYNOMIAL == 1:
            third, fourth = right.reshape([ROWS, 2, COLUMNS // 4]).permute((0, 2, 1)).split()
            right = gl.join(gl.exp2(third), _power(fourth)).permute((0, 2, 1)).reshape([ROWS, COLUMNS // 2])
            right = gl.convert_layout(right, left.type.layout)
        else:
            right = _power(right)
        power = gl.join(gl.exp2(left), right).permute((0, 2, 1)).reshape([ROWS, COLUMNS])
    return gl.sum(power.reshape([ROWS, COLUMNS // GROUPS_K, GROUPS_K]), 2)


@gluon.jit
def _hidden(z, tile, first, q_len, kv_len, before, factor, COLUMNS: gl.constexpr):
    """Scores of a tile with groups that do not count at -inf; without causal order those cut by the end count as what
    they hold."""
    n = tile * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, z.type.layout))
    m = first + gl.arange(0, ROWS, gl.SliceLayout(1, z.type.layout))
    if CAUSAL:
        limit = gl.minimum(gl.minimum((m + 1) * GROUP_Q, q_len) + before, kv_len)
        limit = gl.where(m * GROUP_Q < q_len, limit, 0)
        return gl.where((n * GROUP_K + GROUP_K)[None, :] <= limit[:, None], z, -float("inf"))
    else:
        number = gl.minimum(gl.maximum(kv_len - n * GROUP_K, 1), GROUP_K).to(gl.float32)
        seen = (n * GROUP_K < kv_len)[None, :] & (m * GROUP_Q < q_len)[:, None]
        return gl.where(seen, z + (gl.log2(number * (1.0 / GROUP_K)) / factor)[None, :], -float("inf"))


@gluon.jit
def _absorb(
    z,
    peak,
    total,
    tile,
    cut,
    first,
    sums_ptr,
    peaks_ptr,
    q_len,
    kv_len,
    before,
    factor,
    POLYNOMIAL: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """(peak, total) of 64 query groups with a tile's scores; its sums and the peak they are relative to are stored."""
    BLOCKS: gl.constexpr = COLUMNS // GROUPS_K
    if tile >= cut:
        z = _hidden(z, tile, first, q_len, kv_len, before, factor, COLUMNS)
    higher = gl.maximum(peak, gl.max(z, 1) * factor)
    shift = gl.where(higher > -float("inf"), higher, 0.0)
    sums = _sums(z * factor - shift[:, None], POLYNOMIAL, COLUMNS)
    total = total * gl.exp2(peak - shift) + gl.convert_layout(gl.sum(sums, 1), total.type.layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, sums.type.layout))[:, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, sums.type.layout))[None, :]
    # Rows side by side: eight lanes fill a sector.
    gl.store(sums_ptr + tile * (ROWS * BLOCKS) + block * ROWS + row, sums)
    gl.store(peaks_ptr + tile * ROWS + gl.arange(0, ROWS, shift.type.layout), shift)
    return higher, total


@gluon.jit
def _finish(
    peak,
    total,
    sums_ptr,
    peaks_ptr,
    value_ptr,
    scores_ptr,
    b,
    h,
    begin,
    tiles,
    heads,
    group,
    rows,
    columns,
    terms,
    COLUMNS: gl.constexpr,
):
    """Scores of the query blocks of 64 query groups, from their stored sums."""
    BLOCKS: gl.constexpr = COLUMNS // GROUPS_K
    # A thread reads all rows of a key block.
    read_layout: gl.constexpr = gl.BlockedLayout([ROWS, 1], [1, 32], [1, 4], [0, 1])
    row_layout: gl.constexpr = gl.SliceLayout(1, read_layout)
    if SINK:
        logit = sink(b, h, terms[0], terms[1], terms[2]) * LOG2E
        shift = gl.maximum(peak, logit)
        whole = gl.where(total > 0, shift + gl.log2(total * gl.exp2(peak - shift) + gl.exp2(logit - shift)), 0.0)
    else:
        whole = peak + gl.log2(total)
    # Changing the layout meets a barrier: what follows reads what other threads wrote.
    whole = gl.convert_layout(gl.where(total > 0, whole, float("inf")), row_layout)
    seeing = gl.sum(gl.where(whole < float("inf"), 1.0, 0.0).reshape([HIGH, GROUPS_Q]), 1)
    row = gl.arange(0, ROWS, row_layout)[:, None]
    out_ptr = scores_ptr + (b * heads + h).to(gl.int64) * rows * columns
    values = value_ptr + (b * (heads // group) + h // group) * columns
    for part in range(gl.cdiv(tiles * BLOCKS, 128)):
        column = part * 128 + gl.arange(0, 128, gl.SliceLayout(0, read_layout))
        there = (column < tiles * BLOCKS)[None, :]
        sums = gl.load(sums_ptr + (column * ROWS)[None, :] + row, mask=there, other=0.0)
        shift = gl.load(peaks_ptr + (column // BLOCKS * ROWS)[None, :] + row, mask=there, other=-float("inf"))
        parts = gl.sum((sums * gl.exp2(shift - whole[:, None])).reshape([HIGH, GROUPS_Q, 128]), 1)
        mass = parts / gl.maximum(gl.convert_layout(seeing, gl.SliceLayout(1, parts.type.layout)), 1.0)[:, None]
        block = part * 128 + gl.arange(0, 128, gl.SliceLayout(0, parts.type.layout))
        value = gl.load(values + block, mask=block < columns, other=0.0)
        score = gl.log2(gl.maximum(mass, LEAST)) * LN2 + value[None, :]
        line = begin // GROUPS_Q + gl.arange(0, HIGH, gl.SliceLayout(1, parts.type.layout))
        inside = (line < rows)[:, None] & ((block < columns) & (block < tiles * BLOCKS))[None, :]
        gl.store(out_ptr + line.to(gl.int64)[:, None] * columns + block[None, :], score, mask=inside)


@gluon.jit
def _first_cut(first, q_len, kv_len, before, COLUMNS: gl.constexpr):
    """Tiles from here on hold key groups that do not count for all of the 64 query groups from ``first`` on."""
    cut = kv_len // (COLUMNS * GROUP_K)
    if CAUSAL:
        cut = gl.minimum(cut, gl.maximum((first + 1) * GROUP_Q + before, 0) // (COLUMNS * GROUP_K))
    return gl.where((first + ROWS) * GROUP_Q > q_len, 0, cut)


@gluon.jit
def _consume(
    consumer,
    rings,
    value_ptr,
    sums_ptr,
    peaks_ptr,
    scores_ptr,
    items,
    row_tiles,
    tiles_most,
    heads,
    group,
    rows,
    first_row,
    columns,
    q_len,
    kv_len,
    before,
    factor,
    terms,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
):
    BLOCKS: gl.constexpr = COLUMNS // GROUPS_K
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    q_ring, k_ring, q_ready, q_free, k_ready, k_free, apart = rings
    place = (gl.program_id(0) * HALVES + consumer * 2).to(gl.int64) * tiles_most
    near_sums, near_peaks = sums_ptr + place * (ROWS * BLOCKS), peaks_ptr + place * ROWS
    far_sums, far_peaks = near_sums + tiles_most * (ROWS * BLOCKS), near_peaks + tiles_most * ROWS
    q_near = q_ring.index(consumer * 2).reshape([ROWS, D])
    q_far = q_ring.index(consumer * 2 + 1).reshape([ROWS, D])
    stage, phase, turn = 0, 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, begin, tiles = _item(item, items, row_tiles, heads, first_row, q_len, kv_len, before, COLUMNS)
        begin += consumer * (2 * ROWS)
        near, far = first_row * GROUPS_Q + begin, first_row * GROUPS_Q + begin + ROWS
        near_cut = _first_cut(near, q_len, kv_len, before, COLUMNS)
        far_cut = _first_cut(far, q_len, kv_len, before, COLUMNS)
        mbarrier.wait(q_ready.index(consumer), turn)
        turn ^= 1
        near_peak = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
        far_peak = near_peak
        near_total = gl.zeros([ROWS], gl.float32, row_layout)
        far_total = near_total
        if tiles > 0:
            blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
            mbarrier.wait(k_ready.index(stage), phase)
            k = k_ring.index(stage).reshape([COLUMNS, D]).permute((1, 0))
            z = warpgroup_mma(q_near, k, blank, use_acc=False, is_async=True)
            z = warpgroup_mma_wait(0, [z])
            after = warpgroup_mma(q_far, k, blank, use_acc=False, is_async=True)
            near_peak, near_total = _absorb(
                z, near_peak, near_total, 0, near_cut, near, near_sums, near_peaks, q_len, kv_len, before, factor,
                POLYNOMIAL, COLUMNS,
            )  # fmt: skip
            z = warpgroup_mma_wait(0, [after])
            mbarrier.arrive(k_free.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            for tile in range(1, tiles):
                blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
                mbarrier.wait(k_ready.index(stage), phase)
                k = k_ring.index(stage).reshape([COLUMNS, D]).permute((1, 0))
                ahead = warpgroup_mma(q_near, k, blank, use_acc=False, is_async=True)
                far_peak, far_total = _absorb(
                    z, far_peak, far_total, tile - 1, far_cut, far, far_sums, far_peaks, q_len, kv_len, before, factor,
                    POLYNOMIAL, COLUMNS,
                )  # fmt: skip
                # Nobody waits for it: the branch keeps the softmax and the wait in two basic blocks. In one, the
                # assembler waits first.
                if tile + 1 == tiles:
                    mbarrier.arrive(apart, count=1)
                z = warpgroup_mma_wait(0, [ahead])
                blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
                after = warpgroup_mma(q_far, k, blank, use_acc=False, is_async=True)
                near_peak, near_total = _absorb(
                    z, near_peak, near_total, tile, near_cut, near, near_sums, near_peaks, q_len, kv_len, before,
                    factor, POLYNOMIAL, COLUMNS,
                )  # fmt: skip
                if tile + 1 == tiles:
                    mbarrier.arrive(apart, count=1)
                z = warpgroup_mma_wait(0, [after])
                mbarrier.arrive(k_free.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            far_peak, far_total = _absorb(
                z, far_peak, far_total, tiles - 1, far_cut, far, far_sums, far_peaks, q_len, kv_len, before, factor,
                POLYNOMIAL, COLUMNS,
            )  # fmt: skip
        mbarrier.arrive(q_free.index(consumer), count=1)
        _finish(
            near_peak, near_total, near_sums, near_peaks, value_ptr, scores_ptr, b, h, begin, tiles, heads, group,
            rows, columns, terms, COLUMNS,
        )  # fmt: skip
        _finish(
            far_peak, far_total, far_sums, far_peaks, value_ptr, scores_ptr, b, h, begin + ROWS, tiles, heads, group,
            rows, columns, terms, COLUMNS,
        )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit(do_not_specialize=["items", "row_tiles", "tiles_most", "rows", "first_row", "columns", "q_len", "kv_len"])
def mass(
    q_desc,
    k_desc,
    value_ptr,
    sums_ptr,
    peaks_ptr,
    scores_ptr,
    items,
    row_tiles,
    tiles_most,
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
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Grid (at most items,), items = row_tiles * B * H, a row tile of HALVES * ROWS query groups. scores: fp32 [B, H,
    rows, columns] from ``first_row`` on: log mass plus value term.

    q_desc, k_desc: means [B, H, groups, HEAD_DIM] in tiles of [1, 1, ROWS, D], [B, Hk, groups, HEAD_DIM] in tiles of
    [1, 1, COLUMNS, D]. value: fp32 [B, Hk, columns]. sums: fp32 [programs, HALVES, tiles_most, COLUMNS / GROUPS_K,
    ROWS], peaks: the same without blocks. scale: the attention's, positive, times log2(e).
    """
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [HALVES, 1, 1, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, COLUMNS, D], k_desc.layout)
    q_ready, q_free = _barriers(2, 1), _barriers(2, 1)
    k_ready, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    apart = _barriers(1, 2).index(0)
    fence_async_shared()
    before = 0
    if CAUSAL:
        before = offset(q_len, kv_len, tensors, layouts, scalars)
    terms = (tensors, layouts, scalars)
    rings = (q_ring, k_ring, q_ready, q_free, k_ready, k_free, apart)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, rings, value_ptr, sums_ptr, peaks_ptr, scores_ptr, items, row_tiles, tiles_most, heads, group,
                    rows, first_row, columns, q_len, kv_len, before, scale, terms, COLUMNS, STAGES, POLYNOMIAL,
                ),
            ),
            (
                _consume,
                (
                    1, rings, value_ptr, sums_ptr, peaks_ptr, scores_ptr, items, row_tiles, tiles_most, heads, group,
                    rows, first_row, columns, q_len, kv_len, before, scale, terms, COLUMNS, STAGES, POLYNOMIAL,
                ),
            ),
            (
                _produce,
                (
                    q_desc, k_desc, rings, items, row_tiles, heads, group, first_row, q_len, kv_len, before, COLUMNS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 40],
    )  # fmt: skip
