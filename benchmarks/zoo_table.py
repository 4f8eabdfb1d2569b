"""The zoo's records for people: a table on the terminal and ``docs/zoo.md``."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

IMPLEMENTATIONS = ("sdpa", "eager")
NOT_CAUSAL = ("cross_attention", "decode")
"""Reasons of attentions that are no prefill of a causal self-attention."""
BIDIRECTIONAL: tuple[str, ...] = ()
"""Types whose attention is bidirectional by their own design; in all others a rejection as bidirectional counts as a
causal attention not rewritten."""

Record = dict[str, Any]


def totals(records: Iterable[Record]) -> dict[str, Any]:
    """What "done" is measured by, over records of one implementation."""
    all_of_them = list(records)
    ok = [r for r in all_of_them if r["status"] == "ok"]
    other = sum(
        x["reason"] in (*NOT_CAUSAL, *["bidirectional"] * (r["type"] in BIDIRECTIONAL))
        for r in ok
        for x in r["rejected"]
    )
    missed = sum(len(r["missed"]) for r in ok)
    recognised = sum(r["found"] for r in ok)
    return {
        "types": len(all_of_them),
        "unsupported": sum(r["status"] == "unsupported" for r in all_of_them),
        "not built": sum(r["status"] == "build" for r in all_of_them),
        "failed": sum(r["status"] not in ("ok", "unsupported", "build") for r in all_of_them),
        "run": len(ok),
        "with attention": sum(bool(r["found"] or r["missed"]) for r in ok),
        "attentions": recognised + missed,
        "missed": missed,
        "causal": recognised + missed - other,
        "rewritten": sum(r["rewritten"] for r in ok),
        "kept": sum(r.get("kept", 0) for r in ok),
        "differ": sum(not r["verdict"].startswith("equal") for r in ok),
        "N x N left": sum(r["quadratic"] for r in ok),
        "graphs grew": sum(isinstance(r["plain_graphs"], int) and r["graphs"] > r["plain_graphs"] for r in ok),
    }


def by_implementation(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {i: [] for i in IMPLEMENTATIONS}
    for record in records:
        groups[record["implementation"]].append(record)
    return {i: group for i, group in groups.items() if group}


def cells(record: Record) -> tuple[str, ...]:
    """Type, implementation, attentions, rewritten, masks, not rewritten and why, graphs, N x N, equal."""
    head = (record["type"], record["implementation"])
    if record["status"] != "ok":
        return (*head, "", "", "", f"{record['status']}: {record['error']}", "", "", "")
    masks = "; ".join(counted(record["masks"]))
    why = "; ".join(
        counted(
            r["reason"].replace("_", " ") + (f" ({short(r['detail'])})" if r["detail"] else "")
            for r in record["rejected"]
        )
    )
    why += "; " * bool(why and record["missed"]) + (f"{len(record['missed'])} not seen" if record["missed"] else "")
    graphs = str(record["graphs"]) + (
        f" (alone {record['plain_graphs']})" if record["plain_graphs"] != record["graphs"] else ""
    )
    words = {"equal": "equal", "differs": f"differs, {record.get('ratio', 0):.2g} budgets"}
    verdict = words.get(record["verdict"], str(record["verdict"]))
    verdict += " (eager itself is unsteady)" * bool(record.get("chaotic"))
    attentions = record["found"] + len(record["missed"])
    return (
        *head,
        str(attentions),
        str(record["rewritten"]),
        masks,
        why,
        graphs,
        f"{record['quadratic']}{', kept' * bool(record.get('kept'))}",
        verdict,
    )


def counted(words: Iterable[str]) -> list[str]:
    """Equal words once, with their number."""
    return [f"{w} x{n}" if n > 1 else w for w, n in collections.Counter(words).items()]


def short(detail: str, longest: int = 110) -> str:
    return detail if len(detail) <= longest else detail[: longest - 3] + "..."


COLUMNS = (
    "type",
    "attn",
    "attentions",
    "rewritten",
    "masks and scores",
    "not rewritten, and why",
    "graphs",
    "N x N left",
    "output",
)


def show(records: list[Record]) -> None:
    """A table of what is not plainly fine, and the totals."""
    from stem_compile.bench.terminal import Table, width

    rows = []
    for record in records:
        fine = (
            record["status"] == "ok"
            and record["rewritten"] == record["found"]
            and not record["missed"]
            and record["verdict"] == "equal"
        )
        if not fine and record["status"] != "unsupported":
            rows.append(cells(record))
    if rows:
        print(Table("what is not rewritten, not equal or did not run", COLUMNS, rows).text(width()))
    groups = by_implementation(records)
    figures = {i: totals(group) for i, group in groups.items()}
    names = next(iter(figures.values()), {})
    summary = [(name, *(str(f[name]) for f in figures.values())) for name in names]
    print(Table("all types", ("", *groups), summary).text(width()))


def _introduction(machine: str, transformers: str, seconds: float) -> list[str]:
    """What the page is about. transformers: its version."""
    return [
        "# The zoo",
        "",
        (
            f"Every type that transformers {transformers} lists for causal language models, built tiny with"
            " random weights, run eager and through"
        ),
        (
            '`torch.compile(model, backend="stem", options={"budget": 1.0, "min_length": 0})`, with SDPA where the type'
            " supports it and with its own eager"
        ),
        f"attention. {machine}; {seconds / 60:.0f} minutes in all. This page is written by",
        "",
        "    python -m benchmarks.zoo --json out/zoo.json --markdown docs/zoo.md",
        "",
        (
            "A model has every kind of layer of its type once, sliding windows and chunks of 64 tokens, head dims of 16"
            " or 32 and weights scaled so that"
        ),
        (
            "scores are of order one. The input is two rows of 200 tokens, the first padded on the left by 45; outputs"
            " are compared at the real positions."
        ),
        (
            "*Equal* means an error against fp64 of at most 4 times the error that the model's own eager fp32 run has"
            " there, plus 8 units in the last place."
        ),
        (
            "*Not seen* are softmaxes between two products that are neither rewritten nor rejected, counted without the"
            " backend's patterns; *N x N left* counts"
        ),
        (
            "tensors of tokens x tokens above rewritten attentions whose mask was recovered, *kept* the attentions that"
            " read such a tensor because their mask or"
        ),
        "their bias is data. Real models may have larger head dims than these (Gemma 4's full layers: 512).",
        "",
    ]


def markdown(records: list[Record]) -> str:
    """``docs/zoo.md``."""
    import transformers

    from stem_compile.bench.machine import describe

    groups = by_implementation(records)
    figures = {i: totals(group) for i, group in groups.items()}
    seconds = sum(r["seconds"].get("total", 0) for r in records)
    lines = [
        *_introduction(describe("cpu"), transformers.__version__, seconds),
        "## Totals",
        "",
        "| | " + " | ".join(groups) + " |",
        "|---|" + "---|" * len(groups),
    ]
    for name in next(iter(figures.values()), {}):
        lines.append(f"| {name} | " + " | ".join(str(f[name]) for f in figures.values()) + " |")
    share = [f"{100 * f['rewritten'] / f['causal']:.1f}%" if f["causal"] else "-" for f in figures.values()]
    lines.append("| causal self-attentions rewritten | " + " | ".join(share) + " |")
    refused = [r for r in records if r["status"] not in ("ok", "unsupported")]
    lines += ["", "## Types that cannot be built or captured", ""]
    lines += [f"- {r['type']} ({r['implementation']}): {r['error']}" for r in refused] or ["None."]
    ok = [r for r in records if r["status"] == "ok"]
    without = sorted({r["type"] for r in ok} - {r["type"] for r in ok if r["found"] or r["missed"]})
    lines += ["", f"Without softmax attention: {', '.join(without) or 'none'}.", ""]
    several = [f"{r['type']} ({r['graphs']})" for r in ok if r["implementation"] == "eager" and r["graphs"] > 1]
    lines += [
        f"Captured by Dynamo in several graphs, with or without this backend: {', '.join(several) or 'none'}.",
        "",
    ]
    lines += ["## Types", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for record in ok:
        if record["found"] or record["missed"]:
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells(record)) + " |")
    return "\n".join(lines) + "\n"
