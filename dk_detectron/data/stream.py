"""Training data as an endless stream that can be entered anywhere: what exact resumption rests on.

A sample is the pair (position, index): its place in the stream over all processes, and what it
shows. Its augmentation is seeded by the position, so that neither the number of workers nor where
training was interrupted changes it.
"""

from __future__ import annotations

import random
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

Loader = TypeVar("Loader", bound=DataLoader)


def seed_from(*key: int) -> int:
    """One 32-bit seed, a function of ``key``.

    Raises:
        ValueError: an integer of it is negative.
    """
    if min(key) < 0:
        raise ValueError(f"SEED: expected integers of at least 0, got {key}")
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """The generators of Python, numpy and torch (CPU) start at ``key``, and are put back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_from(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SampleStream(Sampler):
    """Batches of this process's samples, from batch ``start`` on, without loading those before.

    Attributes:
        start: the number of batches to leave out, which iteration reads when it begins.
    """

    def __init__(self, sampler: Sampler, batch_size: int, groups: Sequence | None = None):
        """
        Args:
            sampler: one of detectron2's training samplers: indices for this process, without end.
            batch_size: samples of this process in a batch.
            groups: the group of each index, if a batch may only hold samples of one.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = groups
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._batches(), self.start, None)

    def _batches(self):
        waiting = defaultdict(list)
        positions = count(comm.get_rank(), comm.get_world_size())
        for position, index in zip(positions, self.sampler, strict=False):
            group = None if self.groups is None else self.groups[index]
            waiting[group].append((position, index))
            if len(waiting[group]) == self.batch_size:
                yield waiting.pop(group)


class SampleDataset(Dataset):
    """``dataset[index]`` for the samples of a stream, each seeded by its position."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, sample: tuple[int, int]) -> Any:
        position, index = sample
        with seeded(self.seed, position):
            return self.dataset[index]


def nearest_multiples(number: int, of: int) -> str:
    """The one below and the one above, in words."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


def local_batch_size(total_batch_size: int) -> int:
    """The share of each process.

    Raises:
        ValueError: it is not a whole number.
    """
    processes = comm.get_world_size()
    if total_batch_size < processes or total_batch_size % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH: expected a multiple of the {processes} processes, "
            f"got {total_batch_size}: take {nearest_multiples(total_batch_size, processes)}"
        )
    return total_batch_size // processes


def outlive_signals(worker: int) -> None:
    """A worker's: what asks the whole job to stop lets it finish the batches for the step in hand.

    Its process ends it when it stops itself; a second SIGTERM ends it in any case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def build_stream_loader(
    dataset: Dataset,
    sampler: Sampler,
    *,
    total_batch_size: int,
    seed: int,
    groups: Sequence | None = None,
    loader: Callable[..., Loader] = DataLoader,  # type: ignore[assignment]
    **options,
) -> Loader:
    """An endless loader whose ``batch_sampler`` is a :class:`SampleStream`.

    Args:
        options: more arguments of ``DataLoader``.
    """
    return loader(
        SampleDataset(dataset, seed),
        batch_sampler=SampleStream(sampler, local_batch_size(total_batch_size), groups),
        # Else every new iterator would draw from the global generator, which belongs to the model.
        generator=torch.Generator(),
        worker_init_fn=outlive_signals,
        **options,
    )
