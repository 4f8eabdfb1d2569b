"""Block scores under max pooling for Hopper in Gluon: the cell product of ``cells.py`` with warps in roles, where tiles
come by TMA.

A producer warp fills a ring of tiles of Q and K: one slot of the groups, STEP elements wide. Each consumer warpgroup
owns 64 cell rows of a tile and multiplies both operands from shared memory, asynchronously. The programs are
persistent: while one consumer reduces its cells to one number a block pair, the others and the producer are at work on
what follows. A tile of 192 x 256 cells reads less from the L2 cache than 128 x 256 (which 132 multiprocessors at full
rate would exhaust). Only tiles that hold a block pair whose score is read are visited: those below the causal line,
less the local blocks that are kept whatever their score. They are numbered in bands of row tiles, column after column,
so that programs that run at the same time read the same tiles. Under SCALED the operands are the fp8 copies of
``quantize.py``, at twice the matrix rate.
"""

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
STRIDE = gl.constexpr(16)
LOCALS = gl.constexpr(4)
CAUSAL = gl.constexpr(True)


@gluon.jit
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


# generated: end
CELLS_Q = gl.constexpr(BLOCK_Q.value // STRIDE.value)
CELLS_K = gl.constexpr(BLOCK_K.value // STRIDE.value)
ROWS = gl.constexpr(64)  # cell rows a consumer: one wgmma tile
BAND = gl.constexpr(12)  # row tiles a band
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after triton 3.6


@gluon.jit
def _reach(row_tile, first_row, q_len, before, column_tiles, HEIGHT: gl.constexpr, COLUMNS: gl.constexpr):
    """Column tiles that row tile ``row_tile`` needs: [0, reach)."""
    reach = column_tiles
    if CAUSAL:
        limit = gl.minimum(first_row * BLOCK_Q + (row_tile + 1) * (HEIGHT * STRIDE), q_len) + before - LOCALS * BLOCK_K
        reach = gl.minimum(gl.cdiv(gl.maximum(limit, 0), COLUMNS * STRIDE), column_tiles)
    return reach


@gluon.jit
def _tile(spot, first_row, q_len, before, row_tiles, column_tiles, HEIGHT: gl.constexpr, COLUMNS: gl.constexpr):
    """(row tile, column tile) of a head's tile number ``spot``."""
    first = 0
    low = _reach(first, first_row, q_len, before, column_tiles, HEIGHT, COLUMNS)
    size = 0
    for i in gl.static_range(BAND):
        size += gl.where(i < row_tiles, _reach(i, first_row, q_len, before, column_tiles, HEIGHT, COLUMNS), 0)
    while spot >= size:
        spot -= size
        first += BAND
        low = _reach(first, first_row, q_len, before, column_tiles, HEIGHT, COLUMNS)
        size = 0
        for i in gl.static_range(BAND):
            size += gl.where(
                first + i < row_tiles, _reach(first + i, first_row, q_len, before, column_tiles, HEIGHT, COLUMNS), 0
            )
    # The columns that the whole band needs, then what the lower rows need beyond.
    height = gl.minimum(row_tiles - first, BAND)
    row, column = first + spot % height, spot // height
    rest = spot - low * height
    beyond = rest >= 0
    for i in gl.static_range(1, BAND):
        more = gl.where(i < height, _reach(first + i, first_row, q_len, before, column_tiles, HEIGHT, COLUMNS) - low, 0)
        here = beyond & (rest >= 0) & (rest < more)
        row, column = gl.where(here, first + i, row), gl.where(here, low + rest, column)
        rest -= more
    return row, column


@gluon.jit
def _load(desc, last, b, h, slot, first, chunk, tail, ready, place, RAGGED: gl.constexpr):
    """Fetch a tile of groups ``first``...; under RAGGED those from ``tail`` on lie in the copy that ``last``
    describes."""
    if RAGGED:
        if first >= tail:
            load_tile(last, [b, h, slot, first - tail, chunk], ready, place)
        else:
            load_tile(desc, [b, h, slot, first, chunk], ready, place)
    else:
        load_tile(desc, [b, h, slot, first, chunk], ready, place)


@gluon.jit
def _produce(
    q_desc,
    k_desc,
    q_last,
    k_last,
    q_ring,
    k_ring,
    ready,
    free,
    items,
    tiles,
    heads,
    group,
    first_row,
    row_tiles,
    column_tiles,
    q_tail,
    k_tail,
    q_len,
    before,
    CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    RAGGED: gl.constexpr,
    SCALED: gl.constexpr,
):
    HEIGHT: gl.constexpr = ROWS * CONSUMERS
    CHUNKS: gl.constexpr = (HEAD_DIM + STEP - 1) // STEP
    stage, phase = 0, 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        head_row = item // tiles
        b, h = head_row // heads, head_row % heads
        row_tile, column_tile = _tile(item % tiles, first_row, q_len, before, row_tiles, column_tiles, HEIGHT, COLUMNS)
        m, n = row_tile * HEIGHT, column_tile * COLUMNS
        if not SCALED:  # a copy holds this call's rows
            m += first_row * CELLS_Q
        for i in range(STRIDE * CHUNKS):
            slot = i // CHUNKS
            chunk = (i % CHUNKS) * STEP
            mbarrier.wait(free.index(stage), phase)
            mbarrier.expect(ready.index(stage), q_desc.block_type.nbytes * CONSUMERS + k_desc.block_type.nbytes)
            for c in gl.static_range(CONSUMERS):
                group_q = m + c * ROWS
                _load(
                    q_desc,
                    q_last,
                    b,
                    h,
                    slot,
                    group_q,
                    chunk,
                    q_tail,
                    ready.index(stage),
                    q_ring.index(stage * CONSUMERS + c),
                    RAGGED and not SCALED,
                )
            _load(
                k_desc,
                k_last,
                b,
                h // group,
                STRIDE - 1 - slot,
                n,
                chunk,
                k_tail,
                ready.index(stage),
                k_ring.index(stage),
                RAGGED and not SCALED,
            )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consume(
    consumer,
    q_ring,
    k_ring,
    ready,
    free,
    value_ptr,
    q_scale_ptr,
    k_scale_ptr,
    scores_ptr,
    items,
    tiles,
    heads,
    group,
    rows,
    first_row,
    columns,
    row_tiles,
    column_tiles,
    q_len,
    kv_len,
    before,
    scale,
    CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    RAGGED: gl.constexpr,
    SCALED: gl.constexpr,
):
    HEIGHT: gl.constexpr = ROWS * CONSUMERS
    STEPS: gl.constexpr = STRIDE * ((HEAD_DIM + STEP - 1) // STEP)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(COLUMNS, 128), 32 if SCALED else 16]
    )
    HIGH: gl.constexpr = ROWS // CELLS_Q
    WIDE: gl.constexpr = COLUMNS // CELLS_K
    store_layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    stage, phase = 0, 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        cells = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
        for i in range(STEPS):
            mbarrier.wait(ready.index(stage), phase)
            q = q_ring.index(stage * CONSUMERS + consumer).reshape([ROWS, STEP])
            k = k_ring.index(stage).reshape([COLUMNS, STEP]).permute((1, 0))
            cells = warpgroup_mma(q, k, cells, use_acc=i > 0, is_async=True)
            cells = warpgroup_mma_wait(1, [cells])
            if i > 0:
                mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        cells = warpgroup_mma_wait(0, [cells])
        mbarrier.arrive(free.index((stage + STAGES - 1) % STAGES), count=1)

        head_row = item // tiles
        row_tile, column_tile = _tile(item % tiles, first_row, q_len, before, row_tiles, column_tiles, HEIGHT, COLUMNS)
        share = 1.0 / STRIDE
        m, n = first_row * CELLS_Q + row_tile * HEIGHT + consumer * ROWS, column_tile * COLUMNS
        if RAGGED:  # noqa: SIM102 (decided when it is compiled)
            if ((m + ROWS) * STRIDE > q_len) | ((n + COLUMNS) * STRIDE > kv_len):
                # Groups are cut only at the end: q's holds its first tokens, k's reversed its last slots.
                q_here = gl.minimum(
                    gl.maximum(q_len - (m + gl.arange(0, ROWS, gl.SliceLayout(1, layout))) * STRIDE, 0), STRIDE
                )
                k_here = gl.minimum(
                    gl.maximum(kv_len - (n + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))) * STRIDE, 0), STRIDE
                )
                pairs = (q_here[:, None] + k_here[None, :] - STRIDE).to(gl.float32)
                cells = gl.where(pairs > 0, cells * (STRIDE / gl.maximum(pairs, 1.0)), -float("inf"))
        best = gl.max(gl.reshape(cells, [ROWS, WIDE, CELLS_K]), 2)
        best = gl.max(gl.reshape(best, [HIGH, CELLS_Q, WIDE]), 1)
        best = gl.convert_layout(best, store_layout)
        if RAGGED:
            best = gl.where(best > -float("inf"), best, 0.0)
        row = row_tile * (HEIGHT // CELLS_Q) + consumer * HIGH + gl.arange(0, HIGH, gl.SliceLayout(1, store_layout))
        block = column_tile * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, store_layout))
        b, h = head_row // heads, head_row % heads
        key_block = (b * (heads // group) + h // group) * columns + block
        value = gl.load(value_ptr + key_block, mask=block < columns, other=0.0)
        if SCALED:
            q_scale = gl.load(q_scale_ptr + head_row * rows + row, mask=row < rows, other=0.0)
            k_scale = gl.load(k_scale_ptr + key_block, mask=block < columns, other=0.0)
            best = best * q_scale[:, None] * k_scale[None, :]
        out = scores_ptr + (head_row.to(gl.int64) * rows + row)[:, None] * columns + block[None, :]
        gl.store(out, best * (scale * share) + value[None, :], mask=(row < rows)[:, None] & (block < columns)[None, :])


@gluon.jit(
    do_not_specialize=[
        "items",
        "tiles",
        "rows",
        "first_row",
        "columns",
        "row_tiles",
        "column_tiles",
        "q_len",
        "kv_len",
        "q_tail",
        "k_tail",
    ]
)
def peak(
    q_desc,
    k_desc,
    q_last,
    k_last,
    value_ptr,
    q_scale_ptr,
    k_scale_ptr,
    scores_ptr,
    items,
    tiles,
    row_tiles,
    column_tiles,
    q_tail,
    k_tail,
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
    CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    RAGGED: gl.constexpr,
    SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Grid (at most items,), items = tiles * B * H, tiles those of one head. scores: fp32 [B, H, rows, columns] from
    ``first_row`` on.

    q_desc, k_desc: descriptors of [B, H or Hk, STRIDE, groups, d] with [1, 1, 1, 64 or COLUMNS, STEP] tiles. RAGGED:
    some group is cut by the end; q_last and k_last then describe copies of the groups from q_tail and k_tail on, with
    zeros past the end. SCALED: q_desc describes an fp8 copy of the rows from ``first_row`` on and k_desc one of all
    keys, both whole, with fp32 scales [B, H, rows] and [B, Hk, columns].
    """
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [STAGES * CONSUMERS, 1, 1, 1, ROWS, STEP], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 1, COLUMNS, STEP], k_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    fence_async_shared()
    before = offset(q_len, kv_len, tensors, layouts, scalars)

    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        value_ptr,
                        q_scale_ptr,
                        k_scale_ptr,
                        scores_ptr,
                        items,
                        tiles,
                        heads,
                        group,
                        rows,
                        first_row,
                        columns,
                        row_tiles,
                        column_tiles,
                        q_len,
                        kv_len,
                        before,
                        scale,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        value_ptr,
                        q_scale_ptr,
                        k_scale_ptr,
                        scores_ptr,
                        items,
                        tiles,
                        heads,
                        group,
                        rows,
                        first_row,
                        columns,
                        row_tiles,
                        column_tiles,
                        q_len,
                        kv_len,
                        before,
                        scale,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
                (
                    _consume,
                    (
                        2,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        value_ptr,
                        q_scale_ptr,
                        k_scale_ptr,
                        scores_ptr,
                        items,
                        tiles,
                        heads,
                        group,
                        rows,
                        first_row,
                        columns,
                        row_tiles,
                        column_tiles,
                        q_len,
                        kv_len,
                        before,
                        scale,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
                (
                    _produce,
                    (
                        q_desc,
                        k_desc,
                        q_last,
                        k_last,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        items,
                        tiles,
                        heads,
                        group,
                        first_row,
                        row_tiles,
                        column_tiles,
                        q_tail,
                        k_tail,
                        q_len,
                        before,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        0,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        value_ptr,
                        q_scale_ptr,
                        k_scale_ptr,
                        scores_ptr,
                        items,
                        tiles,
                        heads,
                        group,
                        rows,
                        first_row,
                        columns,
                        row_tiles,
                        column_tiles,
                        q_len,
                        kv_len,
                        before,
                        scale,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
                (
                    _consume,
                    (
                        1,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        value_ptr,
                        q_scale_ptr,
                        k_scale_ptr,
                        scores_ptr,
                        items,
                        tiles,
                        heads,
                        group,
                        rows,
                        first_row,
                        columns,
                        row_tiles,
                        column_tiles,
                        q_len,
                        kv_len,
                        before,
                        scale,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
                (
                    _produce,
                    (
                        q_desc,
                        k_desc,
                        q_last,
                        k_last,
                        q_ring,
                        k_ring,
                        ready,
                        free,
                        items,
                        tiles,
                        heads,
                        group,
                        first_row,
                        row_tiles,
                        column_tiles,
                        q_tail,
                        k_tail,
                        q_len,
                        before,
                        CONSUMERS,
                        COLUMNS,
                        STEP,
                        STAGES,
                        RAGGED,
                        SCALED,
                    ),
                ),
            ],
            [4, 1],
            [240, 40],
        )
