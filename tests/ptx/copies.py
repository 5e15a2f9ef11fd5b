"""cp.async: copies from global to shared memory, which are there once their threads have waited."""

import numpy as np

from .memory import COMING, WRITTEN, Fault, Memory, SharedMemory, Threads

BYTES = 16  # of each
_SIZES = (0, 4, 8, BYTES)  # that may be read for it; zeros fill the rest


class Copies:
    """Global memory is read at once. In shared memory nobody may read the bytes before they land.

    They may land at any time in between, so it is written both when a copy starts and at the wait,
    as the race checker sees it.
    """

    def __init__(self, source: Memory, target: SharedMemory, threads: Threads):
        self.source, self.target, self.threads = source, target, threads
        # Of each instruction: threads, offsets in shared memory, bytes.
        self.pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def start(self, target, source, sizes, active):
        """Of the active threads: both addresses, and how many bytes are read."""
        if not np.isin(sizes, _SIZES).all():
            raise NotImplementedError(f"cp.async that reads {sorted(set(sizes.tolist()))} bytes")
        self.source.check_alignment(source - self.source.base, BYTES)
        data = np.zeros((len(active), BYTES), np.uint8)
        for size in _SIZES[1:]:
            some = np.flatnonzero(sizes == size)
            if len(some):
                offset = self.source.access(source[some], size, self.threads, active[some], "read")
                data[some, :size] = self.source.data[offset[:, None] + np.arange(size)]
        offset = self.target.access(target, BYTES, self.threads, active, "write")
        self.target.state[offset[:, None] + np.arange(BYTES)] = COMING
        self.pending.append((active, offset, data))

    def wait(self, mask):
        """Until all that these threads have started is there."""
        pending, self.pending = self.pending, []
        for active, offset, data in pending:
            waits = mask[active]
            if waits.any():
                self._land(active[waits], offset[waits], data[waits])
            if not waits.all():
                self.pending.append((active[~waits], offset[~waits], data[~waits]))

    def _land(self, active, offset, data):
        if self.target.shadow:
            self.target.shadow.access(offset, BYTES, self.threads, active, "write")
        at = offset[:, None] + np.arange(BYTES)
        self.target.data[at] = data
        self.target.state[at] = WRITTEN

    def check_returning(self, mask):
        left = sum(int(mask[active].sum()) for active, _, _ in self.pending)
        if left:
            raise Fault(f"before {left} copies are there")
