"""The CUDA sources, compiled for the CPU: docs/testing_cuda_without_a_gpu.md.

build.py     compiles csrc/cuda/*.cu with g++ over the shadow headers of include/, cached
emulator.cpp runs blocks of threads as fibers
plugin.py    runs any test of the operators over the CUDA sources
"""
