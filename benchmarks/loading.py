"""How fast are the pictures? One core, from memory: `python benchmarks/loading.py`.

CIFAR10_QA needs CIFAR-10, under $VDM_DATA_DIR or over a network; without both the same grids are made of digits, and the line
says so.
"""

from __future__ import annotations

import time

import torch

from vdm_utils.data import load_data
from vdm_utils.errors import VDMError


def seconds(work, repeats: int = 20) -> float:
    """Median time of one call."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def main() -> None:
    torch.set_num_threads(1)
    shapes = load_data("shapes", "train")
    each = seconds(lambda: shapes.batch(range(256)))
    print(f"shapes: {256 / each:,.0f} pictures per second in batches of 256")
    name, note = "CIFAR10_QA", ""
    try:
        grids = load_data(name, "test")
    except VDMError:
        name, note = "digits_QA", " (CIFAR-10 is not here)"
        grids = load_data(name, "test")
    each = seconds(lambda: grids.batch(range(32)))
    print(f"{name}: {each * 1e3:.1f} ms for a batch of 32 grids of {grids.image_size[0]}×{grids.image_size[1]}{note}")


if __name__ == "__main__":
    main()
