"""What numbers were measured on, and what a report of a bug needs to say."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from stem_compile import __version__

PACKAGES = ("torch", "triton", "transformers", "sympy", "numpy", "hypothesis", "matplotlib")
"""Packages whose versions matter, the optional ones among them."""


def describe(device: str) -> str:
    """One line: the GPU, or the CPU cores and memory this process may use; with torch's version."""
    if torch.device(device).type == "cuda":
        place = (
            f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory >> 30} GiB"
        )
    else:
        place = processor()
    return f"{place}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"


def settings(
    target: str, device: str, dtype: torch.dtype, options: dict[str, Any], stopped: bool = False
) -> dict[str, Any]:
    """What a report's numbers depend on. stopped: the user stopped the work, and its results are not all."""
    return {
        "target": target,
        "machine": describe(device),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "options": options,
        "versions": {"stem-compile": __version__, "python": platform.python_version(), **versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stopped": stopped,
    }


def versions() -> dict[str, str | None]:
    """Version of each package of ``PACKAGES``; None where it is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def environment() -> dict[str, str | None]:
    """Lines of ``stem-compile env`` by their names; None for a package that is not installed."""
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    toolkit = torch.version.cuda or torch.version.hip
    return {
        "stem-compile": f"{__version__} ({Path(__file__).parents[1]})",
        "python": f"{platform.python_version()} ({platform.platform()})",
        **versions(),
        "torch build": f"{'ROCm' if torch.version.hip else 'CUDA'} {toolkit}" if toolkit else "CPU",
        "GPU": ", ".join(devices) or "none",
        "CPU": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "kernels": kernels(),
        "cache": _cache(),
        "environment": ", ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if _matters(k)) or "nothing set",
    }


def kernels() -> str:
    """The kernels that attention runs on here, in words."""
    if not torch.cuda.is_available():
        return "cpu: PyTorch's own calls"
    if versions()["triton"] is None:
        return "none for the GPU, whose attention stays dense: pip install 'stem-compile[gpu]'"
    hopper = torch.version.cuda and torch.cuda.get_device_capability()[0] == 9
    return "cuda: " + ("Gluon for Hopper, Triton elsewhere" if hopper else "Triton") + "; cpu: PyTorch's own calls"


def _matters(variable: str) -> bool:
    return variable.startswith(("STEM_COMPILE_", "TORCH_LOGS", "TORCHINDUCTOR_", "TRITON_", "CUDA_VISIBLE", "OMP_NUM"))


def _cache() -> str:
    """Where generated kernels and measurements lie, with their number."""
    from stem_compile.config import cache_folder

    folder = cache_folder()
    return f"{folder} ({sum(1 for _ in folder.iterdir())} files)" if folder.is_dir() else f"{folder} (empty)"


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Cores, name and memory of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{cores()} cores of {next(names, platform.processor() or platform.machine())}, {_memory()}"


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return "memory unknown"
    return f"{size / 2**30:.0f} GiB"
