"""A program as the script of a page that is run, kept and read: what is judged is this text, nothing else."""

from __future__ import annotations

import re

from stem_compile.testing.fuzz import vocabulary as words
from stem_compile.testing.fuzz.program import Attention, Program, Trial

_HEAD = '''"""{title}"""

import math

import torch
import torch.nn.functional as F
{imports}

class Model(torch.nn.Module):
'''
_TAIL = """


if __name__ == "__main__":
    from stem_compile.testing.fuzz import judge

    print(judge(Model, inputs, {arguments}))
"""


def script(trial: Trial, title: str = "A random program of attentions.") -> str:
    """Python that defines ``Model`` and ``inputs`` and, run as a file, prints the verdict on them."""
    program = trial.program
    writers = [_Attention(program, attention, number) for number, attention in enumerate(program.attentions)]
    needed = sorted({name for w in writers for name in w.needs}, key=_EXTRA.index)
    lines = [*_initial(trial, writers), *_forward(program, writers, needed, trial.relation == "shift")]
    for writer in writers:
        lines += ["", *writer.lines()]
    flex = "\nfrom torch.nn.attention.flex_attention import create_block_mask, flex_attention\n"
    imports = flex if any(a.spelling == "flex" for a in program.attentions) else ""
    body = "\n".join(f"    {line}".rstrip() for line in lines)
    return (
        _HEAD.format(title=title, imports=imports)
        + body
        + "\n\n\n"
        + "\n".join(_inputs(program, needed, trial.seed))
        + _TAIL.format(arguments=arguments_text(trial))
    )


def arguments(trial: Trial) -> dict[str, object]:
    """Arguments of ``judge`` beside the script's own ``Model`` and ``inputs``."""
    given: dict[str, object] = {
        "relation": trial.relation,
        "options": trial.options,
        "lengths": (trial.length, trial.again) if trial.again else (trial.length,),
    }
    if trial.dynamic:
        given["dynamic"] = True
    return given


def arguments_text(trial: Trial) -> str:
    """The same as text."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments(trial).items())


_EXTRA = ("padding", "docs", "flag", "given", "table", "sink")
"""Inputs beside queries, keys and values, in the order of the arguments."""


def _initial(trial: Trial, writers: list[_Attention]) -> list[str]:
    lines = [f"attentions = {len(writers)}"]
    if any(w.attention.spelling == "flex" for w in writers):
        # It compiles itself, which no mode may watch.
        lines.append("watched = False")
    modules = [w.number for w in writers if w.attention.spelling == "nn.MultiheadAttention"]
    if trial.relation != "shift" and not modules:
        return [*lines, ""]
    lines += ["", "def __init__(self, shift=0):", "    super().__init__()", "    self.shift = shift"]
    width = trial.program.heads * trial.program.head_dim
    for number in modules:
        lines.append(
            f"    self.module{number} = torch.nn.MultiheadAttention({width}, {trial.program.heads}, batch_first=True)"
            f".to(torch.{trial.program.dtype})"
        )
    return [*lines, ""]


def _parameters(program: Program) -> list[str]:
    first = ["x"] if program.layout == "fused" else ["q", "k", "v"]
    if program.cache == "none":
        return first
    return first + (["past_k", "past_v"] if program.cache == "prefix" else ["cache_k", "cache_v"])


def _forward(program: Program, writers: list[_Attention], needed: list[str], shifted: bool) -> list[str]:
    takes = ", ".join(["self", *_parameters(program), *needed, "selected=None", "shown=None"])
    body = []
    if program.layout == "fused":
        sizes = [
            program.heads * program.head_dim,
            program.key_heads * program.head_dim,
            program.value_heads * program.value_dim,
        ]
        body.append(f"q, k, v = x.split({sizes}, dim=-1)")
        for name, width in (("q", program.head_dim), ("k", program.head_dim), ("v", program.value_dim)):
            body.append(f"{name} = {name}.unflatten(-1, (-1, {width})).transpose(1, 2)")
    elif program.layout == "bnhd":
        body.append("q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)")
    if program.cache == "prefix":
        body.append("k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)")
    elif program.cache != "none":
        body.append(f"places = torch.arange({program.past}, {program.past} + q.shape[2], device=q.device)")
        copied = "index_copy_" if program.cache == "static in place" else "index_copy"
        body.append(f"k, v = cache_k.{copied}(2, places, k), cache_v.{copied}(2, places, v)")
    start = {"none": "0", "prefix": "past_k.shape[2]"}.get(program.cache, str(program.past))
    rows, keys = words.GRIDS[program.grid]
    if program.layout == "three dimensions":
        body += ["b, n, d = q.shape", "h, m = 1, k.shape[1]"]
    else:
        body += ["b, h, n, d = q.shape", "m = k.shape[2]"]
    body += [f"start = {start}", f"i = {rows}", f"j = {keys}"]
    if shifted:
        body.append("i, j = i + self.shift, j + self.shift")
    body.append("outputs = []")
    chained = program.value_dim == program.head_dim
    for writer in writers:
        passed = ", ".join(["q", "k", "v", "i", "j", "start", *(n for n in needed if n in writer.needs)])
        body.append(f"out = self.attend{writer.number}({passed}, selected=selected, shown=shown)")
        body.append(f"outputs.append({_result(program)})")
        if chained and writer is not writers[-1]:
            body.append("q = q + out")
    body.append("return outputs" if len(writers) > 1 else "return outputs[0]")
    return [f"def forward({takes}):", *(f"    {line}" for line in body)]


def _result(program: Program) -> str:
    merged = program.result == "merged" and program.layout != "three dimensions"
    return "out.transpose(1, 2).reshape(b, n, -1)" if merged else "out"


class _Attention:
    """Writes one attention as a method. needs: the extra inputs it reads."""

    def __init__(self, program: Program, attention: Attention, number: int) -> None:
        self.program, self.attention, self.number = program, attention, number
        self.flat = program.layout == "three dimensions"
        text = "\n".join(self._body())
        read = {name for name in _EXTRA if _reads(text, name)}
        self.needs = read

    def lines(self) -> list[str]:
        takes = ["self", *"qkvij", "start", *(n for n in _EXTRA if n in self.needs), "selected", "shown"]
        sizes = (
            ["b, n, d = q.shape", "h, m = 1, k.shape[1]"] if self.flat else ["b, h, n, d = q.shape", "m = k.shape[2]"]
        )
        return [f"def attend{self.number}({', '.join(takes)}):", *(f"    {line}" for line in [*sizes, *self._body()])]

    def _body(self) -> list[str]:
        spelling = self.attention.spelling
        if spelling == "flex":
            return self._flex()
        mask = [*self._mask(), "if shown is not None:", "    shown.append(mask)"]
        if spelling == "nn.MultiheadAttention":
            return [*mask, *self._module()]
        if spelling.startswith("sdpa"):
            return [*mask, *self._sdpa()]
        return [*mask, *self._written_out()]

    def _mask(self) -> list[str]:
        """The Boolean mask, a line a statement."""
        a = self.attention
        lines = [words.CAUSAL[a.causal].format(w=a.width)]
        lines += [words.JOINS[a.join].format(a="mask", b=words.TERMS[term].format(w=a.width)) for term in a.terms]
        if a.prefix != "none":
            lines.append(words.PREFIXES[a.prefix].format(a="mask", w=a.width + 3))
        return [f"mask = {self._flattened(line)}" for line in lines]

    def _flattened(self, text: str) -> str:
        """The same over [b, n, m], where there are no heads."""
        if not self.flat:
            return text
        for four, three in (
            ("docs[:, None, start : start + n, None]", "docs[:, start : start + n, None]"),
            ("[:, None, None, :]", "[:, None, :]"),
            ("[:, None, None]", "[:, None]"),
            (".view(b, 1, 1, m)", ".view(b, 1, m)"),
        ):
            text = text.replace(four, three)
        return re.sub(r"\bgiven\b", "given[:, 0]", text)

    @property
    def low(self) -> str:
        return words.LOWS[self.attention.low].format(dtype=self.program.dtype)

    @property
    def _bias(self) -> str:
        return words.BIASES[self.attention.bias].format(low=self.low)

    def _selected(self, value: str, like: str = "") -> str:
        """Blocks that were selected, in the shape of ``like``."""
        blocks = f"selected[{self.number}]"
        return value.format(f"{blocks}.reshape({like}.shape)" if like else blocks)

    def _sdpa(self) -> list[str]:
        a, p = self.attention, self.program
        lines = [words.SCALES[a.scale][0].format(s=f"{p.head_dim**-0.5!r}", r=f"{p.head_dim**-0.25!r}")]
        scale = {"after": "", "divided": ", scale=1 / math.sqrt(d)"}.get(a.scale, ", scale=1.0")
        lines += self._repeated(("k", "v"))
        if a.spelling == "sdpa":
            blocks = f"selected[{self.number}]{'[:, 0]' if self.flat else ''}"
            call = "out = F.scaled_dot_product_attention(q, k, v, attn_mask={}" + scale + ")"
            causal = not a.terms and a.prefix == "none" and p.cache == "none" and a.causal == "ge"
            plain = call.replace("attn_mask={}", "is_causal=True") if causal else call.format("mask")
            return _lines(
                *lines,
                "if selected is None:",
                f"    {plain}",
                "else:",
                f"    {call.format(f'mask & {blocks}')}",
                "return out",
            )
        lines.append(f"bias = {self._bias}")
        lines += [f"bias = {words.SCORES[s].replace('scores', 'bias')}" for s in a.scores]
        like = "[:, 0]" if self.flat else ""
        return _lines(
            *lines,
            "if selected is not None:",
            f'    bias = bias.masked_fill(~selected[{self.number}]{like}, float("-inf"))',
            f"return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype){scale})",
        )

    def _repeated(self, names: tuple[str, ...]) -> list[str]:
        p = self.program
        if self.flat:
            return []
        heads = {"k": p.key_heads, "v": p.value_heads}
        return [f"{x} = {words.REPEATS[p.repeat].format(x=x)}" for x in names if heads[x] != p.heads]

    def _products(self) -> tuple[list[str], str, str]:
        """(lines before, scores, output) of the two products."""
        s = self.attention.spelling
        if s == "shared key":
            first = 'torch.einsum("bhid,bjd->bhij", q, k[:, 0])'
            return [], first, 'torch.einsum("bhij,bjd->bhid", weights, v[:, 0])'
        if s == "grouped einsum":
            first = 'torch.einsum("bgrid,bgjd->bgrij", q.unflatten(1, (g, h // g)), k).flatten(1, 2)'
            last = 'torch.einsum("bgrij,bgjd->bgrid", weights.unflatten(1, (g, h // g)), v).flatten(1, 2)'
            return ["g = k.shape[1]"], first, last
        if s in ("bmm", "baddbmm") and not self.flat:
            flat = "{0}.reshape(b * h, {1}, -1)"
            q, k, v, w = (flat.format(x, y) for x, y in (("q", "n"), ("k", "m"), ("v", "m"), ("weights", "n")))
            k = f"{k}.transpose(1, 2)"
            zero = "torch.zeros(b * h, n, m, dtype=q.dtype, device=q.device)"
            first = f"torch.bmm({q}, {k})" if s == "bmm" else f"torch.baddbmm({zero}, {q}, {k}, beta=0.0, alpha=1.0)"
            return [], f"{first}.view(b, h, n, m)", f"torch.bmm({w}, {v}).view(b, h, n, -1)"
        if self.flat and s in ("bmm", "baddbmm"):
            zero = "torch.zeros(b, n, m, dtype=q.dtype, device=q.device)"
            first = "torch.bmm(q, k.mT)" if s == "bmm" else f"torch.baddbmm({zero}, q, k.mT)"
            return [], first, "torch.bmm(weights, v)"
        first, last = words.PRODUCTS[s]
        if self.flat:
            for four, three in (("bh", "b"), ("xy", "x"), ("permute(0, 1, 3, 2)", "permute(0, 2, 1)")):
                first, last = first.replace(four, three), last.replace(four, three)
        return [], first, last

    def _written_out(self) -> list[str]:
        a, p = self.attention, self.program
        before, after = words.SCALES[a.scale]
        scales = {"s": f"{p.head_dim**-0.5!r}", "r": f"{p.head_dim**-0.25!r}"}
        lines = [before.format(**scales)]
        if a.spelling not in ("grouped einsum", "shared key"):
            lines += self._repeated(("k", "v"))
        setup, first, last = self._products()
        lines += [*setup, f"scores = {first}{after.format(**scales)}"]
        lines += [f"scores = {words.SCORES[s]}" for s in a.scores]
        if a.mask_in_float:
            lines += [f"bias = {self._bias}", "scores = scores + bias"]
        else:
            lines.append(f"scores = {words.FILLS[a.fill].format(low=self.low)}")
        lines += [
            "if selected is not None:",
            f'    scores = scores.masked_fill(~selected[{self.number}].reshape(scores.shape), float("-inf"))',
        ]
        if a.sink != "none":
            lines.append(f"scores = {words.SINKS[a.sink]}")
        lines += words.SOFTMAX[a.softmax]
        if a.sink != "none":
            lines.append(f"weights = {'weights[..., :-1]' if a.sink == 'last column' else 'weights[..., 1:]'}")
        if p.dtype != "float32":
            lines.append("weights = weights.to(v.dtype)")
        return _lines(*lines, f"return {last}")

    def _module(self) -> list[str]:
        a = self.attention
        mask = "~mask" if not a.mask_in_float else f"({self._bias})"
        call = f"self.module{self.number}(x, x, x, attn_mask={mask}, need_weights=False"
        if a.fill == "not equal":
            pads = "torch.where(padding, 0.0, -1.5).to(q.dtype)" if a.mask_in_float else "~padding"
            call += f", key_padding_mask={pads}"
        return [
            "x = q.transpose(1, 2).reshape(b, n, -1)",
            f"return {call})[0].unflatten(-1, (h, d)).transpose(1, 2)",
        ]

    def _flex(self) -> list[str]:
        a = self.attention
        text = words.CAUSAL[a.causal].format(w=a.width)
        for term in a.terms:
            text = f"({text}) & {words.TERMS[term].format(w=a.width)}"
        text = words.PREFIXES[a.prefix].format(a=text, w=a.width + 3)
        for dense, indexed in (
            ("padding[:, None, None, :]", "padding[batch, j]"),
            ("docs[:, None, start : start + n, None] == docs[:, None, None, :]", "docs[batch, i] == docs[batch, j]"),
        ):
            text = text.replace(dense, indexed)
        lines = [
            "def visible(batch, head, i, j):",
            "    i = i + start",
            f"    return {text}",
            "",
            "def chosen(batch, head, i, j):",
            f"    return visible(batch, head, i, j) & selected[{self.number}][batch, head, i, j]",
            "",
            "if shown is not None:",
            "    batches = torch.arange(b, device=q.device).view(b, 1, 1, 1)",
            "    shown.append(visible(batches, 0, i - start, j))",
            "block_mask = create_block_mask(visible if selected is None else chosen, b, h, n, m, device=str(q.device))",
        ]
        scale = {"after": "", "divided": ", scale=1 / math.sqrt(d)"}.get(a.scale, ", scale=1.0")
        call = f"flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True{scale}"
        if a.scores:
            lines += ["", "def score(scores, batch, head, i, j):", "    i = i + start"]
            lines += [f"    scores = {words.SCORES[s]}" for s in a.scores]
            lines += ["    return scores", ""]
            call += ", score_mod=score"
        return [*lines, f"return {call})"]


def _lines(*lines: str) -> list[str]:
    return [line for line in lines if line]


def _reads(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def _inputs(program: Program, needed: list[str], seed: int) -> list[str]:
    p = program
    keys = {"none": "n", "prefix": f"n + {p.past}"}.get(p.cache, f"n + {p.past + 13}")
    lines = [
        f"def inputs(n, seed={seed}):",
        "    g = torch.Generator().manual_seed(seed)",
        f"    b, m = {p.batch}, {keys}",
    ]
    cast = "" if p.dtype == "float32" else f".to(torch.{p.dtype})"
    shapes = {
        "bhnd": ("b, {h}, n, {d}"),
        "bnhd": ("b, n, {h}, {d}"),
        "three dimensions": ("b, n, {d}"),
    }
    sizes = (("q", p.heads, p.head_dim), ("k", p.key_heads, p.head_dim), ("v", p.value_heads, p.value_dim))
    given = {}
    if p.layout == "fused":
        given["x"] = f"torch.randn(b, n, {sum(h * d for _, h, d in sizes)}, generator=g){cast}"
    else:
        given |= {x: f"torch.randn({shapes[p.layout].format(h=h, d=d)}, generator=g){cast}" for x, h, d in sizes}
    if p.cache != "none":
        name, length = ("past", p.past) if p.cache == "prefix" else ("cache", "m")
        given |= {f"{name}_{x}": f"torch.randn(b, {h}, {length}, {d}, generator=g){cast}" for x, h, d in sizes[1:]}
    pads = {
        "holes": "torch.rand(b, m, generator=g) < 0.8",
        "left": "torch.arange(m) >= torch.randint(0, m // 2, (b, 1), generator=g)",
        "right": "torch.arange(m) < torch.randint(m // 2, m + 1, (b, 1), generator=g)",
    }
    extra = {
        "padding": pads[p.pads],
        "docs": "(torch.rand(b, m, generator=g) < 0.05).cumsum(-1)",
        "flag": "torch.rand(n, generator=g) < 0.5",
        "given": "(torch.rand(b, 1, n, m, generator=g) < 0.8) | torch.eye(n, m, dtype=torch.bool)",
        "table": f"torch.randn(32, {p.heads}, generator=g){cast}",
        "sink": f"torch.randn({p.heads}, generator=g){cast}",
    }
    given |= {name: extra[name] for name in needed}
    return [*lines, "    return {", *(f'        "{name}": {text},' for name, text in given.items()), "    }"]
