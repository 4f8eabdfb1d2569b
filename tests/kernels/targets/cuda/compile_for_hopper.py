"""Compile every kernel for sm_90 without a GPU and print registers, shared memory and spills: ``python
tests/kernels/targets/cuda/compile_for_hopper.py``.

Launches are replaced by Triton's warm-up under a driver that only names its target, so argument handling is the real
one.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from stem_compile.kernels.targets.cuda import device, direct
from stem_compile.kernels.targets.cuda import target as cuda
from stem_compile.selection import Attention, SelectionSpec


class Properties:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class NamedTarget:
    """The least of a driver that compiling needs."""

    utils = Properties()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> str:
    """What ptxas says of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        for tool in ("ptxas", "ptxas-blackwell"):
            done = subprocess.run(
                [tools / tool, "-v", "-arch=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                break
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    text = (
        f"{registers.group(1) if registers else '?'} registers, {kernel.metadata.shared} bytes shared,"
        f" {kernel.asm['ptx'].count('wgmma.mma_async')} wgmma"
    )
    stored = int(spills.group(1)) if spills else 0
    return text + (f", {stored} bytes spilled" if stored else "")


def cases() -> tuple[tuple[Any, ...], ...]:
    """(template, head dim, value dim, blocks, mask, dtype, score, tensors of mask and score)."""
    pad, head = torch.ones(1, 8192, dtype=torch.bool), torch.ones(2)
    padded, window, left = (
        "(kv <= q + S0) & Ne(T0(b, kv), 0)",
        "(kv <= q) & (kv > q - 1024)",
        "Eq(FloorDiv(q - T0(b), 2048), FloorDiv(kv - T0(b), 2048))",
    )
    softcap, bias = "50.0*tanh(0.02*s)", torch.ones(1, 2, 64, 64, dtype=torch.bfloat16)
    return (
        ("hopper", 128, 128, (128, 128), "kv <= q", torch.bfloat16, "", ()),
        ("hopper", 128, 128, (128, 64), padded, torch.bfloat16, "", (pad,)),
        ("hopper", 128, 128, (64, 64), "kv <= q", torch.bfloat16, "", ()),
        ("hopper", 64, 64, (128, 128), "kv <= q", torch.float16, "", ()),
        ("hopper", 192, 128, (128, 128), "kv <= q", torch.bfloat16, "", ()),
        ("hopper", 256, 256, (128, 128), "kv <= q", torch.bfloat16, "", ()),
        ("hopper", 128, 128, (128, 128), "kv <= q", torch.bfloat16, softcap, ()),
        ("hopper", 64, 64, (128, 128), window, torch.bfloat16, " ; sink T0(h)", (head,)),
        (
            "hopper",
            128,
            128,
            (128, 128),
            f"(kv <= q) & {left}",
            torch.bfloat16,
            "s + T1(h)*(kv - q)",
            (head.long(), head),
        ),
        (
            "hopper",
            128,
            128,
            (128, 128),
            "kv <= q + T0()",
            torch.bfloat16,
            "s + T1(0, h, q, kv)",
            (torch.tensor(0), bias),
        ),
        (
            "hopper",
            80,
            80,
            (64, 128),
            "(kv <= q) & Ne(T0(b, 0, q, kv), 0)",
            torch.bfloat16,
            "s/T1()",
            (bias.bool(), torch.ones(())),
        ),
        ("hopper", 256, 256, (128, 128), window, torch.bfloat16, softcap, ()),
        ("portable", 128, 128, (128, 128), "kv <= q", torch.bfloat16, "", ()),
        ("portable", 80, 80, (64, 64), "kv <= q", torch.float32, "", ()),
        ("portable", 128, 128, (128, 128), window, torch.bfloat16, f"{softcap} ; sink T0(h)", (head,)),
    )


def main() -> None:
    triton.runtime.driver.set_active(NamedTarget())
    real = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **kwargs)
        print(f"  {self.fn.__name__}: {resources(kernel)}", flush=True)
        return kernel

    def launched(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kernel[grid](*args, **constants)

    JITFunction.run = warm_up
    # A remembered launch would go to the device, and there is none.
    direct.launch = launched
    device.capability = lambda device: (9, 0)
    device.multiprocessors = lambda device: 132
    for template, d, dv, blocks, mask, dtype, score, tensors in cases():
        q, k, v = (
            torch.empty(1, 2, 8192, d, dtype=dtype),
            torch.empty(1, 1, 8192, d, dtype=dtype),
            torch.empty(1, 1, 8192, dv, dtype=dtype),
        )
        scalars = (0,) if "S0" in mask else ()
        for pooling in ("mean", "max", "mass"):
            share = {"stride": 8, "key_stride": 8, "share": "heads", "kept": 0.5} if pooling == "mass" else {}
            spec = SelectionSpec(pooling=pooling, block_q=blocks[0], block_k=blocks[1], **share).text()
            print(f"{template} d{d}/{dv} {blocks} {dtype} {mask} {pooling}{' [' + score + ']' if score else ''}")
            attention = Attention(q, k, v, mask, 0.1, spec, score, tensors, scalars)
            lists = attention.selection(*cuda.select(attention, "select"))
            if pooling == "max":
                cuda.select(replace(attention, q=q[:, :, :8100]), "select")  # its last row of blocks is cut short
                cuda.select(replace(attention, spec_text=f"{spec},score_dtype=fp8"), "select")
        cuda.attend(attention, lists, template)


if __name__ == "__main__":
    main()
