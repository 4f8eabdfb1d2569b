"""The zoo: a tiny model of every causal-LM type of transformers, eager and through ``backend="stem"`` at budget 1.0.

    python -m benchmarks.zoo --json out/zoo.json --markdown docs/zoo.md
    python -m benchmarks.zoo --only llama,gemma2 --implementation eager

Every model runs on a left-padded batch, eager in fp32 and fp64 and compiled. What is recorded: the attentions found,
rewritten and rejected, their masks in words, graphs, tensors of N x N left above rewritten attentions, and the error
against fp64 next to eager's own. Attention written out by hand is counted independently (``zoo_graphs``), so that what
recognition misses shows. A type that crashes or hangs loses its own result only, and a second run goes on where the
first one stopped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import zoo_models
from benchmarks.zoo_graphs import handwritten

ROOT = Path(__file__).resolve().parents[1]
IMPLEMENTATIONS = ("sdpa", "eager")
OPTIONS: dict[str, Any] = {"budget": 1.0, "min_length": 0, "inner": "eager", "verify": True}
CHAOTIC = 1e-3
"""Relative error of eager itself beyond which equality says little (an expert or a key chosen the other way by a
rounding)."""
TASKS_A_WORKER = 24


def measure(model_type: str, implementation: str) -> dict[str, Any]:
    """One record of the table. Never raises: ``status`` is "ok", "unsupported", "build", "run" or "capture", ``error``
    says what happened."""
    record: dict[str, Any] = {
        "type": model_type,
        "implementation": implementation,
        "status": "ok",
        "error": "",
        "seconds": {},
    }
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        record["seconds"][name] = round(now - clock, 2)
        clock = now

    def failed(status: str, error: Exception) -> dict[str, Any]:
        lap(status)
        text = " ".join(str(error).split())
        return record | {"status": status, "error": f"{type(error).__name__}: {text[:400]}"}

    if implementation == "sdpa" and not getattr(zoo_models.model_class(model_type), "_supports_sdpa", False):
        return record | {"status": "unsupported", "error": "the type knows no SDPA"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = zoo_models.build(model_type, implementation)
        except Exception as error:
            return failed("build", error) | ({"error": why} if (why := zoo_models.UNBUILT.get(model_type)) else {})
        record["weights"] = sum(p.numel() for p in model.parameters())
        lap("build")
        given = zoo_models.inputs(model)
        try:
            eager = zoo_models.logits(model, given)
        except Exception as error:
            return failed("run", error)
        lap("eager")
        truth = golden(model, given)
        lap("fp64")
        try:
            ours = _compiled(model, given, record)
        except Exception as error:
            return failed("capture", error) | {"plain": _plain(model, given)[0]}
        lap("stem")
        record["plain_graphs"] = 1 if record["graphs"] == 1 else _plain(model, given)[0]
        compare(record, ours, eager, truth, given["attention_mask"].bool())
        if record["verdict"] == "differs":
            # Whose doing? transformers itself may build another mask while it is traced.
            plain = _plain(model, given)[1]
            record["plain_differs"] = (
                plain is None
                or compare({}, plain, eager, truth, given["attention_mask"].bool())["verdict"] == "differs"
            )
        lap("compare")
    return record


class Wide(TorchFunctionMode):
    """fp32 in a model's code means fp64: norms, rotations and softmaxes that cast to fp32 by hand are as exact as the
    rest.

    (Masks need it too: the smallest fp64 is -inf in fp32, and a softmax over nothing else is NaN.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def wide(a: Any) -> Any:
            return torch.float64 if a is torch.float32 else a

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(wide, args), **{k: wide(v) for k, v in (kwargs or {}).items()})


def golden(model: Any, given: dict[str, Any]) -> torch.Tensor | None:
    """The model's logits in fp64; None where a model insists on fp32."""
    default = torch.get_default_dtype()
    for mode in (Wide, contextlib.nullcontext):
        try:
            wide = copy.deepcopy(model).double()
            if hasattr(wide, "set_experts_implementation"):
                wide.set_experts_implementation("eager")  # grouped products exist in few dtypes
            torch.set_default_dtype(torch.float64)
            with mode():
                result = zoo_models.logits(wide, given)
            if (
                result[given["attention_mask"].bool()].isfinite().all()
                if result.shape[:2] == given["input_ids"].shape
                else True
            ):
                return result
        except Exception:
            continue
        finally:
            torch.set_default_dtype(default)
    return None


def _compiled(model: Any, given: dict[str, Any], record: dict[str, Any]) -> torch.Tensor:
    """Logits through the backend; fills the record's facts on graphs."""
    from stem_compile import backend
    from stem_compile.passes import verify
    from stem_compile.passes.graph.sites import Rejected
    from stem_compile.passes.graph.values import View, module_path
    from stem_compile.passes.pipeline import Rewrite

    record |= dict.fromkeys(("graphs", "found", "rewritten", "handwritten", "kept", "quadratic", "square"), 0) | {
        "rejected": [],
        "masks": [],
        "missed": [],
    }

    def stem(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        chains = handwritten(module.graph)
        rewrites: list[Rewrite] = []
        with backend.listen(rewrites.append):
            compiled = backend.stem(module, example_inputs, options=OPTIONS)
        attentions = rewrites[-1].attentions
        record["graphs"] += 1
        record["handwritten"] += len(chains)
        record["found"] += len(attentions)
        rejected = [hit for hit in attentions if isinstance(hit, Rejected)]
        sites = rewrites[-1].sites
        record["rewritten"] += len(sites)
        record["rejected"] += [
            {"reason": r.reason.name.lower(), "detail": r.detail, "name": module_path(r.node)} for r in rejected
        ]
        record["masks"] += [s.words for s in sites]
        record["kept"] += sum(verify.keeps_tensor(s) for s in sites)
        for site in (s for s in sites if not verify.keeps_tensor(s)):
            record["quadratic"] += _squares_above([t.node if isinstance(t, View) else t for t in site.tensors])
        record["square"] += sum(_is_square(node) for node in module.graph.nodes)
        alive = set(module.graph.nodes)
        told = {r.node for r in rejected}
        for chain in chains:
            if chain.softmax in alive and not told & set(chain.nodes):
                record["missed"].append({"name": chain.name, "signature": chain.signature, "listing": chain.listing})
        return compiled

    torch._dynamo.reset()
    return zoo_models.logits(torch.compile(model, backend=stem), given)


def _squares_above(tensors: list[torch.fx.Node]) -> int:
    """Tensors of tokens x tokens that are computed to make what an attention reads beside q, k and v (whose own history
    may hold other layers' masks)."""
    visited, frontier = set(tensors), list(tensors)
    while frontier:
        new = [n for n in frontier.pop().all_input_nodes if n not in visited]
        visited.update(new)
        frontier.extend(new)
    return sum(_is_square(n) for n in visited)


def _is_square(node: torch.fx.Node) -> bool:
    """Whether a tensor of any dtype has as many rows and columns as the prompt has tokens."""
    from stem_compile.passes.graph.values import value

    known = value(node)
    return isinstance(known, torch.Tensor) and tuple(known.shape[-2:]) == (zoo_models.LENGTH, zoo_models.LENGTH)


def _plain(model: Any, given: dict[str, Any]) -> tuple[int | str, torch.Tensor | None]:
    """Graphs and logits of Dynamo alone; its exception in place of the graphs."""
    graphs = 0

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    try:
        result = zoo_models.logits(torch.compile(model, backend=count), given)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", None
    return graphs, result


def compare(
    record: dict[str, Any], ours: torch.Tensor, eager: torch.Tensor, golden: torch.Tensor | None, real: torch.Tensor
) -> dict[str, Any]:
    """Sets verdict, by the tolerance of ``stem_compile.testing.numerics`` over the positions that are not
    padding."""
    from stem_compile.testing import numerics

    record["golden"] = "eager" if golden is None else "fp64"
    valid = real if real.shape == eager.shape[:-1] else torch.ones(eager.shape[:-1], dtype=torch.bool)
    reference = eager if golden is None else golden
    if not (eager[valid].isfinite().all() and reference[valid].isfinite().all()):
        record["verdict"] = "eager is not finite"
        return record
    size = numerics.size(reference, valid)
    allowed = 1e-4 * size if golden is None else numerics.tolerance(eager, golden, torch.float32, valid)
    gap = numerics.gap(ours, reference, allowed, valid)
    own = float(numerics.errors(eager, reference)[valid].max())
    record["eager_error"], record["stem_error"], record["ratio"] = own / size, gap.error / size, gap.ratio
    record["chaotic"] = own / size > CHAOTIC
    record["verdict"] = "equal" if gap.ok else "differs"
    if not gap.ok:
        record["where"] = list(gap.where)
    return record


# Workers: a process measures type after type; the parent kills it where one takes too long, and starts another.


def work() -> None:
    """Child process: a type and an implementation a line in, a record a line out."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        model_type, implementation = line.split()
        out.write(json.dumps(measure(model_type, implementation)) + "\n")


class Worker:
    """One child. ``ask`` returns a record whatever happens to it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.process: subprocess.Popen[str] | None = None
        self.done = 0

    def ask(self, model_type: str, implementation: str) -> dict[str, Any]:
        if self.process is None or self.done >= TASKS_A_WORKER:
            self.stop()
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.zoo", "--worker"],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process, start = self.process, time.perf_counter()
        assert process.stdin and process.stdout
        record: dict[str, Any] = {"type": model_type, "implementation": implementation}
        try:
            process.stdin.write(f"{model_type} {implementation}\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], self.limit)[0]:
                record |= {"status": "timeout", "error": f"more than {self.limit:.0f} s"}
                self.stop()
            elif line := process.stdout.readline():
                record |= json.loads(line)
                self.done += 1
            else:
                record |= {"status": "crash", "error": f"the process ended with {process.wait()}"}
                self.stop()
        except BrokenPipeError:
            record |= {"status": "crash", "error": f"the process ended with {process.wait()}"}
            self.stop()
        record.setdefault("seconds", {})["total"] = round(time.perf_counter() - start, 2)
        return record

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process, self.done = None, 0


def sweep(tasks: list[tuple[str, str]], records: dict[str, Any], path: Path | None, jobs: int, limit: float) -> None:
    """Fill ``records`` with what is missing, saving after each."""
    waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for task in tasks:
        if "/".join(task) not in records:
            waiting.put(task)
    lock = threading.Lock()
    total = waiting.qsize()

    def loop() -> None:
        worker = Worker(limit)
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return worker.stop()
            record = worker.ask(*task)
            with lock:
                records["/".join(task)] = record
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.with_suffix(".part").write_text(json.dumps(records, indent=1))
                    path.with_suffix(".part").replace(path)
                print(f"[{total - waiting.qsize()}/{total}] {line_of(record)}", flush=True)

    threads = [threading.Thread(target=loop) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def line_of(record: dict[str, Any]) -> str:
    """One record in one line."""
    head = f"{record['type']:28s} {record['implementation']:5s} {record['seconds'].get('total', 0):5.1f} s  "
    if record["status"] != "ok":
        return head + f"{record['status']}: {record['error']}"[:150]
    reasons = collections.Counter(r["reason"] for r in record["rejected"])
    parts = [f"{record['rewritten']} of {record['found']}"]
    parts += [f"{n} {reason}" for reason, n in reasons.items()]
    parts += [f"{len(record['missed'])} MISSED"] * bool(record["missed"])
    parts += [f"{record['graphs']} graphs ({record['plain_graphs']} plain)"] * (record["graphs"] != 1)
    return (
        head
        + ", ".join(parts)
        + f"  {record['verdict']}"
        + (f" ({record['ratio']:.2g}x budget)" if record["verdict"] == "differs" else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="types, separated by commas")
    parser.add_argument("--implementation", choices=[*IMPLEMENTATIONS, "both"], default="both")
    parser.add_argument("--json", type=Path, help="results; types it holds already are not run again")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--limit", type=float, default=150, help="seconds a type may take")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    implementations = IMPLEMENTATIONS if arguments.implementation == "both" else (arguments.implementation,)
    names = [n for n in arguments.only.split(",") if n] or zoo_models.types()
    records = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    sweep([(n, i) for n in names for i in implementations], records, arguments.json, arguments.jobs, arguments.limit)
    from benchmarks import zoo_table

    rows = [records[f"{n}/{i}"] for n in names for i in implementations]
    zoo_table.show(rows)
    if arguments.markdown:
        arguments.markdown.write_text(zoo_table.markdown(rows))


if __name__ == "__main__":
    main()
