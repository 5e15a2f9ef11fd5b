"""The CUDA sources on the CPU, against the CPU operators, in every order of their threads.

docs/testing_cuda_without_a_gpu.md says how; tests/test_ops.py runs over the same kernels under
DK_TEST_EMULATED_CUDA.
"""

import ctypes
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    DENSE,
    MATRIX_SUMMANDS,
    ODD,
    Case,
    assert_close,
    assert_close_to_exact,
    double,
    off_knot_offset,
)
from emulation import plugin
from emulation.plugin import call
from fragments import (
    check_copy,
    check_doubled,
    check_pairs,
    check_product,
    check_sum,
    check_transpose,
)

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

F32 = torch.float32
OFFSETS = {
    "kernel": {"kernel_offset": True, "data_offset": False},
    "data": {"kernel_offset": False, "data_offset": True, "scope": (3, 3)},
    "both": {"kernel_offset": True, "data_offset": True},
    "neither": {"kernel_offset": False, "data_offset": False, "scope": (3, 3)},
}
every_offset = pytest.mark.parametrize("which", OFFSETS)


@pytest.fixture(scope="module", autouse=True)
def _emulated_operators():
    plugin.load()


def assert_same_bits(actual, expected, hint):
    for name in expected:
        same = torch.equal(actual[name].nan_to_num(123.0), expected[name].nan_to_num(123.0))
        assert same, f"{name} depends on the order of the threads: {hint}"


def check(case, dtype=torch.float32, layout=torch.contiguous_format, ignored=(), **changed):
    """Every order gives the same bits, and those are the CPU's numbers for the same, in double."""
    tensors = {**case.tensors(dtype), **changed}
    tensors["input"] = tensors["input"].contiguous(memory_format=layout)
    expected = call("dk_detectron", double(tensors), case)
    actual = None
    for name in plugin.ORDERS:
        with plugin.order(name):
            result = call("dk_emulated", tensors, case)
        actual = actual or result
        assert_same_bits(result, actual, f"{name} against {plugin.ORDERS[0]}")
    for name in ignored:
        del actual[name], expected[name]
    assert_close_to_exact(actual, expected, case)


@pytest.mark.usefixtures("deterministic")
class TestEveryOrder:
    @every_offset
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("channels", [1, 3, 17, 32, 130, 144])
    def test_channels(self, channels, layout, which):
        check(Case(channels=channels, **OFFSETS[which]), layout=layout)

    @every_offset
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
    )
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_types(self, dtype, layout, which):
        case = Case(channels=24, bias=False, **OFFSETS[which])
        check(case, dtype, layout)

    @pytest.mark.parametrize("dtype", [F32, *MATRIX_SUMMANDS], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize(
        "case",
        [
            Case(batch=3, channels=8, size=(5, 9), scope=(3, 3), padding=(2, 0), clip=False),
            Case(channels=8, size=(9, 9), padding=(0, 2)),
            Case(channels=24, size=(4, 8), scope=(3, 3), padding=(0, 0)),
            Case(channels=72, size=(9, 10), padding=(2, 2), clip=False, bias=False),
            Case(channels=144, size=(3, 5), scope=(3, 3), padding=(0, 2)),
            Case(channels=144, size=(8, 9), padding=(2, 0)),
        ],
        ids=str,
    )
    def test_tensor_cores(self, case, dtype, monkeypatch):
        """Images that end within a tile, or with it; blocks of several tiles, or one each.

        Of float32, forward.
        """
        assert case.on_tensor_cores(torch.bfloat16)
        for processors in "1", "20":
            monkeypatch.setenv("DK_EMULATED_PROCESSORS", processors)
            check(case, dtype, torch.channels_last)

    @every_offset
    @pytest.mark.parametrize("batch", [0, 1, 3])
    def test_batches_and_odd_geometry(self, batch, which):
        check(Case(batch=batch, channels=8, **{**ODD, **OFFSETS[which]}))

    @pytest.mark.parametrize("clip", [True, False], ids=["clip", "open"])
    @pytest.mark.parametrize(
        "scope", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (9, 9), (4, 1), (2, 7)], ids=str
    )
    def test_scopes(self, scope, clip):
        check(Case(channels=8, scope=scope, clip=clip, size=(9, 8)))
        check(Case(channels=8, scope=scope, clip=clip, size=(5, 4), data_offset=True))

    @every_offset
    @pytest.mark.parametrize(
        "kernel, padding", [((1, 1), (0, 0)), ((5, 5), (2, 2)), ((2, 3), (3, 0))], ids=str
    )
    def test_kernels(self, kernel, padding, which):
        offsets = dict(OFFSETS[which])
        offsets["scope"] = (4, 4) if offsets["kernel_offset"] else kernel
        check(Case(channels=5, kernel=kernel, padding=padding, **offsets))

    @every_offset
    def test_strides_longer_than_the_kernel(self, which):
        """Some input pixels feed no output; some taps lie in the padding for all of them."""
        check(Case(channels=8, size=(9, 10), stride=(4, 5), padding=(3, 4), **OFFSETS[which]))

    @every_offset
    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (40, 3)], ids=str)
    def test_thin_images(self, size, which):
        check(Case(batch=5, channels=8, size=size, **OFFSETS[which]))

    @every_offset
    def test_many_blocks(self, which, monkeypatch):
        """More than one split, group of channel tiles, and tile per block; ragged ends of each."""
        case = Case(batch=3, channels=180, size=(7, 9), **OFFSETS[which])
        for processors in "1", "3", "20":
            monkeypatch.setenv("DK_EMULATED_PROCESSORS", processors)
            check(case)

    @every_offset
    @pytest.mark.parametrize("kilobytes", [227, 99, 64, 48])
    def test_less_shared_memory(self, kilobytes, which, monkeypatch):
        monkeypatch.setenv("DK_EMULATED_SHARED_BYTES", str(kilobytes * 1024))
        offsets = dict(OFFSETS[which])
        if offsets["kernel_offset"]:
            offsets["scope"] = (7, 7)
        check(Case(channels=8, **offsets))

    @every_offset
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_offsets_beyond_reason(self, value, which):
        case = Case(channels=8, **OFFSETS[which])
        changed = {}
        for name in "kernel_offset", "data_offset":
            if getattr(case, name):
                changed[name] = off_knot_offset((2, 18, 6, 7), dtype=torch.float32)
                changed[name][0, 5, 2, 3] = changed[name][1, 8, 0, 0] = value
        # Which pixels a NaN location smears its gradient over is nobody's promise.
        check(case, ignored=["grad_input"] if value != value else [], **changed)

    @every_offset
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("shape", [(3, 5, 1), (40, 7, 1), (66, 6, 3), (8, 16, 8)], ids=str)
    def test_groups(self, shape, layout, which):
        channels, out_channels, groups = shape
        sizes = {"channels": channels, "out_channels": out_channels, "groups": groups}
        check(Case(**sizes, **OFFSETS[which]), torch.float64, layout)
        check(Case(batch=3, **sizes, **{**ODD, **OFFSETS[which]}), torch.float64, layout)

    @pytest.mark.parametrize("dtype", MATRIX_SUMMANDS, ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("case", DENSE, ids=str)
    def test_dense_on_tensor_cores(self, case, dtype):
        assert case.in_registers(torch.bfloat16)
        check(case, dtype, torch.channels_last)

    @pytest.mark.parametrize(
        "case, dtype",
        [
            *((Case(channels=8), dtype) for dtype in (F32, *MATRIX_SUMMANDS)),
            *((DENSE[0], dtype) for dtype in MATRIX_SUMMANDS),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("version, on_tensor_cores", [("75", False), ("80", True)])
    def test_code_for_older_gpus(self, version, on_tensor_cores, case, dtype, monkeypatch):
        """Whatever GPU runs it: of PTX for 7.5 the kernels on tensor cores are a trap."""
        monkeypatch.setenv("DK_EMULATED_PTX_VERSION", version)
        names = []

        def see(name, *_):
            names.append(name)
            return False

        with plugin.launcher(see):
            check(case, dtype, torch.channels_last)
        assert any(b"matrix_kernel" in name for name in names) == on_tensor_cores

    def test_small_factors_of_float16(self):
        """2^-20 times a coefficient is none of its normal numbers; times large pixels, it is."""
        case = Case(channels=16, out_channels=24, groups=1, modulated=True)
        tensors = case.tensors(torch.float16)
        offset = tensors["kernel_offset"].float()
        offset[:, 18:] *= 2.0**-20
        changed = {"input": tensors["input"] * 2**13, "kernel_offset": offset}
        check(case, torch.float16, torch.channels_last, ignored=("grad_input",), **changed)

    @pytest.mark.parametrize("data", [False, True], ids=["kernel", "both"])
    @pytest.mark.parametrize(
        "kernel, scope", [((1, 1), (2, 2)), ((3, 3), (5, 5)), ((2, 3), (4, 7)), ((3, 3), (19, 23))]
    )
    def test_groups_of_any_scope(self, kernel, scope, data):
        """The last has room for few pixels in shared memory."""
        sizes = {"channels": 6, "out_channels": 4, "groups": 2, "kernel": kernel, "scope": scope}
        check(Case(data_offset=data, clip=data, **sizes), torch.float64)

    def test_misaligned_storage(self):
        case = Case(channels=8, data_offset=True)
        tensors = case.tensors(torch.float32)
        shifted = torch.empty(tensors["input"].numel() + 1)[1:].view(2, 6, 7, 8).permute(0, 3, 1, 2)
        check(case, input=shifted.copy_(tensors["input"]))

    @pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=lambda d: str(d)[6:])
    def test_misaligned_dense_storage(self, dtype):
        """Only under AddressSanitizer does it show if the kernels read it as it is."""
        case = DENSE[0]
        tensors = case.tensors(dtype)
        image, weight = (
            torch.empty(tensors[name].numel() + 1, dtype=dtype)[1:] for name in ("input", "weight")
        )
        image = image.view(2, 6, 7, 8).permute(0, 3, 1, 2).copy_(tensors["input"])
        weight = weight.view(8, 8, 4, 4).copy_(tensors["weight"])
        check(case, dtype, torch.channels_last, input=image)
        check(case, dtype, torch.channels_last, weight=weight)

    @every_offset
    def test_misaligned_weight(self, which):
        case = Case(channels=8, **OFFSETS[which])
        weight = case.tensors(torch.float32)["weight"]
        shifted = torch.empty(weight.numel() + 1)[1:].view_as(weight)
        check(case, layout=torch.channels_last, weight=shifted.copy_(weight))


@pytest.mark.parametrize("order", plugin.ORDERS)
@pytest.mark.parametrize("which", ["data", "both"])
@pytest.mark.parametrize("groups", [20, 4], ids=["depthwise", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_scatter_by_atomics(dtype, groups, which, order):
    """The default for grad_input under a data_offset: the same up to rounding."""
    case = Case(channels=20, groups=groups, **OFFSETS[which])
    tensors = case.tensors(dtype)
    with plugin.order(order):
        assert_close(
            call("dk_emulated", tensors, case), call("dk_detectron", double(tensors), case)
        )


@pytest.mark.parametrize(
    "which, deterministic",
    [("kernel", False), ("data", True), ("both", False), ("both", True)],
    indirect=["deterministic"],
)
def test_more_columns_than_a_tile_holds(which, deterministic):
    """Of 64 MiB: the second begins within a row and within an image."""
    shape = {"batch": 5} if which == "data" else {"batch": 3, "scope": (5, 5)}
    sizes = {"channels": 2048, "out_channels": 2, "groups": 1, "size": (9, 11)}
    case = Case(**{**sizes, **OFFSETS[which], **shape})
    tensors = case.tensors(torch.float64)
    bytes_of_columns = 8 * math.prod([case.batch, 9, 11, 2048, *case.scope])
    assert 1 < bytes_of_columns / 2**26 < 2 and math.ceil(case.batch * 99 / 2) % 11
    expected = call("dk_detectron", tensors, case)
    assert_close(call("dk_emulated", tensors, case), expected)


def test_a_padded_image_has_positions_of_32_bits():
    case = Case(padding=(1 << 30, 1), stride=((1 << 31) - 1, 1))
    with pytest.raises(
        RuntimeError, match="2\\^31 in a padded row or column.* padding 1073741824x1"
    ):
        call("dk_emulated", case.tensors(torch.float32), case)


def test_columns_have_positions_of_32_bits():
    pixel = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    input, weight = pixel.expand(1, 2**27, 1, 1), pixel.expand(1, 2**27, 4, 4)
    case = Case(channels=2**27, groups=1, kernel=(1, 1), padding=(0, 0))
    with pytest.raises(
        RuntimeError, match="2\\^31 values for each output channel, got 134217728x4x4"
    ):
        torch.ops.dk_emulated.deform_kernel_conv2d(
            input, weight, None, torch.zeros(1, 2, 1, 1), None, **case.arguments
        )


def test_large_images_have_room():
    """A few of them touch a tile of 32 pixels, however many pixels they have."""
    case = Case(batch=1, channels=1, size=(1500, 1500), stride=(260, 260))
    tensors = case.tensors(torch.float32)
    emulated, expected = (
        getattr(torch.ops, name).deform_kernel_conv2d(**tensors, **case.arguments)
        for name in ("dk_emulated", "dk_detectron")
    )
    assert emulated.shape == (1, 1, 6, 6)
    assert_close(emulated, expected)


def test_missing_kernel_image_names_the_cure(monkeypatch):
    monkeypatch.setenv("DK_EMULATED_LAUNCH_ERROR", "209")
    case = Case()
    with pytest.raises(RuntimeError, match='rebuild it with TORCH_CUDA_ARCH_LIST="9.0"'):
        call("dk_emulated", case.tensors(torch.float32), case)


def test_a_failed_launch_is_an_error(monkeypatch):
    monkeypatch.setenv("DK_EMULATED_LAUNCH_ERROR", "719")
    case = Case()
    with pytest.raises(RuntimeError, match="719"):
        call("dk_emulated", case.tensors(torch.float32), case)


def test_shared_memory_over_48_kb_is_only_on_request():
    """As on the device: a kernel that did not ask for it with cudaFuncSetAttribute is not launched.

    So every test above of a scope that needs more would fail without launch.cuh asking. For less
    than all there is it must not ask: that would be taken from other threads' launches.
    """
    launch = ctypes.CDLL(str(plugin.load())).dk_emulated_launch
    kilobyte, ok, invalid = 1024, 0, 1
    assert launch(48 * kilobyte, 0) == ok
    assert launch(48 * kilobyte + 1, 0) == invalid
    assert launch(0, 64 * kilobyte) == invalid
    assert launch(0, 228 * kilobyte) == invalid
    assert launch(64 * kilobyte, 227 * kilobyte) == ok
    assert launch(227 * kilobyte + 1, 227 * kilobyte) == invalid


@pytest.fixture
def run_product():
    kernel = ctypes.CDLL(str(plugin.load())).dk_emulated_product
    kernel.restype = ctypes.c_char_p

    def run(name, *registers):
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in registers)
        if message := kernel(name.encode(), len(registers[0]), *pointers):
            raise RuntimeError(message.decode())

    return run


@pytest.mark.parametrize("order", plugin.ORDERS)
def test_tensor_cores(order, run_product):
    with plugin.order(order):
        check_product(run_product, "half")
        check_product(run_product, "bfloat16")
        check_transpose(run_product)


def test_arithmetic_of_pairs(run_product):
    check_pairs(run_product, "half")
    check_pairs(run_product, "bfloat16")
    check_doubled(run_product)


@pytest.mark.parametrize("name", ["product", "transpose"])
def test_tensor_cores_want_the_whole_warp(name, run_product):
    registers = np.zeros((3, 64, 4), np.uint32)
    with pytest.raises(RuntimeError, match="16 at a warp barrier, 48 have returned"):
        run_product(f"{name}_of_half_a_warp", *registers)


@pytest.mark.parametrize("order", plugin.ORDERS)
def test_sums_of_vectors(order, run_product):
    with plugin.order(order):
        check_sum(run_product)


@pytest.mark.parametrize("order", plugin.ORDERS)
def test_copies(order, run_product):
    with plugin.order(order):
        check_copy(run_product)


@pytest.mark.parametrize(
    "name, message",
    [
        ("misaligned", "copy_async: not aligned"),
        ("misaligned_in_shared", "copy_async: not aligned"),
        ("never_awaited", "a thread returns before its copies are there"),
    ],
)
def test_copies_that_must_not_be(name, message, run_product):
    with pytest.raises(RuntimeError, match=message):
        run_product(f"copy_{name}", *np.zeros((3, 32, 4), np.uint32))


def test_copies_are_not_there_before_the_wait(run_product):
    out = np.zeros((32, 4), np.uint32)
    run_product("copy_read_too_early", *np.zeros((2, 32, 4), np.uint32), out)
    assert (out[:, 0] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("data", [False, True], ids=["kernel", "both"])
def test_many_taps_of_a_dense_kernel(data, monkeypatch):
    """Backward needs more room, and so has fewer pixels in a block; or there is none for one."""
    monkeypatch.setenv("DK_EMULATED_SHARED_BYTES", "49152")
    shape = {"groups": 1, "batch": 1, "padding": (0, 0), "data_offset": data}
    case = Case(kernel=(10, 9), scope=(10, 9), size=(12, 11), **shape)
    tensors = case.tensors(torch.float64)
    expected = call("dk_detectron", tensors, case)
    assert_close(call("dk_emulated", tensors, case), expected)

    side, coefficients = (33, 32) if data else (45, 16)  # bytes, and as many for their gradients
    case = Case(kernel=(side, side), scope=(side, side), size=(side, side + 1), **shape)
    message = f"needs {side**2 * (2 * coefficients + 8)} bytes of shared memory and this GPU has"
    with pytest.raises(RuntimeError, match=f"{message}.*composed_deform_kernel_conv2d"):
        call("dk_emulated", case.tensors(torch.float32), case)


def test_scope_too_large_for_the_device(monkeypatch):
    monkeypatch.setenv("DK_EMULATED_SHARED_BYTES", "49152")
    case = Case(kernel=(60, 59), scope=(60, 59), size=(60, 61), padding=(0, 0))
    # Dense: of each tap four coefficients of four bytes, and where they are in eight.
    kernel = f"a kernel of 60x59 needs {60 * 59 * 24} bytes "
    for groups, message in (3, "a scope of 60x59 "), (1, kernel):
        case = replace(case, groups=groups)
        with pytest.raises(RuntimeError, match=f"{message}.*composed_deform_kernel_conv2d"):
            call("dk_emulated", case.tensors(torch.float32), case)
    # Columns do without the scope in shared memory.
    case = replace(case, kernel=(3, 3), size=(6, 7))
    tensors = case.tensors(torch.float32)
    expected = call("dk_detectron", double(tensors), case)
    assert_close(call("dk_emulated", tensors, case), expected)
