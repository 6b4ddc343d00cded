import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from purekv.memory import PeakMemory

MIB = 2**20


def peak_of(device: str, mebibytes: int) -> int:
    with PeakMemory(torch.device(device)) as peak:
        torch.ones(mebibytes * MIB // 4, device=device)
    return peak.bytes


def test_a_freed_buffer_counts_and_an_earlier_one_does_not() -> None:
    # In a process of its own: here the allocator may still hold what earlier tests have freed.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        small, large, small_again = pool.map(peak_of, ["cpu"] * 3, (1, 400, 1))
    assert large - small > 350 * MIB
    assert small_again < large - 350 * MIB


@pytest.mark.gpu
def test_cuda_counts_allocations() -> None:
    assert peak_of("cuda", 400) - peak_of("cuda", 1) > 350 * MIB
