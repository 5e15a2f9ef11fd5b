"""Loads the extension ``dk_detectron._C``, which registers the operators with torch.

Schemas are in ``csrc/deform_kernel.cpp``, kernels in ``csrc/cpu`` and ``csrc/cuda``.
"""

try:
    from .. import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "dk_detectron._C, the compiled operators, is missing or was built for another PyTorch: "
        f"{error}. Build it with `python setup.py build_ext --inplace` in a clone, or "
        "`pip install --no-build-isolation .`"
    ) from error
