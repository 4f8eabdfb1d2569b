"""Block scores by pooled mass for Hopper in Gluon: ``mass.py`` with warps in roles.

A persistent program owns 256 query groups of one head. Its four roles:

- an assistant warpgroup averages the queries of the next item while the consumers are at work on this one, and turns
  the sums of the item before into masses, so that neither pass over memory costs time of its own;
- a producer warp fetches the means by TMA and walks the key groups in tiles that both consumers share;
- two consumer warpgroups own two halves of 64 query groups each: the product of one half runs while the exponentials
  of the other are summed, one sum a query group and key block, which go to a scratch buffer.

The means of keys are centred (``means.py``): a vector taken off every key shifts all scores of a row alike, and a
softmax does not see it. What is left is bounded by two norms, so where their product stays in the exponents of float32
no running maximum is needed at all. An item beyond that bound, which is rare, looks for its rows' maxima in a walk of
its own first.

The groups of a tile lie in an order in which the columns that one thread of a product holds are adjacent groups: a key
block's sum is then a thread's own, without an exchange among threads.

Means are fp16, or e4m3 at twice the matrix rate: those of keys over a power of 2, those of queries times it.
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
COLUMNS = gl.constexpr(128)  # key groups a tile
QUARTER = gl.constexpr(COLUMNS.value // 4)  # columns of a product that one thread holds in a row
BLOCKS = gl.constexpr(COLUMNS.value // GROUPS_K.value)  # key blocks a tile
LARGEST = gl.constexpr(108.0)  # scores of at most 2^LARGEST are summed without a maximum
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after triton 3.6


def _bits(axis, first, count):
    """Bases of a linear layout: ``count`` bits of a 3-dimensional tensor's ``axis``, from bit ``first`` on."""
    return [[(1 << (first + i)) * (a == axis) for a in range(3)] for i in range(count)]


def _pool_layout(width, group):
    """Layout of queries [groups, tokens of a group (8 at most), width] that the assistant averages: a thread owns eight
    columns of all tokens, in 16 loads of 16 bytes."""
    across = (width // 8).bit_length() - 1
    tokens = min(group, 8).bit_length() - 1
    lanes = 5 - across
    more = min(4 - tokens, 8 - lanes - 2)
    registers = _bits(2, 0, 3) + _bits(1, 0, tokens) + _bits(0, lanes + 2, more)
    shape = [1 << (lanes + 2 + more), 1 << tokens, width]
    lane_bits = _bits(2, 3, across) + _bits(0, 0, lanes)
    return gl.DistributedLinearLayout(registers, lane_bits, _bits(0, lanes, 2), [], shape)


def _sum_layout(rows, high, blocks):
    """Layout of sums [tiles, rows, blocks] that the assistant adds up over the rows of each of ``high`` query blocks:
    16 bytes a load where there are so many, sectors filled, query blocks apart by warps."""
    vector = min(3, blocks.bit_length() - 1)
    wide = blocks.bit_length() - 1 - vector
    low = max(0, min(4 - vector - wide, rows.bit_length() - high.bit_length()))  # rows that share a sector
    tiles = 5 - wide - low
    apart = min(2, high.bit_length() - 1)
    own = rows.bit_length() - 1 - low - apart
    registers = _bits(2, 0, vector) + _bits(1, low, own)
    warps = _bits(1, low + own, apart) + _bits(0, tiles, 2 - apart)
    lanes = _bits(2, vector, wide) + _bits(1, 0, low) + _bits(0, 0, tiles)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [1 << (tiles + 2 - apart), rows, blocks])


POOL = gl.constexpr(_pool_layout(D.value, GROUP_Q.value))
SUMS = gl.constexpr(_sum_layout(ROWS.value, HIGH.value, BLOCKS.value))
POOLED = gl.constexpr(POOL.value.shape[0])  # query groups averaged at a time
TOKENS = gl.constexpr(POOL.value.shape[1])
TILES = gl.constexpr(SUMS.value.shape[0])  # tiles whose sums are added up at a time


@gluon.jit
def _item(item, items, row_tiles, heads, first_row, q_len, kv_len, before):
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
    return head_row // heads, head_row % heads, group, gl.cdiv(gl.cdiv(reach, BLOCK_K), BLOCKS)


@gluon.jit
def _number(items):
    """How many items this program computes."""
    programs = gl.num_programs(0)
    whole, rest = items // programs, items % programs
    place = gl.where(whole % 2 == 1, programs - 1 - gl.program_id(0), gl.program_id(0))
    return whole + gl.where(place < rest, 1, 0)


@gluon.jit
def _nth(turn):
    """This program's item number ``turn``: programs take their turns to and fro, as items get lighter."""
    programs = gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - gl.program_id(0), gl.program_id(0))


@gluon.jit
def _pool(q_ptr, strides, means_ptr, first, q_len, factor, unit):
    """``factor`` times the means of the query groups from ``first`` on, HALVES * ROWS of them; their largest squared
    norm. To ``means_ptr`` they go in ``unit``."""
    g = gl.arange(0, POOLED, gl.SliceLayout(1, gl.SliceLayout(2, POOL)))[:, None, None]
    t = gl.arange(0, TOKENS, gl.SliceLayout(0, gl.SliceLayout(2, POOL)))[None, :, None]
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, POOL)))[None, None, :]
    out_layout: gl.constexpr = gl.SliceLayout(1, POOL)
    group = gl.arange(0, POOLED, gl.SliceLayout(1, out_layout))
    out_column = gl.arange(0, D, gl.SliceLayout(0, out_layout))[None, :]
    largest = gl.zeros([POOLED], gl.float32, gl.SliceLayout(1, out_layout))
    for part in range(ROWS * HALVES // POOLED):
        token = (first + part * POOLED + g) * GROUP_Q + t
        total = gl.zeros([POOLED, D], gl.float32, out_layout)
        for i in gl.static_range(GROUP_Q // TOKENS):
            here = token + i * TOKENS
            x = gl.load(
                q_ptr + here.to(gl.int64) * strides[2] + column, mask=(here < q_len) & (column < HEAD_DIM), other=0.0
            )
            total += gl.sum(x.to(gl.float32), 1)
        count = gl.minimum(gl.maximum(q_len - (first + part * POOLED + group) * GROUP_Q, 1), GROUP_Q).to(gl.float32)
        mean = total * (factor / count)[:, None]
        largest = gl.maximum(largest, gl.sum(mean * mean, 1))
        place = (part * POOLED + group)[:, None] * HEAD_DIM + out_column
        most: gl.constexpr = 448.0 if means_ptr.dtype.element_ty == gl.float8e4nv else 65504.0
        mean = gl.minimum(gl.maximum(mean * unit, -most), most)
        gl.store(means_ptr + place, mean.to(means_ptr.dtype.element_ty), mask=out_column < HEAD_DIM)
    # TMA reads what these threads have written.
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.max(largest, 0)


@gluon.jit
def _log2(x):
    """Logarithm to base 2 of positive normal numbers by the special function unit: absolute error below 1e-6 times the
    result or 1e-6."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _finish(sums_ptr, weights_ptr, values, scores_ptr, line, tiles, rows, columns, pitch):
    """Scores of the query blocks of 64 query groups, chunk rows ``line`` on, from the sums of their rows over each key
    block and the reciprocals of the rows' totals."""
    row_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, SUMS))
    row = gl.arange(0, ROWS, row_layout)
    weight = gl.load(weights_ptr + row)
    seeing = gl.sum(gl.where(weight > 0, 1.0, 0.0).reshape([HIGH, GROUPS_Q]), 1)
    t = gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    b = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
    place = t * (ROWS * BLOCKS) + row[None, :, None] * BLOCKS + b
    for part in range(gl.cdiv(tiles, TILES)):
        tile = part * TILES
        sums = gl.load(sums_ptr + tile * (ROWS * BLOCKS) + place, mask=t + tile < tiles, other=0.0)
        held = sums.to(gl.float32) * weight[None, :, None]
        held = gl.sum(held.reshape([TILES, HIGH, GROUPS_Q, BLOCKS]), 2)
        layout: gl.constexpr = held.type.layout
        high: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
        mass = held / gl.maximum(gl.convert_layout(seeing, high), 1.0)[None, :, None]
        block = (tile + gl.arange(0, TILES, gl.SliceLayout(1, gl.SliceLayout(2, layout))))[:, None, None] * BLOCKS
        block += gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
        there = (block < columns) & (block < tiles * BLOCKS)
        value = gl.load(values + block, mask=there, other=0.0)
        score = _log2(gl.maximum(mass, LEAST)) * LN2 + value
        place_out = (line + gl.arange(0, HIGH, high))[None, :, None]
        out = scores_ptr + place_out.to(gl.int64) * pitch + block
        gl.store(out, score, mask=there & (place_out < rows))


@gluon.jit
def _reaching(norms, tiles, columns):
    """Largest norm of the key means of ``tiles`` tiles."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    block = gl.arange(0, 128, layout)
    largest = gl.zeros([128], gl.float32, layout)
    end = gl.minimum(tiles * BLOCKS, columns)
    for part in range(gl.cdiv(end, 128)):
        largest = gl.maximum(largest, gl.load(norms + part * 128 + block, mask=part * 128 + block < end, other=0.0))
    return gl.max(largest, 0)


@gluon.jit
def _assist(
    q_ptr,
    strides,
    means_ptr,
    wide_ptr,
    norms_ptr,
    unit_ptr,
    sums_ptr,
    weights_ptr,
    value_ptr,
    scores_ptr,
    rings,
    items,
    row_tiles,
    tiles_most,
    heads,
    group,
    rows,
    first_row,
    columns,
    pitch,
    q_len,
    kv_len,
    before,
    q_factor,
    factor,
):
    pooled, done = rings[6:8]
    program = gl.program_id(0)
    number = _number(items)
    for turn in range(number + 2):
        slot = program * 2 + turn % 2
        if turn >= 2:  # the item before the last: the consumers are at work on the last
            b, h, begin, tiles = _item(_nth(turn - 2), items, row_tiles, heads, first_row, q_len, kv_len, before)
            mbarrier.wait(done.index(turn % 2), (turn // 2 - 1) % 2)
            values = value_ptr + (b * (heads // group) + h // group) * columns
            out = scores_ptr + (b * heads + h).to(gl.int64) * rows * pitch
            for half in range(HALVES):
                place = slot.to(gl.int64) * HALVES + half
                _finish(
                    sums_ptr + place * tiles_most * (ROWS * BLOCKS), weights_ptr + place * ROWS, values, out,
                    begin // GROUPS_Q + half * HIGH, tiles, rows, columns, pitch,
                )  # fmt: skip
        if turn < number:
            b, h, begin, tiles = _item(_nth(turn), items, row_tiles, heads, first_row, q_len, kv_len, before)
            unit = 1.0
            if means_ptr.dtype.element_ty == gl.float8e4nv:
                unit = gl.load(unit_ptr + b * (heads // group) + h // group)
            norm = _pool(
                q_ptr + b.to(gl.int64) * strides[0] + h.to(gl.int64) * strides[1], strides,
                means_ptr + slot.to(gl.int64) * (ROWS * HALVES * HEAD_DIM), first_row * GROUPS_Q + begin, q_len,
                q_factor, unit,
            )  # fmt: skip
            reaching = _reaching(norms_ptr + (b * (heads // group) + h // group) * columns, tiles, columns)
            bound = gl.sqrt(norm) * reaching
            gl.store(wide_ptr + slot, ((bound > LARGEST) | (factor != 1.0)).to(gl.int32))
            # It says as well that the sums of the item before the last are read.
            mbarrier.arrive(pooled.index(turn % 2), count=1)


@gluon.jit
def _produce(
    q_desc, k_desc, wide_ptr, rings, items, row_tiles, heads, group, first_row, q_len, kv_len, before,
    STAGES: gl.constexpr,
):  # fmt: skip
    q_ring, k_ring, q_ready, q_free, k_ready, k_free, pooled = rings[:7]
    stage, phase = 0, 1
    for turn in range(_number(items)):
        b, h, _, tiles = _item(_nth(turn), items, row_tiles, heads, first_row, q_len, kv_len, before)
        slot = gl.program_id(0) * 2 + turn % 2
        mbarrier.wait(pooled.index(turn % 2), (turn // 2) % 2)
        wide = gl.load(wide_ptr + slot)
        for half in gl.static_range(HALVES):
            if half % 2 == 0:
                mbarrier.wait(q_free.index(half // 2), (turn + 1) % 2)
                mbarrier.expect(q_ready.index(half // 2), q_desc.block_type.nbytes * 2)
            load_tile(q_desc, [0, slot, half * ROWS, 0], q_ready.index(half // 2), q_ring.index(half))
        for step in range(tiles * (1 + wide)):
            tile = step % tiles
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [b, h // group, tile * COLUMNS, 0], k_ready.index(stage), k_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _sums(x):
    """Sums of 2^x over each key block: [ROWS, BLOCKS]."""
    # A thread's blocks, pairs of their groups, four threads side by side, the two of a pair.
    x = gl.exp2(x).reshape([ROWS, BLOCKS // 4, GROUPS_K // 2, 4, 2])
    return gl.sum(gl.sum(x, 4), 2).permute((0, 2, 1)).reshape([ROWS, BLOCKS])


@gluon.jit
def _place(layout: gl.constexpr):
    """Key groups, counted from the tile's first, of a product's columns: int32 [COLUMNS]."""
    n = gl.arange(0, COLUMNS, layout)
    return n // 2 % 4 * QUARTER + n // 8 * 2 + n % 2


@gluon.jit
def _hidden(x, tile, first, q_len, kv_len, before):
    """Scores of a tile with groups that do not count at -inf; without causal order those cut by the end count as what
    they hold."""
    n = tile * COLUMNS + _place(gl.SliceLayout(0, x.type.layout))
    m = first + gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    if CAUSAL:
        limit = gl.minimum(gl.minimum((m + 1) * GROUP_Q, q_len) + before, kv_len)
        limit = gl.where(m * GROUP_Q < q_len, limit, 0)
        return gl.where((n * GROUP_K + GROUP_K)[None, :] <= limit[:, None], x, -float("inf"))
    else:
        number = gl.minimum(gl.maximum(kv_len - n * GROUP_K, 1), GROUP_K).to(gl.float32)
        inside = (n * GROUP_K < kv_len)[None, :] & (m * GROUP_Q < q_len)[:, None]
        return gl.where(inside, x + gl.log2(number * (1.0 / GROUP_K))[None, :], -float("inf"))


@gluon.jit
def _absorb(
    z, shift, total, tile, cut, first, sums_ptr, q_len, kv_len, before, factor, WIDE: gl.constexpr
):  # fmt: skip
    """``total`` [ROWS, BLOCKS] of 64 query groups with a tile's sums, which are stored."""
    if WIDE:
        z = z * factor - shift[:, None]
    if tile >= cut:
        z = _hidden(z, tile, first, q_len, kv_len, before)
    sums = _sums(z)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, total.type.layout))[:, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, total.type.layout))[None, :]
    gl.store(sums_ptr + tile * (ROWS * BLOCKS) + row * BLOCKS + block, sums.to(gl.bfloat16))
    return total + sums


@gluon.jit
def _highest(
    q_near, q_far, k_ring, k_ready, k_free, stage, phase, tiles, near, far, q_len, kv_len, before, factor,
    layout: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(largest scores of 64 query groups from ``near`` on and from ``far`` on, 0 where none is visible, stage and phase
    of the ring) by a walk of their own."""
    near_peak = gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    far_peak = near_peak
    for tile in range(tiles):
        mbarrier.wait(k_ready.index(stage), phase)
        k = k_ring.index(stage).reshape([COLUMNS, D]).permute((1, 0))
        blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        z = warpgroup_mma(q_near, k, blank, use_acc=False, is_async=True)
        after = warpgroup_mma(q_far, k, blank, use_acc=False, is_async=True)
        z, after = warpgroup_mma_wait(0, [z, after])
        mbarrier.arrive(k_free.index(stage), count=1)
        z = _hidden(z * factor, tile, near, q_len, kv_len, before)
        after = _hidden(after * factor, tile, far, q_len, kv_len, before)
        near_peak, far_peak = gl.maximum(near_peak, gl.max(z, 1)), gl.maximum(far_peak, gl.max(after, 1))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    near_peak = gl.where(near_peak > -float("inf"), near_peak, 0.0)
    return near_peak, gl.where(far_peak > -float("inf"), far_peak, 0.0), stage, phase


@gluon.jit
def _first_cut(first, q_len, kv_len, before):
    """Tiles from here on hold key groups that do not count for all of the 64 query groups from ``first`` on."""
    cut = kv_len // (COLUMNS * GROUP_K)
    if CAUSAL:
        cut = gl.minimum(cut, gl.maximum((first + 1) * GROUP_Q + before, 0) // (COLUMNS * GROUP_K))
    return gl.where((first + ROWS) * GROUP_Q > q_len, 0, cut)


@gluon.jit
def _weigh(total, shift, weights_ptr, b, h, terms):
    """Store the reciprocal of each row's whole sum; 0 where it sees nothing."""
    total = gl.sum(total, 1)
    whole = total
    if SINK:
        logit = sink(b, h, terms[0], terms[1], terms[2]) * LOG2E
        whole += gl.convert_layout(gl.exp2(logit - shift), total.type.layout)
    weight = gl.where(total > 0, gl.maximum(1.0 / whole, LEAST), 0.0)
    gl.store(weights_ptr + gl.arange(0, ROWS, total.type.layout), weight)


@gluon.jit
def _walk(
    q_near, q_far, k_ring, k_ready, k_free, apart, stage, phase, tiles, near, far, near_shift, far_shift, near_sums,
    far_sums, q_len, kv_len, before, factor, layout: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """(totals [ROWS, BLOCKS] of 64 query groups from ``near`` on and from ``far`` on, stage and phase of the ring);
    tiles: at least 1."""
    near_cut = _first_cut(near, q_len, kv_len, before)
    far_cut = _first_cut(far, q_len, kv_len, before)
    # Laid out like a tile's sums.
    near_total = _sums(gl.zeros([ROWS, COLUMNS], gl.float32, layout)) * 0.0
    far_total = near_total
    blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    mbarrier.wait(k_ready.index(stage), phase)
    k = k_ring.index(stage).reshape([COLUMNS, D]).permute((1, 0))
    z = warpgroup_mma(q_near, k, blank, use_acc=False, is_async=True)
    z = warpgroup_mma_wait(0, [z])
    after = warpgroup_mma(q_far, k, blank, use_acc=False, is_async=True)
    near_total = _absorb(z, near_shift, near_total, 0, near_cut, near, near_sums, q_len, kv_len, before, factor, WIDE)
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
        far_total = _absorb(
            z, far_shift, far_total, tile - 1, far_cut, far, far_sums, q_len, kv_len, before, factor, WIDE
        )
        # Nobody waits for it: the branch keeps the softmax and the wait in two basic blocks. In one, the assembler
        # waits first.
        if tile + 1 == tiles:
            mbarrier.arrive(apart, count=1)
        z = warpgroup_mma_wait(0, [ahead])
        blank = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        after = warpgroup_mma(q_far, k, blank, use_acc=False, is_async=True)
        near_total = _absorb(
            z, near_shift, near_total, tile, near_cut, near, near_sums, q_len, kv_len, before, factor, WIDE
        )
        if tile + 1 == tiles:
            mbarrier.arrive(apart, count=1)
        z = warpgroup_mma_wait(0, [after])
        mbarrier.arrive(k_free.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    far_total = _absorb(z, far_shift, far_total, tiles - 1, far_cut, far, far_sums, q_len, kv_len, before, factor, WIDE)
    return near_total, far_total, stage, phase


@gluon.jit
def _consume(
    consumer, rings, wide_ptr, sums_ptr, weights_ptr, items, row_tiles, tiles_most, heads, first_row, q_len, kv_len,
    before, factor, terms, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 256 // rings[0].dtype.primitive_bitwidth]
    )
    q_ring, k_ring, q_ready, q_free, k_ready, k_free, pooled, done, apart = rings
    q_near = q_ring.index(consumer * 2).reshape([ROWS, D])
    q_far = q_ring.index(consumer * 2 + 1).reshape([ROWS, D])
    stage, phase = 0, 0
    for turn in range(_number(items)):
        b, h, begin, tiles = _item(_nth(turn), items, row_tiles, heads, first_row, q_len, kv_len, before)
        begin += consumer * (2 * ROWS)
        near, far = first_row * GROUPS_Q + begin, first_row * GROUPS_Q + begin + ROWS
        slot = gl.program_id(0) * 2 + turn % 2
        place = slot.to(gl.int64) * HALVES + consumer * 2
        near_sums = sums_ptr + place * tiles_most * (ROWS * BLOCKS)
        far_sums = near_sums + tiles_most * (ROWS * BLOCKS)
        mbarrier.wait(pooled.index(turn % 2), (turn // 2) % 2)
        wide = gl.load(wide_ptr + slot)
        mbarrier.wait(q_ready.index(consumer), turn % 2)
        near_shift = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
        far_shift = near_shift
        near_total = _sums(gl.zeros([ROWS, COLUMNS], gl.float32, layout)) * 0.0
        far_total = near_total
        if tiles > 0:
            if wide != 0:
                near_shift, far_shift, stage, phase = _highest(
                    q_near, q_far, k_ring, k_ready, k_free, stage, phase, tiles, near, far, q_len, kv_len, before,
                    factor, layout, STAGES,
                )  # fmt: skip
                near_total, far_total, stage, phase = _walk(
                    q_near, q_far, k_ring, k_ready, k_free, apart, stage, phase, tiles, near, far, near_shift,
                    far_shift, near_sums, far_sums, q_len, kv_len, before, factor, layout, STAGES, True,
                )  # fmt: skip
            else:
                near_total, far_total, stage, phase = _walk(
                    q_near, q_far, k_ring, k_ready, k_free, apart, stage, phase, tiles, near, far, near_shift,
                    far_shift, near_sums, far_sums, q_len, kv_len, before, factor, layout, STAGES, False,
                )  # fmt: skip
        mbarrier.arrive(q_free.index(consumer), count=1)
        _weigh(near_total, near_shift, weights_ptr + place * ROWS, b, h, terms)
        _weigh(far_total, far_shift, weights_ptr + (place + 1) * ROWS, b, h, terms)
        mbarrier.arrive(done.index(turn % 2), count=1)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["items", "row_tiles", "tiles_most", "rows", "first_row", "columns", "q_len", "kv_len"])
def mass(
    q_ptr,
    q_strides,
    q_desc,
    k_desc,
    means_ptr,
    norms_ptr,
    unit_ptr,
    value_ptr,
    wide_ptr,
    sums_ptr,
    weights_ptr,
    scores_ptr,
    items,
    row_tiles,
    tiles_most,
    heads,
    group,
    rows,
    first_row,
    columns,
    pitch,
    q_len,
    kv_len,
    q_factor,
    factor,
    tensors,
    layouts,
    scalars,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Grid (at most items,), items = row_tiles * B * H, a row tile of HALVES * ROWS query groups. scores: fp32 [B, H,
    rows, pitch] from ``first_row`` on, columns of which are written: log mass plus value term.

    q: [B, H, q_len, HEAD_DIM], consecutive in the last dimension. k_desc: centred means of ``means.py`` [B, Hk, tiles
    * COLUMNS, HEAD_DIM] in its order of groups, tiles of [1, 1, COLUMNS, D]; norms: fp32 [B, Hk, columns], the
    largest of each block; value: the same shape; unit: fp32 [B, Hk], where means are e4m3. Scratch of each program,
    twice: means: [programs * 2, HALVES * ROWS, HEAD_DIM], which q_desc describes as [1, programs * 2, ...] in tiles
    of [1, 1, ROWS, D]; wide: int32 [programs * 2]; sums: bf16 [programs * 2, HALVES, tiles_most, ROWS, BLOCKS];
    weights: fp32 [programs * 2, HALVES, ROWS]. The attention's scale, positive, times log2(e) is a factor of the
    means: q_factor and what ``means.py`` was given; factor: what is left of it, as a rule 1.
    """
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [HALVES, 1, 1, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, COLUMNS, D], k_desc.layout)
    q_ready, q_free = _barriers(2, 1), _barriers(2, 1)
    k_ready, k_free = _barriers(STAGES, 1), _barriers(STAGES, 2)
    pooled, done = _barriers(2, 1), _barriers(2, 2)
    apart = _barriers(1, 2).index(0)
    fence_async_shared()
    before = 0
    if CAUSAL:
        before = offset(q_len, kv_len, tensors, layouts, scalars)
    terms = (tensors, layouts, scalars)
    rings = (q_ring, k_ring, q_ready, q_free, k_ready, k_free, pooled, done, apart)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, rings, wide_ptr, sums_ptr, weights_ptr, items, row_tiles, tiles_most, heads, first_row, q_len,
                    kv_len, before, factor, terms, STAGES,
                ),
            ),
            (
                _consume,
                (
                    1, rings, wide_ptr, sums_ptr, weights_ptr, items, row_tiles, tiles_most, heads, first_row, q_len,
                    kv_len, before, factor, terms, STAGES,
                ),
            ),
            (
                _assist,
                (
                    q_ptr, q_strides, means_ptr, wide_ptr, norms_ptr, unit_ptr, sums_ptr, weights_ptr, value_ptr,
                    scores_ptr,
                    rings, items, row_tiles, tiles_most, heads, group, rows, first_row, columns, pitch, q_len, kv_len,
                    before, q_factor, factor,
                ),
            ),
            (
                _produce,
                (
                    q_desc, k_desc, wide_ptr, rings, items, row_tiles, heads, group, first_row, q_len, kv_len, before,
                    STAGES,
                ),
            ),
        ],
        [4, 4, 1],
        [REGISTERS, 472 - 2 * REGISTERS, 40],
    )  # fmt: skip
