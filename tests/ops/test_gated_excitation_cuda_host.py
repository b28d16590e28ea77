"""The CUDA kernels of `gated_excitation`, run on the CPU by the host shim in tests/cuda_host, against float64."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F
from cuda_host.device import Device
from cuda_host.library import Library
from torch import Tensor

from pyext.ops.gated_excitation import PARAMETERS, RUNNING, parameter_shapes, reference

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-float32"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.float16, torch.float32, id="float16-float32"),
]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# (batch, channels, height, width), rows of fc1, rows of fcall
SHAPES = [
    pytest.param((5, 12, 9, 7), 6, 12, id="odd"),
    pytest.param((6, 8, 8, 8), 4, 8, id="vectors"),
    pytest.param((5, 70, 3, 5), 5, 33, id="many-channels"),
    pytest.param((5, 3, 23, 25), 1, 2, id="many-positions"),
    pytest.param((7, 1, 1, 1), 1, 1, id="ones"),
    pytest.param((6, 4, 1, 37), 2, 3, id="row"),
]
LAYOUTS = [
    "contiguous",
    "channels_last",
    "channel_slice",
    "channels_last_slice",
    "channels_last_odd_slice",
    "crop",
    "rows",
    "transposed",
    "offset",
]
ULPS = 8
FULL_SHARED_MEMORY = 227 * 1024


class ImageTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class Inputs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("parameter_dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 6),
        ("u", ImageTensor),
        ("parameters", ctypes.c_void_p * len(PARAMETERS)),
        ("running", ctypes.c_void_p * len(RUNNING)),
        ("training", ctypes.c_int32),
        ("eps", ctypes.c_float),
    ]


SAVED = ("position", "pooled", "hidden", "map_statistics", "hidden_statistics")


class Saved(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in SAVED]


def image_tensor(x: Tensor) -> ImageTensor:
    return ImageTensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to `x` with the strides that `layout` names; what lies between its elements is NaN."""
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channel_slice":
        return nan(n, c + 5, h, w, dtype=x.dtype)[:, 3 : 3 + c].copy_(x)
    if layout == "channels_last_slice":
        wide = nan(n, c + 16, h, w, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        return wide[:, 8 : 8 + c].copy_(x)
    if layout == "channels_last_odd_slice":
        wide = nan(n, c + 5, h, w, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        return wide[:, 3 : 3 + c].copy_(x)
    if layout == "rows":
        return nan(n, c, h + 1, w, dtype=x.dtype)[:, :, :h].copy_(x)
    if layout == "offset":
        return nan(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if layout == "crop":
        return nan(n, c, h + 2, w + 4, dtype=x.dtype)[:, :, 1 : 1 + h, 2 : 2 + w].copy_(x)
    assert layout == "transposed"
    return nan(n, c, w, h, dtype=x.dtype).transpose(2, 3).copy_(x)


class Case:
    """Inputs of one call, drawn from `seed`, and the results of the definition in any dtype."""

    def __init__(self, shape, forget, attention, dtype, parameter_dtype, training, layout="contiguous", seed=0):
        g = torch.Generator().manual_seed(seed)
        n, c = shape[:2]

        def normal(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return torch.randn(size, generator=g) * scale + shift

        self.training, self.eps = training, 1e-5
        self.shapes = parameter_shapes(c, forget, attention)
        self.sizes = (*shape, forget, attention)
        # Images that differ in their means: BN1d over a batch of equal ones would magnify rounding at will.
        self.u = laid_out((normal(*shape) + normal(n, c, 1, 1, shift=0.5)).to(dtype), layout)
        self.grad_out = laid_out(normal(*shape).to(dtype), layout)
        self.parameters = [normal(*size, scale=0.5, shift=0.2).to(parameter_dtype) for size in self.shapes.values()]
        self.running: list[Tensor] = []
        if not training:
            for name in RUNNING:
                size = self.shapes[name.rsplit(".", 1)[0] + ".weight"]
                drawn = normal(*size, scale=0.3)
                self.running.append((drawn.abs() + 0.5 if name.endswith("var") else drawn).to(parameter_dtype))

    def inputs(self, device: Device) -> Inputs:
        parameters = [device.copy(name, p).data_ptr() for name, p in zip(PARAMETERS, self.parameters, strict=True)]
        running = [device.copy(name, r).data_ptr() for name, r in zip(RUNNING, self.running, strict=False)]
        return Inputs(
            DTYPE_CODES[self.u.dtype],
            DTYPE_CODES[self.parameters[0].dtype],
            (ctypes.c_int64 * 6)(*self.sizes),
            image_tensor(device.copy("u", self.u)),
            (ctypes.c_void_p * len(PARAMETERS))(*parameters),
            (ctypes.c_void_p * len(RUNNING))(*running),
            self.training,
            self.eps,
        )

    def reference(self, dtype: torch.dtype | None = None, mirror: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Output, gradient of u and gradients of the parameters by layer; by plain torch in `dtype` or the inputs'.

        `mirror` names dimensions along which the images (and the kernels) are mirrored for the computation.
        """
        u, grad_out = (self._copy(x, dtype).flip(mirror) for x in (self.u, self.grad_out))
        parameters = [
            self._copy(p, dtype).flip([d for d in mirror if d > 0 and name.endswith("conv.weight")])
            for name, p in zip(PARAMETERS, self.parameters, strict=True)
        ]
        running = [self._copy(r, dtype) for r in self.running] or [None] * len(RUNNING)
        inputs = [x.requires_grad_() for x in (u, *parameters)]
        out = reference(u, parameters, running, self.training, 0.0, self.eps)
        gradients = list(torch.autograd.grad(out, inputs, grad_out))
        for i, name in enumerate(PARAMETERS):
            if name.endswith("conv.weight"):
                gradients[i + 1] = gradients[i + 1].flip([d for d in mirror if d > 0])
        return {"out": out.detach().flip(mirror), "grad_u": gradients[0].flip(mirror), **layers(gradients[1:])}

    @staticmethod
    def _copy(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return x.detach().to(dtype or x.dtype, copy=True)

    def saved_reference(self, dtype: torch.dtype, mirror: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """What forward keeps for backward, by plain torch in `dtype`; `mirror` as in `reference`."""
        p = {name: x.to(dtype) for name, x in zip(PARAMETERS, self.parameters, strict=True)}
        r = {name: x.to(dtype) for name, x in zip(RUNNING, self.running, strict=False)}
        u = self.u.to(dtype).flip(mirror)
        maps = [u]
        for name, dilation in (("conv_3x3", 1), ("conv_5x5", 2)):
            norm = f"{name}.norm."
            statistics = r.get(norm + "running_mean"), r.get(norm + "running_var")
            x = F.batch_norm(u, *statistics, p[norm + "weight"], p[norm + "bias"], self.training, 0.0, self.eps)
            kernel = p[name + ".conv.weight"].flip([d for d in mirror if d > 0])
            maps.append(F.conv2d(F.relu(x), kernel, None, 1, dilation, dilation, groups=u.shape[1]))
        contexts = ("global_forget_context", "global_context3x3", "global_context5x5")
        logits = torch.cat([F.conv2d(x, p[name + ".weight"]) for x, name in zip(maps, contexts, strict=True)], dim=1)
        position = logits.flatten(2).softmax(2)
        pooled = torch.stack([(x.flatten(2) * position[:, b : b + 1]).sum(2) for b, x in enumerate(maps)], dim=1)
        forget = F.linear(pooled[:, 0], p["fc1.weight"].flatten(1), p["fc1.bias"])
        attention = F.linear(pooled[:, 1:].flatten(1), p["fcall.weight"].flatten(1), p["fcall.bias"])
        hidden = torch.cat([forget, attention], dim=1)
        kept = {
            "position": position.view_as(logits).flip(mirror).flatten(2),
            "pooled": pooled.flip([d for d in mirror if d == 0]),
            "hidden": hidden.flip([d for d in mirror if d == 0]),
        }
        if self.training:
            for name, x, dims in (("map_statistics", u, (0, 2, 3)), ("hidden_statistics", hidden, (0,))):
                variance, mean = torch.var_mean(x, dims, correction=0)
                kept[name] = torch.stack([mean, variance])
        return kept


def layers(gradients: list[Tensor]) -> dict[str, Tensor]:
    """Gradients by layer: those of a bias before a normalisation are zero but for rounding of the layer's others."""
    named = zip(PARAMETERS, gradients, strict=True)
    grouped = itertools.groupby(named, key=lambda item: item[0].rsplit(".", 1)[0])
    return {name: torch.cat([gradient.flatten() for _, gradient in items]) for name, items in grouped}


class Kernels:
    """The library's launchers on torch tensors, which they get copies of in the shim's global memory."""

    def __init__(
        self,
        library: Library,
        device: Device,
        shared_memory: int = FULL_SHARED_MEMORY,
        descending_threads: bool = False,
    ) -> None:
        self.library, self.device = library, device
        library.functions.set_shared_memory_limit(ctypes.c_size_t(shared_memory))
        library.functions.set_descending_threads(int(descending_threads))

    def forward(self, case: Case, save: bool, out: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        n, c, h, w, forget, attention = case.sizes
        shapes = {
            "position": (n, 3, h * w),
            "pooled": (n, 3, c),
            "hidden": (n, forget + attention),
            "map_statistics": (2, c),
            "hidden_statistics": (2, forget + attention),
        }
        wanted = [name for name in SAVED if (case.training if "statistics" in name else save)]
        saved = {name: self.device.empty(name, *shapes[name]) for name in wanted}
        result = self.device.empty_like("out", case.u if out is None else out)
        inputs = case.inputs(self.device)
        self.library.call(
            "gated_excitation_forward",
            ctypes.byref(inputs),
            int(save),
            ctypes.byref(image_tensor(result)),
            ctypes.byref(self.pointers(saved)),
            ctypes.c_void_p(self.workspace("forward", inputs, int(save)).data_ptr()),
        )
        return result, {name: self.device.freeze(tensor) for name, tensor in saved.items()}

    def backward(self, case: Case, saved: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        grad_u = self.device.empty_like("grad_u", case.u)
        flat = self.device.empty("grad_parameters", sum(p.numel() for p in case.parameters))
        inputs = case.inputs(self.device)
        self.library.call(
            "gated_excitation_backward",
            ctypes.byref(inputs),
            ctypes.byref(image_tensor(self.device.copy("grad_out", case.grad_out))),
            ctypes.byref(self.pointers(saved)),
            ctypes.byref(image_tensor(grad_u)),
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_void_p(self.workspace("backward", inputs).data_ptr()),
        )
        parts = flat.split([p.numel() for p in case.parameters])
        return grad_u, [x.view_as(p) for x, p in zip(parts, case.parameters, strict=True)]

    def workspace_bytes(self, which: str, inputs: Inputs, *arguments: int) -> int:
        size = ctypes.c_size_t()
        function = f"gated_excitation_{which}_workspace_bytes"
        self.library.call(function, ctypes.byref(inputs), *arguments, ctypes.byref(size))
        return size.value

    def workspace(self, which: str, inputs: Inputs, *arguments: int) -> Tensor:
        return self.device.empty("workspace", self.workspace_bytes(which, inputs, *arguments), dtype=torch.uint8)

    @staticmethod
    def pointers(saved: dict[str, Tensor]) -> Saved:
        return Saved(*[saved[name].data_ptr() if name in saved else None for name in SAVED])


def assert_accurate(results: dict[str, Tensor], plain: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> None:
    """Error against float64 at most twice that of plain torch, plus a few units in the last place of the result."""
    for name, result in results.items():
        exact = truth[name]
        assert not result.isnan().any(), f"{name}: NaN"
        error = max_error(result, exact)
        plain_error = max(max_error(computed[name], exact) for computed in plain)
        unit = torch.finfo(result.dtype).eps * exact.abs().max().item()
        assert error <= 2 * plain_error + ULPS * unit, f"{name}: error {error:.3e}, plain torch {plain_error:.3e}"


def max_error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item()


# Plain torch's error is drawn by chance too: it is the worst of its results for the images as they are and mirrored.
MIRRORS = [(), (0, 2), (0, 3), (2, 3)]


def check_forward(kernels: Kernels, case: Case, save: bool) -> None:
    kernels.library.forget_launches()
    out, saved = kernels.forward(case, save)
    truth, saved_truth = case.reference(torch.float64), case.saved_reference(torch.float64)
    assert_accurate({"out": out}, [case.reference(None, m) for m in MIRRORS], truth)
    assert_accurate(saved, [case.saved_reference(torch.float32, m) for m in MIRRORS], saved_truth)
    kernels.library.verify_launches([truth["out"], *saved_truth.values()])


def check_backward(kernels: Kernels, case: Case) -> None:
    saved = kernels.forward(case, save=True)[1]
    kernels.library.forget_launches()
    grad_u, gradients = kernels.backward(case, saved)
    truth = case.reference(torch.float64)
    assert_accurate({"grad_u": grad_u}, [case.reference(None, m) for m in MIRRORS], truth)
    assert_accurate(layers(gradients), [case.reference(torch.float32, m) for m in MIRRORS], truth)
    kernels.library.verify_launches(truth.values())


def run_covering_checks(library: Library, device: Device) -> None:
    """Runs every instance of every kernel; test_kernel_coverage.py finds this function by its name."""
    shapes = [(5, 8, 12, 22), (5, 5, 23, 19)]  # with and without vectors
    shared_memory = [FULL_SHARED_MEMORY, 4_000]  # with the image in shared memory and without
    layouts = ["contiguous", "channels_last"]
    for shape, dtypes, training, layout, limit in itertools.product(
        shapes, DTYPES, (False, True), layouts, shared_memory
    ):
        kernels = Kernels(library, device, limit)
        case = Case(shape, 3, 5, *dtypes.values, training, layout, seed=6)
        check_forward(kernels, case, save=False)
        check_backward(kernels, case)
        device.reset()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), DTYPES)
@pytest.mark.parametrize(("shape", "forget", "attention"), SHAPES)
def test_forward_and_backward(library, device, shape, forget, attention, dtype, parameter_dtype, training):
    case = Case(shape, forget, attention, dtype, parameter_dtype, training)
    kernels = Kernels(library, device)
    check_forward(kernels, case, save=False)
    check_forward(kernels, case, save=True)
    check_backward(kernels, case)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 8, 4, 6), (5, 5, 7, 3)], ids=["vectors", "odd"])
def test_layouts(library, device, shape, dtype, layout, training):
    case = Case(shape, 3, 5, dtype, dtype, training, layout, seed=1)
    kernels = Kernels(library, device)
    check_forward(kernels, case, save=False)
    check_backward(kernels, case)


# Bytes of shared memory that hold, of the image (15.5 kB) and the maps (5.8 kB; 11.6 kB in backward) beside 2 kB that
# are always there, the image alone, the maps alone, and neither.
@pytest.mark.parametrize("shared_memory", [18_000, 15_000, 7_000], ids=["image", "maps", "neither"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_less_shared_memory(library, device, layout, training, shared_memory):
    case = Case((5, 12, 19, 17), 6, 12, torch.float32, torch.float32, training, layout, seed=2)
    kernels = Kernels(library, device, shared_memory)
    check_forward(kernels, case, save=False)
    check_backward(kernels, case)


@pytest.mark.parametrize(("shared_memory", "maps_are_global"), [(18_000, True), (15_000, False), (7_000, True)])
def test_maps_are_in_the_workspace_where_shared_memory_is_full(library, device, shared_memory, maps_are_global):
    inputs = Case((5, 12, 19, 17), 6, 12, torch.float32, torch.float32, False, seed=2).inputs(device)
    for which, more in (("forward", (0,)), ("backward", ())):
        sizes = []
        for limit in (FULL_SHARED_MEMORY, shared_memory):
            sizes.append(Kernels(library, device, limit).workspace_bytes(which, inputs, *more))
        assert (sizes[1] > sizes[0]) == maps_are_global


# What lies between the elements of a slice is out of bounds: writing there is an error.
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_output_into_a_slice(library, device, dtype, layout, training):
    case = Case((2, 8, 5, 8), 4, 8, dtype, dtype, training, seed=3)
    kernels = Kernels(library, device)
    out = laid_out(torch.zeros_like(case.u), layout)
    assert torch.equal(kernels.forward(case, save=False, out=out)[0], kernels.forward(case, save=False)[0])


# A missing barrier shows when the threads of a block take their turns in another order.
@pytest.mark.parametrize("shared_memory", [FULL_SHARED_MEMORY, 12_000], ids=["shared", "global"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 6, 8, 8), "contiguous"), ((2, 12, 19, 31), "channels_last"), ((2, 70, 3, 5), "contiguous")],
    ids=["groups", "stretches", "tables"],
)
def test_results_are_the_same_bits_in_any_order_of_threads(library, device, shape, layout, training, shared_memory):
    case = Case(shape, 3, 6, torch.float32, torch.float32, training, layout, seed=4)
    results = []
    for descending_threads in (False, True):
        kernels = Kernels(library, device, shared_memory, descending_threads)
        fused = kernels.forward(case, save=False)[0]
        out, saved = kernels.forward(case, save=True)
        grad_u, gradients = kernels.backward(case, saved)
        results.append([fused, out, *saved.values(), grad_u, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_empty_batch(library, device, training):
    case = Case((0, 6, 4, 4), 3, 6, torch.float32, torch.float32, training)
    kernels = Kernels(library, device)
    out, saved = kernels.forward(case, save=True)
    assert out.shape == (0, 6, 4, 4)
    assert all(not value.any() for value in saved.values())
    assert all(not gradient.any() for gradient in kernels.backward(case, saved)[1])


def test_nan_reaches_the_image_it_is_in_and_no_other(library, device):
    case = Case((2, 4, 5, 5), 2, 4, torch.float32, torch.float32, False)
    case.u[1, 2, 3, 1] = float("nan")
    plain, plain_saved = reference(case.u, case.parameters, case.running), case.saved_reference(torch.float32)
    for save in (False, True):
        out, saved = Kernels(library, device).forward(case, save)
        assert out[1].isnan().all()
        assert torch.equal(out.isnan(), plain.isnan())
        assert all(torch.equal(value.isnan(), plain_saved[name].isnan()) for name, value in saved.items())


def test_statistics_of_a_large_mean(library, device):
    case = Case((4, 3, 16, 16), 2, 3, torch.float32, torch.float32, True, seed=5)
    case.u += 1000.0
    check_forward(Kernels(library, device), case, save=True)


def test_too_many_channels_is_an_error(library, device):
    case = Case((1, 40, 2, 2), 2, 2, torch.float32, torch.float32, False)
    with pytest.raises(RuntimeError, match="too many channels for the shared memory"):
        Kernels(library, device, 2048).forward(case, save=False)
