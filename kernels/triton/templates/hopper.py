"""Block-sparse attention for Hopper in Gluon: one program per (query block, query head), warps with roles.

A producer warp walks the row's list from its end and fills rings of K and V tiles by TMA. Each consumer warpgroup owns
64 query rows: it issues the next tile's Q K^T and the product of the last weights with V, and turns scores into weights
while the second runs. A tile is TILE keys: part of a key block, or several blocks of the list side by side. The tiles
that the causal line cuts are the last of the list, hence the first visited; later tiles skip the mask, unless it is
more than causal (GENERAL); of those, tiles between the two edges of a band skip it too (EDGES). Nothing waits for a
tile's largest score. Weights of bfloat16 have the exponents of float32: their row keeps the peak of its first tile
(FIXED), and a row whose sum leaves the range for which that serves is marked, to be computed again by ``portable.py``.
Weights of float16 follow the peak, but only where scores rise far (the lazy peak of FlashAttention-4): below that, sums
and output stay in range and most tiles leave the output as it is. Neighbouring rows run at the same time and walk their
lists in step, so that they meet in the L2 cache.

Tensors as in ``portable.py``; q, k, v arrive as rank-4 TMA descriptors (any 16-byte aligned strides; head dims are
zero-filled to a power of two). Rows that saw no key give 0 and a log-sum-exp of -inf. The structure follows
FlashAttention-3 (arXiv 2407.08608).
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
VALUE_DIM = gl.constexpr(128)
BLOCK_Q = gl.constexpr(128)
BLOCK_K = gl.constexpr(128)
CAUSAL = gl.constexpr(True)
GENERAL = gl.constexpr(False)
BANDED = gl.constexpr(False)
EDGES = gl.constexpr(False)
MODIFIED = gl.constexpr(False)
SINK = gl.constexpr(False)
FIXED = gl.constexpr(True)


@gluon.jit
def visible(b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):
    return kv <= q


@gluon.jit
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


@gluon.jit
def lowest(b, q, q_len, kv_len, tensors, layouts, scalars):
    return 0


@gluon.jit
def score(s, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):
    return s


@gluon.jit
def sink(b, h, tensors, layouts, scalars):
    return 0.0


# generated: end
# Hidden scores are -inf and a row's peak starts at a finite FLOOR: their weights are exactly 0, also where a row has
# seen nothing yet (a large finite score would not do: scaled and subtracted from its own peak in one fused operation it
# leaves its rounding error, in the billions).
FLOOR = gl.constexpr(-1.0e30)
LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # query rows a consumer: one wgmma tile
CONSUMERS = gl.constexpr(BLOCK_Q.value // 64)
D = gl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
DV = gl.constexpr(triton.next_power_of_2(VALUE_DIM.value))
BOX = gl.constexpr(min(D.value, DV.value, 64))  # columns of a box where a tile is several blocks: one swizzle
NOWHERE = gl.constexpr(1 << 20)  # a block past every sequence: TMA fills zeros, the mask hides them
RISE = gl.constexpr(
    8.0
)  # how far (log2) scores may exceed a row's peak before the peak follows: weights stay below 2^8
# FIXED: the first tile's largest score stands SHIFT (log2) below the peak. Sums in [LEAST, MOST] mean scores between
# 2^-58 and 2^96 times that one's weight, with room in float32 for what falls 2^-36 below them and for values from 2^-90
# to 2^62.
SHIFT = gl.constexpr(32.0)
LEAST = gl.constexpr(2.0**-90)
MOST = gl.constexpr(2.0**64)
# A thread holds DV / 2 values of the output: two of one row, two of another, in turn. Operands: results, values,
# factors.
HELD = gl.constexpr(DV.value // 2)
RESCALE = gl.constexpr(
    f"{{ .reg .pred p; setp.ne.f32 p, ${DV.value}, 0f3F800000; setp.ne.or.f32 p, ${DV.value + 2}, 0f3F800000, p;"
    " vote.sync.any.pred p, p, -1; @p bra RISEN; "
    + " ".join(f"mov.b32 ${i}, ${DV.value // 2 + i};" for i in range(DV.value // 2))
    + " bra DONE; RISEN: "
    + " ".join(f"mul.f32 ${i}, ${DV.value // 2 + i}, ${DV.value + i};" for i in range(DV.value // 2))
    + " DONE: }"
)
RESCALE_OPERANDS = gl.constexpr(",".join(["=&f"] * (DV.value // 2) + ["f"] * DV.value))
# Renamed after triton 3.6.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _row(rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, terms, TILE: gl.constexpr, PACKED: gl.constexpr):
    """This program's row: (batch, query head, first query, tiles cut, (its list, first key where there is no list else
    -1, blocks, tiles)).

    Tiles cut: how many of the first-visited tiles may hold keys that some query does not see.
    """
    head_row = gl.program_id(0) // rows
    row = rows - 1 - gl.program_id(0) % rows  # heavy rows first
    where = head_row.to(gl.int64) * rows + row
    index_ptr = indices_ptr + where * width
    if PACKED > 0:
        # Lists of a row's heads lie end to end.
        b, other = head_row // heads, gl.arange(0, PACKED, gl.BlockedLayout([1], [32], [4], [0]))
        lengths = gl.load(counts_ptr + (b * heads + other) * rows + row, mask=other < head_row % heads, other=0)
        index_ptr = indices_ptr + (b * rows + row).to(gl.int64) * heads * width + gl.sum(gl.maximum(lengths, 0), 0)
    count = gl.load(counts_ptr + where)
    first = row * BLOCK_Q
    # Blocks [0, whole) are visible to every query, blocks [reach, ...) to none.
    reach, whole = kv_len, kv_len
    if CAUSAL:
        before = offset(q_len, kv_len, terms[0], terms[1], terms[2])
        reach = gl.minimum(kv_len, gl.minimum(first + BLOCK_Q, q_len) + before)
        whole = gl.minimum(kv_len, first + 1 + before)
    reach = gl.cdiv(gl.maximum(reach, 0), BLOCK_K)
    whole = gl.maximum(whole, 0) // BLOCK_K
    bottom = 0
    if BANDED:
        bottom = gl.minimum(
            gl.maximum(lowest(head_row // heads, first, q_len, kv_len, terms[0], terms[1], terms[2]), 0) // BLOCK_K,
            reach,
        )
    blocks = gl.where(count >= 0, count, reach - bottom)
    hard = gl.minimum(gl.maximum(reach - whole, 0), blocks)
    if count >= 0:
        # At most the last few listed blocks can be cut.
        hard = 0
        for t in gl.static_range((BLOCK_Q + BLOCK_K - 1) // BLOCK_K + 1):
            end = gl.load(index_ptr + blocks - 1 - t, mask=t < blocks, other=-1)
            hard += (end >= whole).to(gl.int32)
    tiles = gl.maximum(gl.cdiv(blocks * BLOCK_K, TILE), 1)  # a row that sees nothing has a tile, all hidden
    cut = gl.cdiv(
        hard * BLOCK_K + tiles * TILE - blocks * BLOCK_K, TILE
    )  # what the list leaves of the last tile counts
    return (
        head_row // heads,
        head_row % heads,
        first,
        cut,
        (index_ptr, gl.where(count >= 0, -1, bottom * BLOCK_K), blocks, tiles),
    )


@gluon.jit
def _start(walk, i, part, TILE: gl.constexpr):
    """First key of part ``part`` of the i-th tile from the end of ``walk``. Parts are blocks, or one piece of a
    block."""
    index_ptr, origin, blocks, tiles = walk
    UNIT: gl.constexpr = BLOCK_K if BLOCK_K < TILE else TILE
    SPLIT: gl.constexpr = BLOCK_K // UNIT
    position = (tiles - 1 - i) * (TILE // UNIT) + part
    block = gl.load(index_ptr + position // SPLIT, mask=(origin < 0) & (position < blocks * SPLIT), other=NOWHERE)
    return gl.where(origin < 0, block * BLOCK_K + (position % SPLIT) * UNIT, origin + position * UNIT)


@gluon.jit
def _fetch(desc, ring, ready, free, b, h, walk, i, TILE: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr):
    """Fetch the row's i-th tile of K or V once its place in the ring is free."""
    PARTS: gl.constexpr = TILE // BLOCK_K if BLOCK_K < TILE else 1
    stage = i % STAGES
    mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), TILE * WIDTH * 2)
    if PARTS == 1:
        load_tile(desc, [b, h, _start(walk, i, 0, TILE), 0], ready.index(stage), ring.index(stage))
    else:
        # In memory a tile is one column of boxes after the other.
        shape: gl.constexpr = [STAGES * (WIDTH // BOX) * PARTS, 1, 1, BLOCK_K, BOX]
        if REINTERPRET:
            boxes = ring.reinterpret(ring.dtype, shape, desc.layout)
        else:
            boxes = ring._reinterpret(ring.dtype, shape, desc.layout)
        for part in gl.static_range(PARTS):
            start = _start(walk, i, part, TILE)
            for column in gl.static_range(WIDTH // BOX):
                load_tile(
                    desc,
                    [b, h, start, column * BOX],
                    ready.index(stage),
                    boxes.index((stage * (WIDTH // BOX) + column) * PARTS + part),
                )


@gluon.jit
def _produce(k_desc, v_desc, rings, group, row, TILE: gl.constexpr, STAGES: gl.constexpr):
    k_ring, v_ring, k_ready, k_free, v_ready, v_free = rings
    b, h, _, _, walk = row
    tiles = walk[3]
    # K runs one tile ahead of V, as the consumers free them.
    for i in range(tiles + 1):
        if i < tiles:
            _fetch(k_desc, k_ring, k_ready, k_free, b, h // group, walk, i, TILE, STAGES, D)
        if i > 0:
            _fetch(v_desc, v_ring, v_ready, v_free, b, h // group, walk, i - 1, TILE, STAGES, DV)


@gluon.jit
def _keys(walk, i, layout: gl.constexpr, TILE: gl.constexpr):
    """int32 [1, TILE]: positions of the i-th tile's keys."""
    lane = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    kv = lane + _start(walk, i, 0, TILE)
    if BLOCK_K < TILE:
        for part in gl.static_range(1, TILE // BLOCK_K):
            kv = gl.where(lane >= part * BLOCK_K, lane - part * BLOCK_K + _start(walk, i, part, TILE), kv)
    return kv[None, :]


@gluon.jit
def _hides(i, row, consumer, q_len, kv_len, terms, TILE: gl.constexpr):
    """Whether the mask is evaluated on the i-th tile."""
    b, _, first, cut, walk = row
    if EDGES:
        # Every query of this consumer sees the keys from far up to near.
        first += consumer * ROWS
        far, near = lowest(b, gl.minimum(first + ROWS, q_len) - 1, q_len, kv_len, terms[0], terms[1], terms[2]), kv_len
        if CAUSAL:
            near = gl.minimum(kv_len, first + 1 + offset(q_len, kv_len, terms[0], terms[1], terms[2]))
        UNIT: gl.constexpr = BLOCK_K if BLOCK_K < TILE else TILE
        bottom = _start(walk, i, 0, TILE)
        top = bottom + UNIT
        if UNIT < TILE:
            top = _start(walk, i, TILE // UNIT - 1, TILE) + UNIT
        return (bottom < far) | (top > near)
    elif GENERAL:
        return i >= 0
    else:
        return i < cut


@gluon.jit
def _modified(scores, i, row, consumer, q_len, kv_len, scale, terms, layout: gl.constexpr, TILE: gl.constexpr):
    """Products of the i-th tile as what enters the softmax, over the factor that is left."""
    b, h, first, _, walk = row
    if MODIFIED:
        q = (first + consumer * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None]
        scores = score(
            scores * scale, b, h, q, _keys(walk, i, layout, TILE), q_len, kv_len, terms[0], terms[1], terms[2]
        )
    return scores


@gluon.jit
def _hidden(scores, i, row, consumer, q_len, kv_len, terms, layout: gl.constexpr, TILE: gl.constexpr):
    """Scores of the i-th tile with what the mask hides, and keys past the end, at -inf."""
    b, h, first, _, walk = row
    if _hides(i, row, consumer, q_len, kv_len, terms, TILE):
        q = (first + consumer * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))[:, None]
        kv = _keys(walk, i, layout, TILE)
        scores = gl.where(
            visible(b, h, q, kv, q_len, kv_len, terms[0], terms[1], terms[2]) & (kv < kv_len), scores, -float("inf")
        )
    return scores


@gluon.jit
def _rescale(acc, shrink):
    """acc [ROWS, DV] times shrink [ROWS], in warps where some row's is not 1."""
    shrink, acc = gl.broadcast(shrink[:, None], acc)
    return gl.inline_asm_elementwise(
        RESCALE, RESCALE_OPERANDS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=HELD
    )


@gluon.jit
def _partial(weights):
    """Sums of [ROWS, TILE] over the columns that one thread holds: [ROWS, 4], so that threads exchange theirs once a
    row."""
    return gl.sum(gl.sum(weights.reshape([weights.shape[0], weights.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _consume(
    consumer,
    q_tiles,
    q_ready,
    apart,
    rings,
    o_ptr,
    lse_ptr,
    marks_ptr,
    o_strides,
    row,
    heads,
    q_len,
    kv_len,
    scale,
    terms,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LSE: gl.constexpr,
):
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16]
    )
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    stat_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    store_layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (DV // 8) if DV < 256 else 1, min(DV // 8, 32)], [4, 1], [1, 0]
    )
    k_ring, v_ring, k_ready, k_free, v_ready, v_free = rings
    b, h, first, _, walk = row
    marks_ptr += ((b * heads + h).to(gl.int64) * gl.cdiv(q_len, BLOCK_Q) + first // BLOCK_Q) * CONSUMERS + consumer
    first += consumer * ROWS
    tiles = walk[3]
    factor = scale
    if MODIFIED:
        factor = LOG2E
    acc = gl.zeros([ROWS, DV], gl.float32, out_layout)
    peak = gl.full([ROWS], FLOOR, gl.float32, stat_layout)
    total = gl.zeros([ROWS], gl.float32, stat_layout)
    if SINK:
        logit = sink(b, h, terms[0], terms[1], terms[2]) * LOG2E
        peak = gl.maximum(peak, logit)
        total += gl.exp2(logit - peak)

    q = q_tiles.index(consumer).reshape([ROWS, D])
    blank = gl.zeros([ROWS, TILE], gl.float32, score_layout)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = warpgroup_mma(q, k_ring.index(0).reshape([TILE, D]).permute((1, 0)), blank, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(0), count=1)
    scores = _modified(scores, 0, row, consumer, q_len, kv_len, scale, terms, score_layout, TILE)
    if FIXED:
        # Hidden scores count: a row may see no key of this tile, and they are as large as others.
        peak = gl.maximum(peak, gl.max(scores, 1) * factor) + SHIFT
        scores = _hidden(scores, 0, row, consumer, q_len, kv_len, terms, score_layout, TILE)
        fresh = gl.exp2(scores * factor - peak[:, None])
        total = _partial(fresh)
    else:
        scores = _hidden(scores, 0, row, consumer, q_len, kv_len, terms, score_layout, TILE)
        higher = gl.maximum(peak, gl.max(scores, 1) * factor)
        fresh = gl.exp2(scores * factor - higher[:, None])
        total = total * gl.exp2(peak - higher) + gl.sum(fresh, 1)
        peak = higher
    weights = gl.convert_layout(fresh.to(v_ring.dtype), weight_layout)
    # One loop: where two follow each other the weights between them are unpacked and packed again in every tile.
    for i in range(1, tiles):
        # Scores of this tile and their softmax, while the product of the tile before with its V runs.
        stage, phase = i % STAGES, (i // STAGES) & 1
        done, done_phase = (i - 1) % STAGES, ((i - 1) // STAGES) & 1
        blank = gl.zeros([ROWS, TILE], gl.float32, score_layout)
        mbarrier.wait(k_ready.index(stage), phase)
        scores = warpgroup_mma(
            q, k_ring.index(stage).reshape([TILE, D]).permute((1, 0)), blank, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(done), done_phase)
        product = warpgroup_mma(weights, v_ring.index(done).reshape([TILE, DV]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        scores = _modified(scores, i, row, consumer, q_len, kv_len, scale, terms, score_layout, TILE)
        scores = _hidden(scores, i, row, consumer, q_len, kv_len, terms, score_layout, TILE)
        if FIXED:
            fresh = gl.exp2(scores * factor - peak[:, None])
            total += _partial(fresh)
        else:
            higher = gl.maximum(peak, gl.max(scores, 1) * factor)
            higher = gl.where(higher - peak > RISE, higher, peak)
            shrink = gl.exp2(peak - higher)
            fresh = gl.exp2(scores * factor - higher[:, None])
            total = total * shrink + gl.sum(fresh, 1)
            peak = higher
        # Nobody waits for it: the branch keeps the softmax and the wait in two basic blocks. In one, the assembler
        # waits first.
        if i + 1 == tiles:
            mbarrier.arrive(apart, count=1)
        acc = warpgroup_mma_wait(0, [product])
        mbarrier.arrive(v_free.index(done), count=1)
        if not FIXED:
            acc = _rescale(acc, gl.convert_layout(shrink, row_layout))
        weights = gl.convert_layout(fresh.to(v_ring.dtype), weight_layout)
    stage = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(stage), ((tiles - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, v_ring.index(stage).reshape([TILE, DV]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])

    if FIXED:
        total = gl.convert_layout(gl.sum(total, 1), stat_layout)
        if SINK:
            total += gl.exp2(sink(b, h, terms[0], terms[1], terms[2]) * LOG2E - peak)
        # NaN and 0 are marked too.
        gl.store(marks_ptr, gl.max(gl.where((total >= LEAST) & (total <= MOST), 0, 1), 0))
    # total is 0 where nothing was visible, and NaN where the input was: that one must show.
    acc = acc * gl.convert_layout(gl.where(total == 0.0, 0.0, 1.0 / total), row_layout)[:, None]
    result = gl.convert_layout(acc.to(o_ptr.dtype.element_ty), store_layout)
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, store_layout))[:, None]
    column = gl.arange(0, DV, gl.SliceLayout(0, store_layout))[None, :]
    o_row = o_ptr + b.to(gl.int64) * o_strides[0] + h.to(gl.int64) * o_strides[1] + first.to(gl.int64) * o_strides[2]
    gl.store(o_row + lane * o_strides[2] + column, result, mask=(first + lane < q_len) & (column < VALUE_DIM))
    if LSE:
        here = first + gl.arange(0, ROWS, stat_layout)
        gl.store(
            lse_ptr + (b * heads + h).to(gl.int64) * q_len + here,
            (peak + gl.log2(total)) * 0.6931471805599453,
            mask=here < q_len,
        )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["rows", "q_len", "kv_len", "width"])
def attend(
    q_desc,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    marks_ptr,
    indices_ptr,
    counts_ptr,
    o_strides,
    rows,
    heads,
    group,
    q_len,
    kv_len,
    width,
    scale,
    tensors,
    layouts,
    scalars,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LSE: gl.constexpr,
    PACKED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Grid (rows * B * H,). scale: softmax scale, times log2(e) unless MODIFIED; positive. o_strides: (batch, head,
    token). PACKED: as in ``portable.py``.

    k_desc, v_desc: boxes of [TILE, whole width], or of [BLOCK_K, BOX] where a tile is several blocks. lse: fp32 [B, H,
    q_len], natural log.
    marks: int32 [B, H, rows, CONSUMERS], written under FIXED: 1 where the output of 64 query rows is not to be used.
    """
    terms = (tensors, layouts, scalars)
    row = _row(rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, terms, TILE, PACKED)
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, TILE, DV], v_desc.layout)
    q_ready, apart = _barriers(1, 1).index(0), _barriers(1, CONSUMERS).index(0)
    k_ready, k_free, v_ready, v_free = (
        _barriers(STAGES, 1),
        _barriers(STAGES, CONSUMERS),
        _barriers(STAGES, 1),
        _barriers(STAGES, CONSUMERS),
    )
    fence_async_shared()
    rings = (k_ring, v_ring, k_ready, k_free, v_ready, v_free)
    mbarrier.expect(q_ready, q_desc.block_type.nbytes * CONSUMERS)
    for c in gl.static_range(CONSUMERS):
        load_tile(q_desc, [row[0], row[1], row[2] + c * ROWS, 0], q_ready, q_tiles.index(c))

    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_tiles,
                        q_ready,
                        apart,
                        rings,
                        o_ptr,
                        lse_ptr,
                        marks_ptr,
                        o_strides,
                        row,
                        heads,
                        q_len,
                        kv_len,
                        scale,
                        terms,
                        TILE,
                        STAGES,
                        LSE,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        q_tiles,
                        q_ready,
                        apart,
                        rings,
                        o_ptr,
                        lse_ptr,
                        marks_ptr,
                        o_strides,
                        row,
                        heads,
                        q_len,
                        kv_len,
                        scale,
                        terms,
                        TILE,
                        STAGES,
                        LSE,
                    ),
                ),
                (_produce, (k_desc, v_desc, rings, group, row, TILE, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_tiles,
                        q_ready,
                        apart,
                        rings,
                        o_ptr,
                        lse_ptr,
                        marks_ptr,
                        o_strides,
                        row,
                        heads,
                        q_len,
                        kv_len,
                        scale,
                        terms,
                        TILE,
                        STAGES,
                        LSE,
                    ),
                ),
                (_produce, (k_desc, v_desc, rings, group, row, TILE, STAGES)),
            ],
            [1],
            [24],
        )
