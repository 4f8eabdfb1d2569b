"""Turn a row of block scores into its list (``tpd.py``): budget in integers, threshold by bisection over the scores'
bits, no sort.

A float's bits, with the sign folded, order as unsigned integers. Between the lowest and the highest score a threshold
is sought that exactly
``limit`` blocks reach; where ties leave none, those at the threshold go to the earlier blocks. A prefix sum writes the
chosen in ascending order.
"""

import triton
import triton.language as tl

# generated: begin
BLOCK_Q = tl.constexpr(128)
BLOCK_K = tl.constexpr(128)
CAUSAL = tl.constexpr(True)
BANDED = tl.constexpr(False)
SINKS = tl.constexpr(4)
LOCALS = tl.constexpr(4)
SLACK = tl.constexpr(2)
PROMPT_BLOCKS = tl.constexpr(0)
KEPT = tl.constexpr(512)
COVERED = tl.constexpr(False)
COVERAGE = tl.constexpr(1.0)


@triton.jit
def offset(q_len, kv_len, tensors, layouts, scalars):
    return 0


@triton.jit
def lowest(b, q, q_len, kv_len, tensors, layouts, scalars):
    return 0


@triton.jit
def row_budget(row, blocks):
    return blocks


# generated: end
GUESSES = tl.constexpr(
    16
)  # halvings between scores, which lie close to evenly, before those between their bits, which end


@triton.jit
def _key(score):
    """uint32 that orders like ``score``."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _score(key):
    """The float of ``_key``."""
    bits = key.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _before_last(row, first, q_len, kv_len, before):
    """Bool [NB]: key blocks with a key up to the causal limit of ``row``. first: int32 [NB], the block's first visible
    key."""
    possible = first < kv_len
    if CAUSAL:
        possible = possible & (first <= tl.minimum((row + 1) * BLOCK_Q, q_len) - 1 + before)
    return possible


@triton.jit
def _reach(row, first, q_len, kv_len, before, PADDED: tl.constexpr):
    """How many blocks ``row`` would see without the mask's far edges."""
    if PADDED:
        return tl.sum(_before_last(row, first, q_len, kv_len, before).to(tl.int32), 0)
    else:
        end = kv_len
        if CAUSAL:
            end = tl.maximum(tl.minimum(tl.minimum((row + 1) * BLOCK_Q, q_len) + before, kv_len), 0)
        return tl.cdiv(end, BLOCK_K)


@triton.jit
def _row(
    row,
    b,
    h,
    j,
    rows,
    columns,
    q_len,
    kv_len,
    first_ptr,
    candidates_ptr,
    limits_ptr,
    first_stride,
    candidate_strides,
    limit_strides,
    tensors,
    layouts,
    scalars,
    PADDED: tl.constexpr,
    EXPLICIT: tl.constexpr,
):
    """(candidates [NB], how many, budget, whether the row computes them all) of a row of key blocks ``j``."""
    if EXPLICIT:
        candidates_ptr += b * candidate_strides[0] + h * candidate_strides[1] + row.to(tl.int64) * candidate_strides[2]
        candidate = tl.load(candidates_ptr + j * candidate_strides[3], mask=j < columns, other=0) != 0
        candidate_count = tl.sum(candidate.to(tl.int32), 0)
        limit = tl.load(limits_ptr + b * limit_strides[0] + h * limit_strides[1] + row * limit_strides[2])
        full = limit < 0
    else:
        first = tl.where(j < columns, j * BLOCK_K, kv_len)
        if PADDED:
            first = tl.load(first_ptr + b * first_stride + j, mask=j < columns, other=2147483647)
        before = offset(q_len, kv_len, tensors, layouts, scalars)
        candidate = _before_last(row, first, q_len, kv_len, before)
        reach = _reach(row, first, q_len, kv_len, before, PADDED)
        candidate_count = reach
        if BANDED:
            bottom = lowest(b.to(tl.int32), row * BLOCK_Q, q_len, kv_len, tensors, layouts, scalars)
            candidate = candidate & ((j + 1) * BLOCK_K > bottom)
            candidate_count = tl.sum(candidate.to(tl.int32), 0)
        # Sight grows from row to row: the last row's is the longest.
        total = tl.maximum(_reach(rows - 1, first, q_len, kv_len, before, PADDED), PROMPT_BLOCKS)
        earlier = tl.where(row >= SLACK, _reach(tl.maximum(row - SLACK, 0), first, q_len, kv_len, before, PADDED), 0)
        later = _reach(tl.minimum(row + SLACK, rows - 1), first, q_len, kv_len, before, PADDED)
        budget = row_budget(tl.maximum(reach - 1, 0).to(tl.int64), tl.maximum(total, 1).to(tl.int64))
        limit = tl.minimum(tl.maximum(budget, SINKS + LOCALS), candidate_count).to(tl.int32)
        # The row computes all it sees: within budget, or the prompt's end, where the question is (tpd.full_rows).
        enough = limit
        if COVERED:
            enough = limit * 0 + (SINKS + LOCALS)
        full = ((enough >= candidate_count) | ((earlier < reach) & (later <= reach) & (reach >= PROMPT_BLOCKS))) & (
            candidate_count > 0
        )
    return candidate, candidate_count, limit, full


@triton.jit(do_not_specialize=["first_row", "rows", "columns", "width", "q_len", "kv_len", "first_stride"])
def select(
    scores_ptr,
    first_ptr,
    candidates_ptr,
    limits_ptr,
    indices_ptr,
    counts_ptr,
    thresholds_ptr,
    first_stride,
    candidate_strides,
    limit_strides,
    pitch,
    heads,
    first_row,
    rows,
    columns,
    width,
    q_len,
    kv_len,
    tensors,
    layouts,
    scalars,
    NB: tl.constexpr,
    SCORED: tl.constexpr,
    PADDED: tl.constexpr,
    EXPLICIT: tl.constexpr,
    GIVEN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (rows of this chunk, B * H). scores: fp32 [B, H, chunk, pitch], of which ``columns`` count; indices: int32
    [B, H, rows, width]; counts: int32 [B, H, rows].

    first: int32 [B or 1, columns] under PADDED. NB: columns, padded to 2^n. Under EXPLICIT the mask's part is done:
    candidates: uint8 [B, H, rows, columns]; limits: int32 [B, H, rows], -1 for a full row; any strides, 0 to
    broadcast. GIVEN: counts are there already, and thresholds: int32 [B, H, rows], where to look first. PACKED:
    heads, padded to 2^n, where lists lie end to end, indices int32 [B, rows, H * width]; else 0.
    """
    row = first_row + tl.program_id(0)
    head_row = tl.program_id(1)
    b, h = (head_row // heads).to(tl.int64), (head_row % heads).to(tl.int64)
    j = tl.arange(0, NB)
    where = head_row.to(tl.int64) * rows + row
    candidate, candidate_count, limit, full = _row(
        row,
        b,
        h,
        j,
        rows,
        columns,
        q_len,
        kv_len,
        first_ptr,
        candidates_ptr,
        limits_ptr,
        first_stride,
        candidate_strides,
        limit_strides,
        tensors,
        layouts,
        scalars,
        PADDED,
        EXPLICIT,
    )
    if GIVEN:
        limit = tl.load(counts_ptr + where)
        full = limit < 0
    else:
        tl.store(counts_ptr + where, tl.where(full, -1, limit))
    place = where * width
    if PACKED > 0:
        other = tl.arange(0, PACKED)
        if GIVEN:
            lengths = tl.load(counts_ptr + (b * heads + other) * rows + row, mask=other < h, other=0)
        elif EXPLICIT:
            others = limits_ptr + b * limit_strides[0] + other * limit_strides[1] + row * limit_strides[2]
            lengths = tl.load(others, mask=other < h, other=0)
        else:
            lengths = tl.where(other < h, limit, 0)
        place = (b * rows + row) * (heads * width).to(tl.int64) + tl.sum(tl.maximum(lengths, 0), 0)
        width = heads * width
    if not full:
        rank = j + 1
        if EXPLICIT or PADDED or BANDED:
            rank = tl.cumsum(candidate.to(tl.int32), 0)
        forced = candidate & ((rank <= SINKS) | (rank > candidate_count - LOCALS))
        if SCORED:
            chunk_row = head_row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            score = tl.load(scores_ptr + chunk_row * pitch + j, mask=candidate, other=0.0)
            score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
        else:
            score = tl.zeros([NB], tl.float32)
        key = tl.minimum(tl.maximum(_key(score), 1), 0xFFFFFFFE)
        free = candidate & (forced == 0)
        wanted = limit - tl.sum(forced.to(tl.int32), 0)
        key = tl.where(free, key, 0)
        # At least ``wanted`` keys reach low, fewer reach high.
        low = tl.min(tl.where(free, key, 0xFFFFFFFF), 0)
        high = tl.max(key, 0) + 1
        reached = tl.sum(free.to(tl.int32), 0)
        if GIVEN:  # most heads end where the row's budget did
            middle = tl.load(thresholds_ptr + (b * heads + h) * rows + row).to(tl.uint32, bitcast=True)
            count = tl.sum((key >= middle).to(tl.int32), 0)
            enough = count >= wanted
            inside = (middle > low) & (middle < high)
            reached = tl.where(enough & inside, count, reached)
            high = tl.where(enough | (inside == 0), high, middle)
            low = tl.where(enough & inside, middle, low)
        step = 0
        while (reached != wanted) & (high - low > 1):
            middle = low + (high - low) // 2
            if step < GUESSES:
                guess = _key(0.5 * _score(low) + 0.5 * _score(high))
                middle = tl.where((guess > low) & (guess < high), guess, middle)
            count = tl.sum((key >= middle).to(tl.int32), 0)
            enough = count >= wanted
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            high = tl.where(enough, high, middle)
            step += 1
        listed = forced | (free & (key >= low))
        if reached != wanted:
            above = key > low
            tie = free & (key == low)
            spare = wanted - tl.sum(above.to(tl.int32), 0)
            listed = forced | above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= spare))
        slot = tl.cumsum(listed.to(tl.int32), 0) - 1
        tl.store(indices_ptr + place + slot, j, mask=listed & (slot < width))


@triton.jit
def _by_head(x):
    """Sums of x [heads, strips, lanes] over each head's columns."""
    return tl.sum(tl.sum(x, 1), 1)


@triton.jit(do_not_specialize=["first_row", "chunk", "rows", "columns", "q_len", "kv_len", "first_stride"])
def divide(
    scores_ptr,
    first_ptr,
    candidates_ptr,
    limits_ptr,
    counts_ptr,
    thresholds_ptr,
    first_stride,
    candidate_strides,
    limit_strides,
    pitch,
    heads,
    together,
    first_row,
    chunk,
    rows,
    columns,
    q_len,
    kv_len,
    tensors,
    layouts,
    scalars,
    NB: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    EXPLICIT: tl.constexpr,
):
    """How many blocks each head computes of a row (``sharing.py``). Grid (rows of this chunk, B * H / together).

    scores: fp32 [B, H, chunk, pitch]; counts, thresholds: int32 [B, H, rows], the second the key at which the row's
    budget ends. together: heads that share a budget. HEADS, NB: they and columns, padded to 2^n. The rest as
    ``select``'s.
    """
    row = first_row + tl.program_id(0)
    units = heads // together
    b, start = (tl.program_id(1) // units).to(tl.int64), tl.program_id(1) % units * together
    # Columns in strips: warps are dealt to the first dimension when the last is full, so that a warp owns whole heads
    # and counting crosses no warp.
    WIDE: tl.constexpr = min(NB, 128)
    STRIPS: tl.constexpr = NB // WIDE
    strip, lane = tl.arange(0, STRIPS)[None, :, None], tl.arange(0, WIDE)[None, None, :]
    j, i = strip * WIDE + lane, tl.arange(0, HEADS)
    if EXPLICIT:
        h = tl.minimum(start + i, heads - 1).to(tl.int64)
        possible = candidates_ptr + b * candidate_strides[0] + row.to(tl.int64) * candidate_strides[2]
        possible = possible + h[:, None, None] * candidate_strides[1] + j * candidate_strides[3]
        candidate = tl.load(possible, mask=(j < columns) & (i < together)[:, None, None], other=0) != 0
        limit = tl.load(limits_ptr + b * limit_strides[0] + h * limit_strides[1] + row * limit_strides[2])
        full = (limit < 0) | (i >= together)
    else:
        one, candidate_count, limit, full = _row(
            row,
            b,
            b,
            tl.arange(0, NB),
            rows,
            columns,
            q_len,
            kv_len,
            first_ptr,
            candidates_ptr,
            limits_ptr,
            first_stride,
            candidate_strides,
            limit_strides,
            tensors,
            layouts,
            scalars,
            PADDED,
            False,
        )
        limit = limit + i * 0
        full = full | (i >= together)
        candidate = j < candidate_count
        if PADDED or BANDED:
            candidate = tl.reshape(one, [1, STRIPS, WIDE])
    candidate = candidate & (full == 0)[:, None, None]
    if EXPLICIT or PADDED or BANDED:
        candidate_count = _by_head(candidate.to(tl.int32))
        strips = tl.sum(candidate.to(tl.int32), 2)
        rank = tl.cumsum(candidate.to(tl.int32), 2) + (tl.cumsum(strips, 1) - strips)[:, :, None]
        forced = candidate & ((rank <= SINKS) | (rank > (candidate_count - LOCALS)[:, None, None]))
        held = _by_head(forced.to(tl.int32))
    else:
        forced = candidate & ((j < SINKS) | (j >= candidate_count - LOCALS))
        held = tl.where(full, 0, tl.minimum(candidate_count, SINKS + LOCALS))
    free = candidate & (forced == 0)
    limit = tl.where(full, 0, limit)
    least = held
    if not COVERED:
        least = tl.minimum(tl.maximum(held, (limit * KEPT + 1023) // 1024), limit)
    total = tl.sum(limit, 0)
    head = (b * heads + start + i).to(tl.int64)
    first_head = (b * heads + start) * chunk + tl.program_id(0)  # offsets within a unit's scores are small
    place = scores_ptr + first_head * pitch + ((i * (chunk * pitch))[:, None, None] + j)
    score = tl.load(place, mask=candidate, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
    key = tl.where(free, tl.minimum(tl.maximum(_key(score), 1), 0xFFFFFFFE), 0)
    missing = 0.0
    if COVERED:
        weight = tl.where(candidate, tl.exp(score), 0.0)
        missing = COVERAGE * tl.sum(_by_head(weight), 0) - tl.sum(_by_head(tl.where(forced, weight, 0.0)), 0)
    number = tl.maximum(least, held)
    low = tl.cast(0, tl.uint32)
    if (tl.sum(number, 0) < total) & ((not COVERED) | (missing > 0.0)):
        # low is the highest threshold known to take enough: the budgets, or what covers; high takes less.
        low = tl.min(tl.min(tl.min(tl.where(key > 0, key, 0xFFFFFFFF), 1), 1), 0)
        high = tl.max(tl.max(tl.max(key, 1), 1), 0) + 1
        step = 0
        while high - low > 1:
            middle = low + (high - low) // 2
            if step < GUESSES:
                guess = _key(0.5 * _score(low) + 0.5 * _score(high))
                middle = tl.where((guess > low) & (guess < high), guess, middle)
            reached = key >= middle
            size = tl.sum(tl.maximum(least, held + _by_head(reached.to(tl.int32))), 0)
            enough = size >= total
            exact = size == total
            if COVERED:
                covered = tl.sum(_by_head(tl.where(reached, weight, 0.0)), 0)
                enough = enough | (covered >= missing)
                exact = False
            low = tl.where(enough, middle, low)
            high = tl.where(exact, low + 1, tl.where(enough, high, middle))
            step += 1
        number = tl.maximum(least, held + _by_head((key > low).to(tl.int32)))
        more = tl.maximum(least, held + _by_head((key >= low).to(tl.int32))) - number
        spare = total - tl.sum(number, 0)
        if COVERED:
            lack = missing - tl.sum(_by_head(tl.where(key > low, weight, 0.0)), 0)
            one_weight = tl.max(tl.max(tl.max(tl.where(key == low, weight, 0.0), 1), 1), 0)
            wanted = tl.ceil(tl.minimum(lack / tl.maximum(one_weight, 1e-38), 1.0e6)).to(tl.int32)
            spare = tl.minimum(spare, tl.maximum(wanted, 0))
        # Ties go to the earlier heads.
        taken = tl.cumsum(more, 0) - more
        number += tl.minimum(tl.maximum(spare - taken, 0), more)
    tl.store(counts_ptr + head * rows + row, tl.where(full, -1, number), mask=i < together)
    tl.store(thresholds_ptr + head * rows + row, low.to(tl.int32, bitcast=True), mask=i < together)
