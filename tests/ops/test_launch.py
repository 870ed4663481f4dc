"""A launch is repeated without Triton only where nothing that a kernel is compiled for differs."""

import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import product as pairs
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lq_kernels import _launch
from lq_kernels._launch import cdiv, launch, next_power_of_2
from lq_kernels.rowwise import quantize_columnwise_transposed, quantize_rowwise
from lq_kernels.scaled_mm import int8_mm, scaled_mm
from torch import Tensor


class Kernel:
    """Counts what goes through Triton, and what goes around it."""

    arg_names = ("x_ptr", "y_ptr", "M", "stride", "BLOCK", "DERIVED")

    def __init__(self, loaded: bool = True) -> None:
        self.loaded = loaded
        self.through: list[tuple[Any, ...]] = []
        self.around: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def through_triton(*args: Any, **constants: Any) -> Any:
            self.through.append((grid, args, constants))
            return Compiled(self)

        return through_triton


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.module = object() if kernel.loaded else None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.around.append((grid, args))


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    before = dict(_launch._COMPILED)
    _launch._COMPILED.clear()
    yield
    _launch._COMPILED.clear()
    _launch._COMPILED.update(before)


def test_the_second_launch_goes_around_triton_with_the_pointers_of_its_own_tensors() -> None:
    kernel, (x, y, z) = Kernel(), torch.zeros(3, 16)
    launch(kernel, 7, (x, None), (5, 1), BLOCK=4, num_warps=2)
    assert kernel.through == [((7,), (x, None, 5, 1), {"BLOCK": 4, "num_warps": 2})]
    assert kernel.around == []
    for other in (x, y, z):
        launch(kernel, 7, (other, None), (5, 1), BLOCK=4, num_warps=2)
    # The two constexpr parameters at the end are compiled in.
    assert kernel.around == [((7, 1, 1), (t.data_ptr(), None, 5, 1, None, None)) for t in (x, y, z)]
    assert len(kernel.through) == 1


def changed() -> dict[str, dict[str, Any]]:
    x = torch.zeros(64)
    plain: dict[str, Any] = {"programs": 7, "tensors": (x, None), "numbers": (5, 1), "BLOCK": 4, "num_warps": 2}
    return {
        "programs": plain | {"programs": 8},
        "a number": plain | {"numbers": (5, 16)},
        "a constant": plain | {"BLOCK": 8},
        "the name of a constant": {"DERIVED" if name == "BLOCK" else name: value for name, value in plain.items()},
        "an option": plain | {"num_warps": 4},
        "dtype": plain | {"tensors": (x.view(torch.int32), None)},
        "alignment": plain | {"tensors": (x[1:], None)},
        "device": plain | {"tensors": (x.as_subclass(OfAnotherGpu), None)},
        "a tensor in the place of none": plain | {"tensors": (x, x)},
        "none in the place of a tensor": plain | {"tensors": (None, x)},
        "no tensor": plain | {"tensors": (None, None)},
        "a descriptor": plain | {"tensors": (descriptor(x, 16), None)},
        "dtype of a descriptor": plain | {"tensors": (descriptor(x.view(torch.int32), 16), None)},
        "a block of a descriptor": plain | {"tensors": (descriptor(x, 32), None)},
        "device of a descriptor": plain | {"tensors": (descriptor(x.as_subclass(OfAnotherGpu), 16), None)},
    }


class OfAnotherGpu(Tensor):
    def get_device(self) -> int:
        return 1


def descriptor(base: Tensor, block: int) -> SimpleNamespace:
    return SimpleNamespace(base=base, block_shape=[block, 16])


def test_whatever_a_kernel_is_compiled_for_makes_another_launch() -> None:
    kernel = Kernel()
    launch(kernel, 7, (torch.zeros(64), None), (5, 1), BLOCK=4, num_warps=2)
    for number, (what, arguments) in enumerate(changed().items(), start=2):
        programs, tensors, numbers = (arguments.pop(key) for key in ("programs", "tensors", "numbers"))
        launch(kernel, programs, tensors, numbers, **arguments)
        assert len(kernel.through) == number, what
        launch(kernel, programs, tensors, numbers, **arguments)
        assert len(kernel.around) == number - 1, what
    other = Kernel()
    launch(other, 7, (torch.zeros(64), None), (5, 1), BLOCK=4, num_warps=2)
    assert len(other.through) == 1


def arguments() -> list[Any]:
    """Tensors, descriptors of them and None; every two that Triton could take for different are there."""
    descriptors = pytest.importorskip("triton.tools.tensor_descriptor")
    memory = torch.zeros(4096, dtype=torch.uint8)
    found: list[Any] = [None, OfAnotherGpu(), memory[:0]]
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        for start in (0, 4, 8, 16, 64):
            x = memory[start : start + 1024].view(dtype)
            found += [x, x[:5], x[::3], x.view(-1, 32).t()]
    for base, block in pairs((found[3], found[3].view(torch.float16)), ([16, 16], [16, 32], [32, 16])):
        shapes = ([64, 16], [64, 1]), ([5, 7], [48, 1]), ([1, 16], [16, 1])
        found += [descriptors.TensorDescriptor(base, *shape, block) for shape in shapes]
    return found


@pytest.mark.parametrize("backend", ["nvidia.compiler.CUDABackend", "amd.compiler.HIPBackend"])
def test_what_goes_around_triton_is_the_same_to_triton(backend: str) -> None:
    specialized = specializations(backend)
    of_key: dict[Any, Any] = {}
    for argument in arguments():
        _launch._COMPILED.clear()
        launch(Kernel(), 1, (argument,), (), BLOCK=4)
        (key,) = _launch._COMPILED
        assert of_key.setdefault(key[1:], specialized(argument)) == specialized(argument)
    assert len(set(of_key.values())) > 12


def specializations(backend: str) -> Callable[[Any], Any]:
    """What Triton compiles a kernel for, of an argument without an annotation."""
    pytest.importorskip("triton")
    from triton._C.libtriton import native_specialize_impl

    module, _, name = backend.rpartition(".")
    of_gpu = getattr(pytest.importorskip(f"triton.backends.{module}"), name)
    return lambda argument: native_specialize_impl(of_gpu, argument, False, True, True)


def test_a_kernel_that_is_remembered_is_not_freed() -> None:
    """Its id could become that of another."""

    class Loaded:
        module = object()

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args: None

    class Unrecorded(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: Loaded()

    kernel = Unrecorded()
    launch(kernel, 1, (torch.zeros(4), None), (1, 1), BLOCK=4)
    watched = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert watched() is not None
    _launch._COMPILED.clear()
    gc.collect()
    assert watched() is None


def test_what_was_interpreted_or_only_compiled_is_not_remembered() -> None:
    kernel = Kernel(loaded=False)
    for _ in range(2):
        launch(kernel, 1, (torch.zeros(4), None), (1, 1), BLOCK=4)
    assert len(kernel.through) == 2
    assert _launch._COMPILED == {}


def test_so_many_launches_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST", 3)
    kernel, x = Kernel(), torch.zeros(4)
    for number in range(10):
        launch(kernel, 1, (x, None), (number, 1), BLOCK=4)
        assert len(_launch._COMPILED) <= 3
    launch(kernel, 1, (x, None), (9, 1), BLOCK=4)
    assert len(kernel.around) == 1


def test_plain_integers_are_tritons() -> None:
    assert [cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 1000, 1024, 1025)] == [1, 1, 2, 4, 4, 1024, 1024, 2048]


def ops(x: Tensor) -> tuple[Tensor, ...]:
    """Kernels with and without seeds, scales and descriptors; x (M, K) bfloat16, as many rows as columns."""
    codes, scale = quantize_rowwise(x)
    turned, column_scale = quantize_columnwise_transposed(x)
    product = scaled_mm(codes, turned.t(), scale, column_scale.t(), None, torch.bfloat16)
    return codes, scale, turned, product, int8_mm(codes, codes.t())


def expected(x: Tensor) -> tuple[Tensor, ...]:
    return ops(x.cpu())


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for value, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [1, 5, 15, 16, 17, 96, 128])
def test_a_repeated_launch_on_a_gpu_gives_the_same(side: int) -> None:
    buffer = torch.randn(side * side + 3 * side + 8, device="cuda").bfloat16()
    strides = [(side, 1), (1, side), (side + 3, 1), (0, 1), (1, 0)]
    for _ in range(2):
        for start, stride in pairs((0, 1, 8), strides):
            x = buffer.as_strided((side, side), stride, start)
            assert_equal(ops(x), expected(x))


@pytest.mark.gpu
def test_a_captured_graph_replays_launches_that_are_remembered_and_new_ones() -> None:
    """On the stream of the capture, with the pointers of the graph's memory."""
    for remembered in (False, True):
        _launch._COMPILED.clear()
        x = torch.randn(256, 256, device="cuda").bfloat16()
        for _ in range(2 if remembered else 0):
            ops(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert_equal(captured, expected(x))
            assert_equal(ops(x), expected(x))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_one_gpu_has_compiled_does_not_run_on_another() -> None:
    x = torch.randn(256, 256).bfloat16()
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        assert_equal(ops(x.to(device)), expected(x))
