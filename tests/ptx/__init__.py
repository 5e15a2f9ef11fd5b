"""Runs what nvcc made of the CUDA kernels, without a GPU: docs/testing_cuda_without_a_gpu.md.

build.py       compiles csrc/cuda/*.cu to PTX, cached
parser.py      reads PTX
registers.py   what operands mean
arithmetic.py  what instructions compute
memory.py      checked memory: bounds, alignment, unwritten bytes, races
decode.py      makes functions of instructions
machine.py     runs the threads of a launch: branches, barriers, shuffles
device.py      takes the launches of the emulated operators (tests/emulation) and runs their PTX
arena.cpp      memory whose tensors have known ends
counts.py      what accesses cost: sectors and wavefronts
costs.py       the same of the kernels at full size, as a table
faults.cu      kernels with one fault each, for tests/test_ptx_machine.py
"""
