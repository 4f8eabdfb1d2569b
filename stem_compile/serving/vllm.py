"""vLLM plugin: long prompts are prefilled sparsely by an attention backend that is otherwise the platform's own.

vLLM loads ``register`` by the entry point group ``vllm.general_plugins`` in each of its processes. It stays idle unless
options are given, by ``--additional-config '{"stem": {"budget": 0.25}}'`` or by the environment
(``config.serving_options``). Then each step's batch is cut in two: prefills of long prompts go through the block-sparse
kernels, everything else (decoding, short prompts, layers that are not plain causal attention) through the native
backend, under metadata of its own. Whatever fails on the sparse side is answered by the native one.

All that is known of vLLM's internals stands in this file; ``VERSIONS`` are those that it was run with. Only vLLM's CPU
platform is served.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from vllm import __version__ as vllm_version
from vllm import _custom_ops as custom_ops
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import WorkerBase

from stem_compile.config import OptionError, StemConfig, serving_options
from stem_compile.reasons import Reason, StemWarning
from stem_compile.selection import BlockSelection, Observed, observe
from stem_compile.serving import routing, sequence
from stem_compile.serving.routing import Metrics, Part, Piece

VERSIONS = ("0.32",)
"""Versions of vLLM, as "major.minor", that the plugin was run with; under others it stays idle and says so."""
KEY = "stem"
"""Name of the plugin's options in vLLM's ``additional_config``."""

log = init_logger("vllm.stem_compile")
METRICS = Metrics()
"""Prefills of this process."""


def register() -> None:
    """Put the backend in the place of the platform's own and follow the model runner's batches. Called by vLLM; calling
    it again changes nothing."""
    if not str(vllm_version).startswith(tuple(f"{v}." for v in VERSIONS)):
        log.warning("stem-compile stays idle: it was run with vLLM %s, not %s", ", ".join(VERSIONS), vllm_version)
        return
    if not current_platform.is_cpu():
        log.warning("stem-compile stays idle: its vLLM plugin serves the CPU platform only")
        return
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.StemAttentionBackend")
    if not hasattr(GPUModelRunner.execute_model, "_stem"):
        GPUModelRunner.execute_model = _followed(GPUModelRunner.execute_model)
    WorkerBase.stem_metrics = _worker_metrics


def metrics(llm: Any, clear: bool = False) -> dict[str, Any]:
    """``Metrics.as_dict`` of the first worker of a ``vllm.LLM`` (all workers compute the same batches). clear: begin at
    zero afterwards. Raises RuntimeError where the plugin is not loaded."""
    try:
        return llm.collective_rpc("stem_metrics", kwargs={"clear": clear})[0]  # type: ignore[no-any-return]
    except AttributeError as error:
        raise RuntimeError("vLLM has not loaded the stem-compile plugin: VLLM_PLUGINS must name 'stem'") from error


def _worker_metrics(worker: Any, clear: bool = False) -> dict[str, Any]:
    del worker
    result = METRICS.as_dict()
    if clear:
        METRICS.clear()
    return result


def options_of(vllm_config: Any) -> StemConfig | None:
    """The options given to an engine, None where none are. Raises OptionError for wrong ones."""
    given = vllm_config.additional_config
    options = given.get(KEY) if isinstance(given, dict) else None
    options = serving_options() if options is None else options
    if options is None:
        return None
    config = StemConfig.from_options(options)
    if config.prompt_length is not None:
        raise OptionError(f"prompt_length={config.prompt_length!r}: vLLM tells each prompt's length; leave it out")
    return config


_runner: Any = None
"""The model runner that executes a step just now."""


def _followed(execute: Callable[..., Any]) -> Callable[..., Any]:
    """``execute_model`` that says which runner it runs for: metadata do not tell the lengths of prompts."""

    @functools.wraps(execute)
    def execute_model(runner: Any, *args: Any, **kwargs: Any) -> Any:
        global _runner
        before, _runner = _runner, runner
        try:
            return execute(runner, *args, **kwargs)
        finally:
            _runner = before

    execute_model._stem = True  # type: ignore[attr-defined]
    return execute_model


@dataclass
class Plan:
    """How one step's batch is computed. sparse: pieces for the sparse kernels. native: metadata of all others, packed
    as ``rows`` [queries] of the step's queries says; None where there are none. parts: the prefills of ``sparse``."""

    sparse: list[Piece]
    parts: list[Part]
    native: Any
    rows: torch.Tensor | slice
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    measured: set[Piece] = field(default_factory=set)
    failed: bool = False


@dataclass
class StemAttentionMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """The platform's metadata of the whole batch, beside the plan that may replace it."""

    plan: Plan | None = None


class StemMetadataBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Cuts each step's batch and counts its prefills."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = options_of(vllm_config)
        if self.config is None:
            log.info_once("stem-compile is idle: additional_config={'stem': {'budget': 0.25}} wakes it")

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        native = super().build(common_prefix_len, common_attn_metadata, fast_build)
        runner = _runner
        if self.config is None or runner is None or native.causal is not True or native.encoder_cache is not None:
            return native
        plan = None
        try:
            plan = self._plan(self.config, common_attn_metadata, _parts(runner, common_attn_metadata))
        except Exception as error:
            _warn_once(f"a batch stays native: {type(error).__name__}: {error}")
        values = {f.name: getattr(native, f.name) for f in fields(native)}
        return StemAttentionMetadata(**values, plan=plan)

    def _plan(self, config: StemConfig, common: Any, parts: Sequence[Part]) -> Plan | None:
        why = [routing.reason(part, config) for part in parts]
        for part, reason in zip(parts, why, strict=True):
            METRICS.count(part, config, reason)
        if all(reason is not None for reason in why):
            return None
        cut = [piece for part in parts for piece in routing.pieces(part, config)]
        dense = [piece for piece in cut if not piece.sparse and piece.queries]
        rows: torch.Tensor | slice = slice(0, 0)
        native = None
        if dense:
            rows = _rows(dense)
            native = super().build(0, _common_of(common, dense))
        sparse = [piece for piece in cut if piece.sparse]
        tables = {p.part.row: common.block_table_tensor[p.part.row] for p in sparse}
        return Plan(sparse, [p for p, r in zip(parts, why, strict=True) if r is None], native, rows, tables)


def _parts(runner: Any, common: Any) -> list[Part]:
    """The step's requests. Raises ValueError where lengths do not belong together."""
    starts = common.query_start_loc_cpu.tolist()
    keys = common.seq_lens.tolist()
    prompts = runner.input_batch.num_prompt_tokens[: common.num_reqs].tolist()
    if not len(prompts) == len(keys) == len(starts) - 1:
        raise ValueError(f"{len(starts) - 1} requests, {len(keys)} lengths and {len(prompts)} prompts")
    return [
        Part(row, first, last - first, keys[row], prompts[row])
        for row, (first, last) in enumerate(itertools.pairwise(starts))
    ]


def _rows(dense: Sequence[Piece]) -> torch.Tensor | slice:
    """Rows of the packed queries that the native backend computes: a slice where they lie together."""
    first, end = dense[0].start, dense[-1].start + dense[-1].queries
    if end - first == sum(piece.queries for piece in dense):
        return slice(first, end)
    return torch.cat([torch.arange(piece.start, piece.start + piece.queries) for piece in dense])


def _common_of(common: Any, dense: Sequence[Piece]) -> Any:
    """Metadata of a batch of the dense pieces alone, each a request of its own."""
    lengths = torch.tensor([0, *(piece.queries for piece in dense)], dtype=torch.int32)
    starts = lengths.cumsum(0).to(torch.int32)
    keys = torch.tensor([piece.keys for piece in dense], dtype=common.seq_lens.dtype)
    rows = torch.tensor([piece.part.row for piece in dense])
    return common.replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=keys,
        num_reqs=len(dense),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(keys.max()),
        block_table_tensor=common.block_table_tensor[rows],
    )


class StemAttentionImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """The native attention, but for the pieces that a plan calls sparse."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        self.config = options_of(get_current_vllm_config())

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the native one: query [tokens, heads, d], key and value [tokens, key heads, d], kv_cache [blocks, key
        heads, block size, 2 d]; the result is written into ``output``, [tokens, heads, d] or flat."""
        scales = (output_scale, output_block_scale)
        native: Callable[..., torch.Tensor] = functools.partial(super().forward, layer, query, key, value, kv_cache)
        plan: Plan | None = getattr(attn_metadata, "plan", None)
        config = self.config
        if plan is None or plan.failed or config is None or scales != (None, None) or not self._is_plain(layer, config):
            return native(attn_metadata, output, *scales)
        try:
            self._sparse(plan, config, layer, query, key, value, kv_cache, output)
        except Exception as error:
            # The native answer covers the whole batch, so nothing of what was written before the failure stays.
            _warn_once(f"prefills stay native: {type(error).__name__}: {error}")
            plan.failed = True
            METRICS.recount(plan.parts, config, Reason.INTERNAL)
            return native(attn_metadata, output)
        return output

    def _is_plain(self, layer: Any, config: StemConfig) -> bool:
        """Whether this layer is causal attention that the sparse kernels know, and no layer that is to stay dense."""
        plain = self.attn_type == AttentionType.DECODER and self.alibi_slopes is None and self.sliding_window == -1
        return plain and not self.is_fp8_kv_cache and not config.keeps_dense(_index(layer))

    def _sparse(
        self,
        plan: Plan,
        config: StemConfig,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        out = output.view(output.shape[0], self.num_heads, self.head_size)
        for piece in plan.sparse:
            rows = slice(piece.start, piece.start + piece.queries)
            table = plan.tables[piece.part.row]
            if piece.part.begin == 0:
                own = slice(piece.part.start, piece.part.start + piece.keys)
                k, v = key[own], value[own]
            else:
                k, v = read_cache(kv_cache, table, piece.keys, layer.isa)
            attention = sequence.attention(
                query[rows],
                k,
                v,
                config,
                prompt=piece.part.total,
                layer=_index(layer),
                scale=self.scale,
                softcap=self.logits_soft_cap or None,
                sinks=self.sinks,
            )
            with _measuring(plan, piece):
                lists = sequence.select(attention)
            if self._reads_pages(kv_cache, lists):
                self._attend_pages(layer, query[rows], kv_cache, table, lists, piece, out[rows])
            else:
                out[rows] = sequence.attend(attention, lists)
        if plan.native is not None:
            if isinstance(plan.rows, slice):
                super().forward(layer, query[plan.rows], key, value, kv_cache, plan.native, output[plan.rows])
            else:
                part = output.new_empty(len(plan.rows), *output.shape[1:])
                super().forward(layer, query[plan.rows], key, value, kv_cache, plan.native, part)
                output[plan.rows] = part

    def _reads_pages(self, kv_cache: torch.Tensor, lists: BlockSelection) -> bool:
        """Whether the native kernel can compute the listed blocks where they lie."""
        return self.sinks is None and kv_cache.is_contiguous() and lists.block_k % kv_cache.shape[2] == 0

    def _attend_pages(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        table: torch.Tensor,
        lists: BlockSelection,
        piece: Piece,
        out: torch.Tensor,
    ) -> None:
        """The listed blocks by the native kernel: each row of blocks of each head is to it a request of one head, whose
        cache is made of the blocks listed. query, out: [queries, heads, d]."""
        blocks, key_heads, page, width = kv_cache.shape
        queries, heads, head_size = query.shape
        pages, lengths, starts = row_tables(lists, table, piece, page)
        head = torch.arange(heads).div(heads // key_heads, rounding_mode="floor")
        requests = (pages * key_heads + head.view(-1, 1, 1)).flatten(0, 1).to(torch.int32)
        options = {"seq_lens": lengths, "query_start_loc": starts, "causal": True, "kv_cache_dtype": "auto"}
        metadata = custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths), num_heads=1, num_kv_heads=1, head_dim=head_size, dtype=query.dtype,
            sliding_window_size=-1, isa=layer.isa, enable_kv_split=False, dynamic_causal=None, **options,
        )  # fmt: skip
        k, v = kv_cache.view(blocks * key_heads, 1, page * 2, width // 2).chunk(2, dim=2)
        packed = query.transpose(0, 1).reshape(heads * queries, 1, head_size)
        result = torch.empty_like(packed)
        custom_ops.cpu_attention_with_kv_cache(
            query=packed, key_cache=k, value_cache=v, output=result, scale=self.scale, alibi_slopes=None,
            sliding_window=-1, block_table=requests, softcap=self.logits_soft_cap, scheduler_metadata=metadata,
            s_aux=None, dynamic_causal=None, k_scale=1.0, v_scale=1.0, **options,
        )  # fmt: skip
        out.copy_(result.view(heads, queries, head_size).transpose(0, 1))


def row_tables(
    lists: BlockSelection, table: torch.Tensor, piece: Piece, page: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each head's rows of blocks as requests of a paged attention whose queries are the last of their keys.

    table: block numbers of the sequence, [pages]. Result: block numbers [heads, rows, width], 0 past a row's end; keys
    of each request int32 [heads * rows]; where its queries start int32 [heads * rows + 1]. The last blocks that a row
    lists reach to its diagonal, so that a causal mask aligned to the end of the listed keys hides what it should.
    """
    counts, (heads, rows) = lists.counts[0].long(), lists.counts.shape[1:]
    begin = piece.keys - piece.queries
    ends = (begin + lists.block_q * torch.arange(1, rows + 1)).clamp(max=piece.keys)
    visible = (ends + lists.block_k - 1) // lists.block_k
    counts = torch.where(counts < 0, visible, counts)
    lane = torch.arange(int(counts.max()))
    listed = lists.lists[0, ..., : len(lane)].long()
    listed = torch.nn.functional.pad(listed, (0, len(lane) - listed.shape[-1]))
    listed = torch.where((lists.counts[0] < 0).unsqueeze(-1), lane, listed)
    listed = listed.masked_fill(lane >= counts.unsqueeze(-1), 0)
    last = listed.gather(-1, counts.unsqueeze(-1) - 1).squeeze(-1)
    keys = (counts - 1) * lists.block_k + (ends - last * lists.block_k).clamp(max=lists.block_k)
    parts = lists.block_k // page
    places = (listed.unsqueeze(-1) * parts + torch.arange(parts)).flatten(-2).clamp(max=len(table) - 1)
    taken = (ends - torch.cat([ends.new_tensor([begin]), ends[:-1]])).repeat(heads).cumsum(0)
    starts = torch.cat([taken.new_zeros(1), taken]).to(torch.int32)
    return table.long()[places], keys.flatten().to(torch.int32), starts


def _index(layer: Any) -> int:
    """Number of a layer in its model: the first number in its name, "model.layers.3.self_attn.attn"."""
    return next((int(part) for part in str(layer.layer_name).split(".") if part.isdigit()), 0)


def _measuring(plan: Plan, piece: Piece) -> Any:
    """Measures the density of a step's pieces in one layer: in each it would cost time."""
    if piece in plan.measured:
        return contextlib.nullcontext()
    plan.measured.add(piece)

    def measure(observed: Observed) -> None:
        visible = observed.candidates.expand(*observed.selection.counts.shape, -1)
        METRICS.measure(int(observed.selection.dense(visible).sum()), int(visible.sum()))

    return observe(measure)


def read_cache(cache: torch.Tensor, table: torch.Tensor, keys: int, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a sequence out of the CPU backend's cache: twice [keys, key heads, d].

    cache: [blocks, key heads, block size, 2 d], its interior in the order of the kernels of ``isa``. table: block
    numbers, at least as many as ``keys`` tokens fill. Raises ValueError for a table too narrow or a number that is no
    block.
    """
    blocks, heads, page, width = cache.shape
    used = -(-keys // page)
    if used > len(table):
        raise ValueError(f"{keys} tokens fill {used} blocks of {page}, the table has {len(table)}")
    pages = table[:used].long()
    if used and not 0 <= int(pages.min()) <= int(pages.max()) < blocks:
        raise ValueError(f"block numbers from {int(pages.min())} to {int(pages.max())}: the cache has {blocks} blocks")
    orders = interior(cache.dtype, page, width // 2, isa)
    halves = cache[pages].view(used, heads, 2, page * width // 2).unbind(2)
    k, v = (
        (half if order is None else half.index_select(2, order)).view(used, heads, page, width // 2)
        for half, order in zip(halves, orders, strict=True)
    )
    return tuple(x.transpose(1, 2).reshape(used * page, heads, width // 2)[:keys] for x in (k, v))  # type: ignore[return-value]


@functools.cache
def interior(dtype: torch.dtype, page: int, width: int, isa: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where the native kernels keep the entries of a block of ``page`` tokens and ``width`` channels, for keys and
    values: int64 [page * width], places in token-major order; None where that is the order itself.

    The layouts differ by instruction set and are written down nowhere, so a block of numbered entries is stored and
    looked at. Raises ValueError where that is no permutation.
    """
    number = torch.arange(page * width)
    read = [torch.zeros_like(number), torch.zeros_like(number)]
    # Every dtype holds the whole numbers below 128.
    for digit in range(0, (page * width).bit_length(), 7):
        entries = (number >> digit & 127).view(page, 1, width).to(dtype)
        cache = torch.zeros(1, 1, 2 * page, width, dtype=dtype)
        halves = cache.chunk(2, dim=2)
        slots = torch.arange(page)
        custom_ops.cpu_attn_reshape_and_cache(
            entries, entries, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        for total, half in zip(read, halves, strict=True):
            total += half.reshape(-1).long() << digit
    return _order(read[0], number), _order(read[1], number)


def _order(read: torch.Tensor, number: torch.Tensor) -> torch.Tensor | None:
    if not torch.equal(read.sort().values, number):
        raise ValueError("the cache keeps its entries in an order that could not be read")
    return None if torch.equal(read, number) else read.argsort()


class StemAttentionBackend(CPUAttentionBackend):  # type: ignore[misc]
    """The CPU platform's backend with sparse prefill."""

    @staticmethod
    def get_impl_cls() -> type[StemAttentionImpl]:
        return StemAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[StemMetadataBuilder]:
        return StemMetadataBuilder


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"vLLM with stem-compile: {message}", StemWarning, stacklevel=3)
    log.warning("stem-compile: %s", message)
