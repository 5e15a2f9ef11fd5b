"""Runs every kernel once on a tiny shape, for the thread sanitizer (sanitize.sh).

To it each emulated thread is one of its own, and only barriers and shuffles order two of them: a
missing one is reported, also where no order of execution would change the result.
"""

import torch
from conftest import Case

from emulation import plugin

OFFSETS = [(True, False), (True, True), (False, True), (False, False)]


def main():
    torch.set_num_threads(1)
    plugin.load()
    # Channels for one vector per thread and for one channel; two tiles of pixels and of channels.
    # Depthwise and not.
    for channels, groups in (132, 132), (9, 9), (66, 3):
        for kernel, data in OFFSETS:
            case = Case(
                batch=1, channels=channels, groups=groups, size=(6, 8),
                scope=(4, 4) if kernel else (3, 3), kernel_offset=kernel, data_offset=data,
            )  # fmt: skip
            for layout in torch.channels_last, torch.contiguous_format:
                tensors = case.tensors(torch.float32)
                tensors["input"] = tensors["input"].contiguous(memory_format=layout)
                output = torch.ops.dk_emulated.deform_kernel_conv2d(**tensors, **case.arguments)
                del tensors["bias"]
                for deterministic in False, True:
                    torch.ops.dk_emulated.deform_kernel_conv2d_backward(
                        torch.ones_like(output),
                        **tensors,
                        **case.arguments,
                        output_mask=[True, True, kernel, data],
                        deterministic=deterministic,
                    )
    print("no races")


if __name__ == "__main__":
    main()
