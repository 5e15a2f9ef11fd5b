"""Runs every kernel once on a tiny shape, for the thread sanitizer (sanitize.sh).

python tests/race_check.py dk_emulated     the CUDA kernels: to the sanitizer each emulated thread
                                           is one of its own; barriers and shuffles alone order two
python tests/race_check.py dk_detectron    those for the CPU, by four threads: extension/threads.cpp

What nothing orders is reported, also where no order of execution would change the result.
"""

import sys

import torch
from conftest import Case
from emulation import plugin


def cases():
    # Channels for vectors, in two tiles, and for one each, whose kernels take any size; two tiles
    # of pixels. A small scope: every cell is a block of 256 threads, and threads are dear here.
    # Depthwise, and not.
    for channels, groups, size in (36, 36, 3), (9, 9, 2), (66, 3, 3):
        for kernel, data in (True, False), (True, True), (False, True), (False, False):
            scope = size + (kernel and size == 3)
            yield Case(
                batch=1, channels=channels, groups=groups, size=(6, 8), kernel=(size, size),
                scope=(scope, scope), kernel_offset=kernel, data_offset=data,
            )  # fmt: skip


def run(
    namespace: str,
    case: Case,
    layout: torch.memory_format,
    deterministic: bool,
    dtype: torch.dtype = torch.float32,
):
    tensors = case.tensors(dtype)
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    torch.use_deterministic_algorithms(deterministic)
    plugin.call(namespace, tensors, case)


def main(namespace: str):
    torch.set_num_threads(1)
    if namespace == "dk_emulated":
        plugin.load()
    for case in cases():
        run(namespace, case, torch.channels_last, False)
        if case.kernel_offset and not case.data_offset:  # a kernel of its own
            run(namespace, case, torch.contiguous_format, False)
        if case.data_offset:  # a gather instead of a scatter
            run(namespace, case, torch.channels_last, True)
    # Dense, without columns in memory: two tiles of outputs, several of pixels and of channels.
    case = Case(batch=1, channels=24, out_channels=72, groups=1, size=(6, 9))
    run(namespace, case, torch.channels_last, False, torch.bfloat16)
    print("no races")


if __name__ == "__main__":
    main(sys.argv[1])
