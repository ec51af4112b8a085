"""Peak memory of a piece of work, in a process of its own (Linux)."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """The most that this process has held in memory so far, in MiB (VmHWM of proc(5)).

    Not `getrusage`: its ru_maxrss starts at what the parent process held.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_a_process(function: Callable[..., float], *args: Any) -> float:
    """What `function(*args)` returns, called in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return pool.submit(function, *args).result()
