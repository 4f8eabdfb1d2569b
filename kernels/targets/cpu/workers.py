"""Threads for kernels made of many small ATen calls: each works alone on its own piece, so nothing waits for the
slowest one of a call."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

MOST = 8
"""Python threads at most: beyond, the interpreter lock is what they wait for, so each gets several of torch's own
threads instead."""


def run(work: Callable[[Piece], None], pieces: Iterable[Piece]) -> None:
    """``work(piece)`` for every piece, taken in order by as many threads as torch would use. Raises what ``work``
    raises."""
    threads = torch.get_num_threads()
    count = min(threads, MOST)
    source, lock = iter(pieces), threading.Lock()

    def drain() -> None:
        # Thread-local: without it the pieces would record autograd graphs, or refuse to write to inference tensors.
        with torch.inference_mode():
            while True:
                with lock:
                    piece = next(source, None)
                if piece is None:
                    return
                work(piece)

    if count == 1:
        return drain()
    for job in [_pool(os.getpid(), count, threads // count).submit(drain) for _ in range(count)]:
        job.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, count: int, share: int) -> ThreadPoolExecutor:
    """``count`` threads with ``share`` threads of torch each. A fork needs its own: ``process`` is part of the key."""
    threads = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def start() -> None:
        # A thread's first question for the number sets it to the default, whatever was set before.
        torch.get_num_threads()
        torch.set_num_threads(share)
        ready.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="stem-compile", initializer=start)
    for _ in range(count):
        pool.submit(lambda: None)
    ready.wait()
    # set_num_threads is thread-local but also the default of threads to come: put that back.
    torch.set_num_threads(threads)
    return pool
