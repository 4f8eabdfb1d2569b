"""The words programs are written in: each table maps a short name to the Python text that it stands for.

Texts speak of q [b, h, n, d], k and v [b, their heads, m, their width], the absolute positions i of queries and j of
keys (int64, [n, 1] and [1, m] or as the grid spells them), ``start`` (the first query's position), ``padding``
[b, m] (True is a real key), ``docs`` [b, m] (document ids that only the run knows) and ``flag`` [n] (bool).
``{w}`` is a width in tokens and ``{low}`` the text of what hides a score. In every table the first entry is the
plainest: a failure shrinks towards it.
"""

from __future__ import annotations

ONES = "torch.ones(n, m, dtype=torch.bool, device=q.device)"

GRIDS = {
    "none": ("torch.arange(n, device=q.device)[:, None] + start", "torch.arange(m, device=q.device)[None, :]"),
    "unsqueeze": (
        "torch.arange(start, start + n, device=q.device).unsqueeze(-1)",
        "torch.arange(0, m, device=q.device).unsqueeze(0)",
    ),
    "view": ("torch.arange(n, device=q.device).view(-1, 1) + start", "torch.arange(m, device=q.device).view(1, -1)"),
    "four dimensions": (
        "torch.arange(n, device=q.device).reshape(1, 1, n, 1) + start",
        "torch.arange(m, device=q.device).reshape(1, 1, 1, m)",
    ),
    "expand": (
        "(torch.arange(n, device=q.device)[:, None] + start).expand(n, m)",
        "torch.arange(m, device=q.device).expand(n, m)",
    ),
    "cumsum": (
        "torch.ones(n, dtype=torch.long, device=q.device).cumsum(0)[:, None] - 1 + start",
        "torch.ones(m, dtype=torch.long, device=q.device).cumsum(0)[None] - 1",
    ),
    "int32": (
        "torch.arange(n, device=q.device, dtype=torch.int32)[:, None] + start",
        "torch.arange(m, device=q.device)[None].to(torch.int32).long()",
    ),
    "strided": (
        "torch.arange(0, 2 * n, 2, device=q.device)[:, None] // 2 + start",
        "torch.arange(m, device=q.device).permute(0)[None]",
    ),
}
"""Spellings of the positions of queries and of keys."""

CAUSAL = {
    "le": "j <= i",
    "ge": "i >= j",
    "lt": "torch.lt(j, i + 1)",
    "not gt": "~(j > i)",
    "logical_not": "torch.logical_not(torch.gt(j, i))",
    "difference": "(i - j) >= 0",
    "negated": "-j + i > -1",
    "where": "torch.where(j > i, False, True)",
    "tril": f"{ONES}.tril(start)",
    "triu": f"~{ONES}.triu(diagonal=start + 1)",
    "masked_fill": f"{ONES}.masked_fill(j > i, False)",
    "xor": "(j > i) ^ True",
    "twice": "2 * j <= 2 * i",
    "floats": "(i.float() - j.float()) >= 0",
    "fractions": "(i * 0.02 - j * 0.02) >= -0.001",
    "frames": "(i // {w}) >= (j // {w})",
    "shifted": "(i >> 4) >= (j >> 4)",
}
"""Spellings of "a key is not after its query"; the last two say so of whole frames."""

TERMS = {
    "window": "(j > i - {w})",
    "window by difference": "((i - j) < {w})",
    "window by abs": "((i - j).abs() <= {w})",
    "window by triu": f"{ONES}.triu(start - {{w}})",
    "window in fractions": "((i * 0.02 - j * 0.02) <= {w} * 0.02)",
    "window in bf16": "((i.to(torch.bfloat16) - j.to(torch.bfloat16)) <= {w})",
    "window of a tensor": "((i - j) < torch.tensor({w}.5, device=q.device))",
    "chunks": "(i // {w} == j // {w})",
    "chunks by division": '(torch.div(i, {w}, rounding_mode="floor") == torch.floor_divide(j, {w}))',
    "chunks by shift": "((i >> 5) == (j >> 5))",
    "stripes": "((j % 4 != 3) | (j == i))",
    "sinks and a window": "((j < 2) | (j >= i - {w}))",
    "clamped": "(torch.clamp(j, max={w}) <= torch.maximum(i, torch.tensor({w}, device=q.device)))",
    "selected": "torch.where(j < 6, i >= 0, j > i - {w})",
    "half": "((j <= n // 2) | (j > i - {w}))",
    "quarter": "((j >= n // 4) | (j > i - {w}))",
    "part": "((j < int(n * 0.25)) | (j > i - {w}))",
    "root": "((i - j) <= int(math.sqrt(n)))",
    "padding": "padding[:, None, None, :]",
    "padding as integers": "(padding.long() == 1).view(b, 1, 1, m)",
    "padding negated": "~(padding == 0)[:, None, None]",
    "documents": "(docs[:, None, start : start + n, None] == docs[:, None, None, :])",
    "row flags": "(flag[:, None] | (j > i - {w}))",
    "row flags by where": "(j > i - {w}).where(flag[:, None], torch.tensor(True, device=q.device))",
    "given": "given",
}
"""What else a mask may say. True is visible."""

POSITIONAL = tuple(t for t in TERMS if not t.startswith(("padding", "documents", "row", "given")))
"""Terms that depend on positions alone."""
ABSOLUTE = (
    *("stripes", "chunks", "chunks by division", "chunks by shift", "sinks and a window", "clamped", "selected"),
    *("half", "quarter", "part", "padding", "padding as integers", "padding negated", "documents", "row flags"),
    *("row flags by where", "given", "frames", "shifted", "window in fractions", "window in bf16"),
)
"""Terms and causal spellings that mean another thing when all positions are moved; the last two by their rounding."""

OF_THE_CALL = (
    *("half", "quarter", "part", "root", "padding", "padding as integers", "padding negated", "documents"),
    *("row flags", "row flags by where", "given", "logarithm of the length"),
)
"""Terms and scores that depend on the number of queries of a call, or on inputs that a chunk would have to cut."""

JOINS = {
    "and": "{a} & {b}",
    "logical_and": "torch.logical_and({a}, {b})",
    "product": "{a} * {b}",
    "de morgan": "~(~({a}) | ~({b}))",
    "where": "torch.where({b}, {a}, False)",
    "xor": "({a}) ^ (({a}) & ~({b}))",
    "minimum": "torch.minimum({a}, {b})",
}
"""Ways to say that both hold."""

PREFIXES = {"none": "{a}", "prefix": "({a}) | (j < {w})", "prefix with maximum": "torch.logical_or({a}, j < {w})"}
"""Keys that every query sees, whatever the causal order."""

LOWS = {
    "infinity": 'float("-inf")',
    "lowest": "torch.finfo(torch.{dtype}).min",
    "ten thousand": "-10000.0",
    "billion": "-1e9",
}
"""What stands for "hidden" in a score. The last does not exist in fp16."""

BIASES = {
    "where": "torch.where(mask, 0.0, {low}).to(q.dtype)",
    "masked_fill": "torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, {low})",
    "multiplied": "(1.0 - mask.to(q.dtype)) * {low}",
    "subtracted": "(mask.to(q.dtype) - 1) * -({low})",
    "logarithm": "mask.to(q.dtype).log()",
}
"""A Boolean mask as what is added to scores. Two of them give NaN for infinity, which the writer avoids."""

FILLS = {
    "masked_fill": "scores.masked_fill(~mask, {low})",
    "where": "torch.where(mask, scores, {low})",
    "method where": "scores.where(mask, torch.tensor({low}, dtype=scores.dtype, device=q.device))",
    "in place": "scores.masked_fill_(~mask, {low})",
    "not equal": "scores.masked_fill(mask == 0, {low})",
    "multiplied": "scores * mask.to(scores.dtype) - 10000.0 * (1 - mask.to(scores.dtype))",
}
"""A mask applied to scores, where no bias is added."""

SCALES = {
    "after": ("", " * {s}"),
    "divided": ("", " / math.sqrt(d)"),
    "queries": ("q = q * {s}", ""),
    "queries and keys": ("q, k = q * {r}, k * {r}", ""),
    "keys divided": ("k = k / math.sqrt(d)", ""),
    "none": ("", ""),
}
"""Where the scale stands: (a line before the product, text behind it)."""

SCORES = {
    "softcap": "20.0 * torch.tanh(scores / 20.0)",
    "clamp": "scores.clamp(-6, 6)",
    "nan_to_num": "torch.nan_to_num(scores)",
    "alibi": "scores + (2.0 ** -torch.arange(1.0, h + 1, device=q.device)).view(h, 1, 1) * (j - i)",
    "alibi of keys": "scores + (2.0 ** -torch.arange(1.0, h + 1, device=q.device)).view(h, 1, 1) * j",
    "alibi in the dtype": (
        "scores + (2.0 ** -torch.arange(1.0, h + 1, device=q.device)).view(h, 1, 1).to(q.dtype) * (j - i).to(q.dtype)"
    ),
    "distance": "scores - 0.25 * (i - j).abs()",
    "table": "scores + table[(i - j).clamp(0, 31).reshape(n, m)].permute(2, 0, 1)",
    "decay added": "scores + torch.exp((j - i) / 20.0)",
    "decay multiplied": "scores * torch.exp((j - i) / 20.0)",
    "gaussian": "scores + torch.exp(-(((i - j) / 20.0) ** 2))",
    "reciprocal": "scores / (1 + (i - j).clamp(min=0))",
    "row temperature": "scores / (i + 1)",
    "logarithm of rows": "scores * torch.log(i + 2.0)",
    "logarithm of the length": "scores * (1.5 / math.log(n + 2))",
    "sign": "scores + 0.5 * ((i % 2) == 0)",
}
"""What happens to scores between the product and the mask."""

BY_HEAD = ("alibi", "alibi of keys", "alibi in the dtype", "table")
"""Scores that mean another thing when heads change places."""
SHIFTED = ("alibi of keys", "row temperature", "logarithm of rows", "sign")
"""Scores that mean another thing when all positions are moved."""

SINKS = {
    "none": "",
    "last column": "torch.cat([scores, sink.view(1, h, 1, 1).expand(b, h, n, 1).to(scores.dtype)], dim=-1)",
    "first column": "torch.cat([sink.view(1, h, 1, 1).expand(b, h, n, 1).to(scores.dtype), scores], dim=-1)",
}
"""A learnt logit a head that takes weight and gives no value."""

SOFTMAX = {
    "method": ("weights = scores.softmax(-1)",),
    "functional": ("weights = F.softmax(scores, dim=-1)",),
    "float": ("weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)",),
    "type_as": ("weights = F.softmax(scores.float(), dim=-1).type_as(q)",),
    "exponential": (
        "weights = torch.exp(scores - scores.amax(-1, keepdim=True))",
        "weights = weights / weights.sum(-1, keepdim=True)",
    ),
    "log_softmax": ("weights = F.log_softmax(scores, dim=-1).exp()",),
    "logsumexp": ("weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()",),
    "after the maximum": (
        "scores = scores - scores.max(dim=-1, keepdim=True).values",
        "weights = torch.softmax(scores, dim=-1)",
    ),
}

PRODUCTS = {
    "matmul": ("torch.matmul(q, k.transpose(-1, -2))", "torch.matmul(weights, v)"),
    "@": ("q @ k.mT", "weights @ v"),
    "permute": ("torch.matmul(q, k.permute(0, 1, 3, 2))", "weights.matmul(v)"),
    "einsum": ('torch.einsum("bhid,bhjd->bhij", q, k)', 'torch.einsum("bhij,bhjd->bhid", weights, v)'),
    "einsum of other letters": ('torch.einsum("xyqc,xykc->xyqk", q, k)', 'torch.einsum("xyqk,xykc->xyqc", weights, v)'),
    "einsum with dots": ('torch.einsum("...id,...jd->...ij", q, k)', 'torch.einsum("...ij,...jd->...id", weights, v)'),
}
"""(scores, output) of attention written out over [b, h, n, d]."""

REPEATS = {
    "repeat_interleave": "{x}.repeat_interleave(h // {x}.shape[1], 1)",
    "expand": "{x}[:, :, None].expand(b, {x}.shape[1], h // {x}.shape[1], m, -1).reshape(b, h, m, -1)",
    "index": "{x}[:, torch.arange(h, device=q.device) // (h // {x}.shape[1])]",
}
"""Key and value heads as many as query heads."""

DTYPES = ("float32", "bfloat16", "float16")
SPELLINGS = (
    *("sdpa", "sdpa with a bias", "matmul", "@", "permute", "einsum", "einsum of other letters", "einsum with dots"),
    *("bmm", "baddbmm", "grouped einsum", "shared key", "flex", "nn.MultiheadAttention"),
)
CACHES = ("none", "prefix", "static", "static in place")
LAYOUTS = ("bhnd", "bnhd", "fused", "three dimensions")
RESULTS = ("heads", "merged")
RELATIONS = ("dense", "selection", "heads", "batch", "groups", "hidden", "shift", "chunks")
