"""Block-sparse attention for Hopper in Gluon: programs that take one (query block, query head) after the other, warps with roles.

A producer warp walks a row's list from its end and fills a ring of K and V tiles by TMA. Each consumer warpgroup owns 64 query rows: it
issues the next tile's Q K^T before it turns the current scores into weights, and the product with V runs behind it. The tiles that the causal
line cuts are the last of the list, hence the first visited; later tiles skip the mask, unless it is more than causal (GENERAL); of those, tiles
between the two edges of a band skip it where it hides nothing there (EDGES). With fewer
programs than rows the producer is at the next row's tiles while the consumers write this one's output. Neighbouring rows run at the same time
and walk their lists in step, so that they meet in the L2 cache.

Tensors as in ``portable.py``; q, k, v arrive as rank-4 TMA descriptors (any 16-byte aligned strides; head dims are zero-filled to a power of
two). Rows that saw no key give 0 and a log-sum-exp of -inf. The structure follows FlashAttention-3 (arXiv 2407.08608).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

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
# Hidden scores are -inf and a row's peak starts at a finite FLOOR: their weights are exactly 0, also where a row has seen nothing yet (a large
# finite score would not do: scaled and subtracted from its own peak in one fused operation it leaves its rounding error, in the billions).
FLOOR = gl.constexpr(-1.0e30)
LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # query rows a consumer: one wgmma tile
CONSUMERS = gl.constexpr(BLOCK_Q.value // 64)
D = gl.constexpr(triton.next_power_of_2(HEAD_DIM.value))
DV = gl.constexpr(triton.next_power_of_2(VALUE_DIM.value))
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after triton 3.6


@gluon.jit
def _tile_start(index_ptr, listed, tile, TILE: gl.constexpr):
    """First key of list position ``tile`` (in tiles). listed: whether there is a list; BANDED: -1 for a list, else the first key."""
    SPLIT: gl.constexpr = BLOCK_K // TILE
    if BANDED:
        block = gl.load(index_ptr + tile // SPLIT, mask=listed < 0, other=0)
        return gl.where(listed < 0, block * BLOCK_K + (tile % SPLIT) * TILE, listed + tile * TILE)
    else:
        block = gl.load(index_ptr + tile // SPLIT, mask=listed, other=0)
        return gl.where(listed, block * BLOCK_K + (tile % SPLIT) * TILE, tile * TILE)


@gluon.jit
def _row(item, rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE: gl.constexpr):
    """Work item ``item``: (batch, query head, first query, its list, whether it has one, tiles, tiles that the causal line may cut)."""
    head_row = item // rows
    row = rows - 1 - item % rows  # heavy rows first
    first_row = row * BLOCK_Q
    # Blocks [0, whole) are visible to every row, blocks [reach, ...) to none.
    reach, whole = kv_len, kv_len
    if CAUSAL:
        before = offset(q_len, kv_len, tensors, layouts, scalars)
        reach = gl.minimum(kv_len, gl.minimum(first_row + BLOCK_Q, q_len) + before)
        whole = gl.minimum(kv_len, first_row + 1 + before)
    reach = gl.cdiv(gl.maximum(reach, 0), BLOCK_K)
    whole = gl.maximum(whole, 0) // BLOCK_K
    where = head_row.to(gl.int64) * rows + row
    count = gl.load(counts_ptr + where)
    index_ptr = indices_ptr + where * width
    listed = count >= 0
    blocks = gl.where(listed, count, reach)
    hard = blocks - gl.minimum(whole, blocks)
    if listed:
        # At most the last few listed blocks can be cut.
        hard = 0
        for t in gl.static_range((BLOCK_Q + BLOCK_K - 1) // BLOCK_K + 1):
            ends = gl.load(index_ptr + blocks - 1 - t, mask=t < blocks, other=0)
            hard += ((ends >= whole) & (t < blocks)).to(gl.int32)
    if BANDED:
        bottom = gl.minimum(gl.maximum(lowest(head_row // heads, first_row, q_len, kv_len, tensors, layouts, scalars), 0) // BLOCK_K, reach)
        blocks = gl.where(listed, count, reach - bottom)
        listed = gl.where(listed, -1, bottom * BLOCK_K)
    if GENERAL:
        hard = blocks
    return head_row // heads, head_row % heads, first_row, index_ptr, listed, blocks * (BLOCK_K // TILE), hard * (BLOCK_K // TILE)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free,
    items, rows, heads, group, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    past = 0  # tiles of earlier rows: ring positions run on
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, h, first_row, index_ptr, listed, tiles, _ = _row(item, rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE)
        hk = h // group
        for i in range(tiles):
            start = _tile_start(index_ptr, listed, tiles - 1 - i, TILE)
            stage = (past + i) % STAGES
            phase = ((past + i) // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            load_tile(k_desc, [b, hk, start, 0], k_ready.index(stage), k_ring.index(stage))
            if i == 0:
                mbarrier.wait(q_free, (turn & 1) ^ 1)
                mbarrier.expect(q_ready, q_desc.block_type.nbytes * CONSUMERS)
                for c in gl.static_range(CONSUMERS):
                    load_tile(q_desc, [b, h, first_row + c * ROWS, 0], q_ready, q_tiles.index(c))
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
            load_tile(v_desc, [b, hk, start, 0], v_ready.index(stage), v_ring.index(stage))
        past += tiles
        turn += (tiles > 0).to(gl.int32)


@gluon.jit
def _hide(scores, start, far, near, rows, b, h, q_len, kv_len, tensors, layouts, scalars, layout: gl.constexpr, TILE: gl.constexpr):
    """Scores with what the mask hides, and keys past the end, at -inf. Under EDGES nothing is hidden between keys ``far`` and ``near``."""
    kv = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))[None, :]
    if EDGES:
        if (start < far) | (start + TILE > near):
            seen = visible(b, h, rows[:, None], kv, q_len, kv_len, tensors, layouts, scalars) & (kv < kv_len)
            scores = gl.where(seen, scores, -float("inf"))
        return scores
    else:
        seen = visible(b, h, rows[:, None], kv, q_len, kv_len, tensors, layouts, scalars) & (kv < kv_len)
        return gl.where(seen, scores, -float("inf"))


@gluon.jit
def _modify(scores, start, scale, rows, b, h, q_len, kv_len, tensors, layouts, scalars, layout: gl.constexpr, TILE: gl.constexpr):
    """What enters the softmax, of products."""
    kv = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))[None, :]
    return score(scores * scale, b, h, rows[:, None], kv, q_len, kv_len, tensors, layouts, scalars)


@gluon.jit
def _advance(
    i, past, acc, peak, total, weights, q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, index_ptr, listed, tiles, far, near, rows,
    b, h, q_len, kv_len, scale, tensors, layouts, scalars, score_layout: gl.constexpr, out_layout: gl.constexpr,
    MASKED: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of tile i and their softmax, while the product of tile i - 1 with its V runs."""
    stage, phase = (past + i) % STAGES, ((past + i) // STAGES) & 1
    done, done_phase = (past + i - 1) % STAGES, ((past + i - 1) // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    blank = gl.zeros([ROWS, TILE], gl.float32, score_layout)
    keys = k_ring.index(stage).reshape([TILE, D]).permute((1, 0))
    scores = warpgroup_mma(q, keys, blank, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(done), done_phase)
    product = warpgroup_mma(weights, v_ring.index(done).reshape([TILE, DV]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    if MODIFIED:
        start = _tile_start(index_ptr, listed, tiles - 1 - i, TILE)
        scores = _modify(scores, start, scale, rows, b, h, q_len, kv_len, tensors, layouts, scalars, score_layout, TILE)
        scale = LOG2E
    if MASKED:
        start = _tile_start(index_ptr, listed, tiles - 1 - i, TILE)
        scores = _hide(scores, start, far, near, rows, b, h, q_len, kv_len, tensors, layouts, scalars, score_layout, TILE)
    higher = gl.maximum(peak, gl.max(scores, 1) * scale)
    shrink = gl.exp2(peak - higher)
    fresh = gl.exp2(scores * scale - higher[:, None])
    total = total * shrink + gl.sum(fresh, 1)
    acc = warpgroup_mma_wait(0, [product])
    mbarrier.arrive(v_free.index(done), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_layout))[:, None]
    weights = gl.convert_layout(fresh.to(v_ring.dtype), gl.DotOperandLayout(0, out_layout, 2))
    return acc, higher, total, weights


@gluon.jit
def _consume(
    consumer, q_tiles, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, o_ptr, lse_ptr, o_strides,
    items, block_rows, heads, q_len, kv_len, width, scale, indices_ptr, counts_ptr, tensors, layouts, scalars,
    TILE: gl.constexpr, STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (DV // 8) if DV < 256 else 1, min(DV // 8, 32)], [4, 1], [1, 0])
    q = q_tiles.reshape([ROWS, D])
    past = 0
    turn = 0
    item = gl.program_id(0)
    b, h, first_row, index_ptr, listed, tiles, cut = _row(
        item, block_rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE
    )
    while item < items:
        first_row += consumer * ROWS
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
        acc = gl.zeros([ROWS, DV], gl.float32, out_layout)
        peak = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, score_layout))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, score_layout))
        if SINK:
            logit = sink(b, h, tensors, layouts, scalars) * LOG2E
            peak = gl.maximum(peak, logit)
            total += gl.exp2(logit - peak)
        far, near = 0, kv_len
        if BANDED:
            far = lowest(b, gl.minimum(first_row + ROWS, q_len) - 1, q_len, kv_len, tensors, layouts, scalars)
            if CAUSAL:
                near = gl.minimum(kv_len, first_row + 1 + offset(q_len, kv_len, tensors, layouts, scalars))
        if tiles > 0:
            mbarrier.wait(q_ready, turn & 1)
            stage, phase = past % STAGES, (past // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            blank = gl.zeros([ROWS, TILE], gl.float32, score_layout)
            scores = warpgroup_mma(q, k_ring.index(stage).reshape([TILE, D]).permute((1, 0)), blank, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_free.index(stage), count=1)
            start = _tile_start(index_ptr, listed, tiles - 1, TILE)
            factor = scale
            if MODIFIED:
                scores = _modify(scores, start, scale, rows, b, h, q_len, kv_len, tensors, layouts, scalars, score_layout, TILE)
                factor = LOG2E
            scores = _hide(scores, start, far, near, rows, b, h, q_len, kv_len, tensors, layouts, scalars, score_layout, TILE)
            higher = gl.maximum(peak, gl.max(scores, 1) * factor)
            fresh = gl.exp2(scores * factor - higher[:, None])
            before, total = total, gl.sum(fresh, 1)
            if SINK:
                total += before * gl.exp2(peak - higher)
            peak = higher
            weights = gl.convert_layout(fresh.to(v_ring.dtype), gl.DotOperandLayout(0, out_layout, 2))
            for i in range(1, cut):
                acc, peak, total, weights = _advance(
                    i, past, acc, peak, total, weights, q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, index_ptr, listed, tiles, far, near, rows,
                    b, h, q_len, kv_len, scale, tensors, layouts, scalars, score_layout, out_layout, True, TILE, STAGES,
                )  # fmt: skip
            if not GENERAL:
                for i in range(gl.maximum(cut, 1), tiles):
                    acc, peak, total, weights = _advance(
                        i, past, acc, peak, total, weights, q, k_ring, v_ring, k_ready, k_free, v_ready, v_free, index_ptr, listed, tiles, far, near, rows,
                        b, h, q_len, kv_len, scale, tensors, layouts, scalars, score_layout, out_layout, False, TILE, STAGES,
                    )  # fmt: skip
            mbarrier.arrive(q_free, count=1)
            past += tiles
            turn += 1
            stage, phase = (past - 1) % STAGES, ((past - 1) // STAGES) & 1
            mbarrier.wait(v_ready.index(stage), phase)
            acc = warpgroup_mma(weights, v_ring.index(stage).reshape([TILE, DV]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(v_free.index(stage), count=1)

        # total is 0 where nothing was visible, and NaN where the input was: that one must show.
        factor = gl.where(total == 0.0, 0.0, 1.0 / total)
        acc = acc * gl.convert_layout(factor, row_layout)[:, None]
        result = gl.convert_layout(acc.to(o_ptr.dtype.element_ty), store_layout)
        lane = gl.arange(0, ROWS, gl.SliceLayout(1, store_layout))[:, None]
        column = gl.arange(0, DV, gl.SliceLayout(0, store_layout))[None, :]
        o_row = o_ptr + b.to(gl.int64) * o_strides[0] + h.to(gl.int64) * o_strides[1] + first_row.to(gl.int64) * o_strides[2]
        gl.store(o_row + lane * o_strides[2] + column, result, mask=(first_row + lane < q_len) & (column < VALUE_DIM))
        if LSE:
            gl.store(lse_ptr + (b * heads + h).to(gl.int64) * q_len + rows, (peak + gl.log2(total)) * 0.6931471805599453, mask=rows < q_len)
        item += gl.num_programs(0)
        following = gl.minimum(item, items - 1)
        b, h, first_row, index_ptr, listed, tiles, cut = _row(
            following, block_rows, heads, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE
        )


@gluon.jit(do_not_specialize=["items", "rows", "q_len", "kv_len", "width"])
def attend(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, indices_ptr, counts_ptr, o_strides, items, rows,
    heads, group, q_len, kv_len, width, scale, tensors, layouts, scalars,
    TILE: gl.constexpr, STAGES: gl.constexpr, LSE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid (at most items,), items = rows * B * H. scale: softmax scale, times log2(e) unless MODIFIED; positive. o_strides: (batch, head, token).

    lse: fp32 [B, H, q_len], natural log.
    """
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, TILE, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, TILE, DV], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()

    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (0, q_tiles.index(0), k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, o_ptr, lse_ptr, o_strides,
                        items, rows, heads, q_len, kv_len, width, scale, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE, STAGES, LSE)),
            (_consume, (1, q_tiles.index(1), k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, o_ptr, lse_ptr, o_strides,
                        items, rows, heads, q_len, kv_len, width, scale, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE, STAGES, LSE)),
            (_produce, (q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                        items, rows, heads, group, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE, STAGES)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (0, q_tiles.index(0), k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, o_ptr, lse_ptr, o_strides,
                        items, rows, heads, q_len, kv_len, width, scale, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE, STAGES, LSE)),
            (_produce, (q_desc, k_desc, v_desc, q_tiles, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                        items, rows, heads, group, q_len, kv_len, width, indices_ptr, counts_ptr, tensors, layouts, scalars, TILE, STAGES)),
        ], [1], [24])  # fmt: skip
