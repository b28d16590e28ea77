"""The contenders: how a module becomes something to time, and the programs that the library is compared with."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Runner
from pyext import backend

FORMATS = {"": torch.contiguous_format, " channels_last": torch.channels_last}
"""What a contender's name ends with, and the memory format of its model and input."""

_TESTS = Path(__file__).resolve().parent.parent / "tests"


@functools.cache
def from_tests(name: str) -> types.ModuleType:
    """A helper module of the tests, such as the stand-in for the published program, by its path under ``tests/``."""
    path = _TESTS / name
    if not path.exists():
        raise FileNotFoundError(f"no {name} in {_TESTS}: benchmarks run in a checkout of the project")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where the helper finds the helpers beside it
    return importlib.import_module(path.stem)


@dataclass(frozen=True)
class Subject:
    """A module to call, with its parameters and running statistics in an order that all contenders share."""

    call: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]
    running: Sequence[Tensor]


def module_subject(module: nn.Module, parameters: Sequence[str], running: Sequence[str]) -> Subject:
    """`module` as a subject, its tensors by their state-dict names."""
    return Subject(module, [module.get_parameter(n) for n in parameters], [module.get_buffer(n) for n in running])


def compiled(subject: Subject, training: bool) -> Subject:
    """`subject` through torch.compile, with freezing (parameters become constants) unless it is for training."""
    # Said here because the compiler's cache would else return code for the threads of an earlier process.
    options = {"freezing": not training, "cpp.threads": torch.get_num_threads()}
    return Subject(torch.compile(subject.call, dynamic=False, options=options), subject.parameters, subject.running)


def autocast(subject: Subject, device: torch.device, dtype: torch.dtype) -> Subject:
    """`subject` under torch.autocast where `dtype` is not float32 (mixed precision as in training recipes)."""
    if dtype == torch.float32:
        return subject

    def call(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return subject.call(x).float()  # the loss is computed in float32, as recipes do

    return Subject(call, subject.parameters, subject.running)


def on_backend(subject: Subject, name: str) -> Subject:
    """`subject`, its operators asked for backend `name`."""

    def call(x: Tensor) -> Tensor:
        with backend(name):
            return subject.call(x)

    return Subject(call, subject.parameters, subject.running)


def exact_float32() -> None:
    """Float32 means float32: without TF32, which rounds a GPU's float32 products to 10 bits."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def graphed(runner: Runner) -> Runner:
    """`runner` captured as a CUDA graph and replayed: the device's time, without that of launching from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what allocates or tunes on its first calls must not do so while it is captured
            runner.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner.run()

    def results() -> dict[str, Tensor]:
        graph.replay()
        return {"out": out.clone()}

    return Runner(graph.replay, results)


def forget_compiled() -> None:
    """Drop what torch.compile holds, so that one case's variants do not burden the next one's look-ups."""
    torch._dynamo.reset()


def inference_runner(subject: Subject, x: Tensor) -> Runner:
    """One forward pass without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return subject.call(x)

    return Runner(run, lambda: {"out": run()})


def gradient_runner(subject: Subject, u: Tensor, grad_out: Tensor) -> Runner:
    """Forward and backward in training mode, with the gradients of the input and of every parameter."""
    u = u.detach().requires_grad_()

    def run() -> Tensor:
        _clear_gradients((u, *subject.parameters))
        out = subject.call(u)
        out.backward(grad_out)
        return out

    restore = _restorer(subject)

    def results() -> dict[str, Tensor]:
        restore()
        out = run()
        return {"out": out, "grad_u": u.grad, **_training_results(subject)}

    return Runner(run, results)


def step_runner(subject: Subject, images: Tensor, labels: Tensor, gradients: bool = True) -> Runner:
    """One training step: forward, cross-entropy, backward, SGD with the paper's settings at a small learning rate.

    `gradients`: whether those of the parameters are among the results.
    """
    optimizer = torch.optim.SGD(subject.parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(subject.call(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    restore = _restorer(subject)

    def results() -> dict[str, Tensor]:
        restore()
        optimizer.state.clear()
        found = {"loss": run(), **_training_results(subject)}
        return found if gradients else {name: value for name, value in found.items() if name != "grad_parameters"}

    return Runner(run, results, optimizer.zero_grad)


def _clear_gradients(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def _restorer(subject: Subject) -> Callable[[], None]:
    tensors = [*subject.parameters, *subject.running]
    initial = [tensor.detach().clone() for tensor in tensors]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, initial, strict=True):
                tensor.copy_(value)

    return restore


def _training_results(subject: Subject) -> dict[str, Tensor]:
    return {
        "grad_parameters": torch.cat([parameter.grad.flatten() for parameter in subject.parameters]),
        "running": torch.cat([statistic.flatten() for statistic in subject.running]).clone(),
    }


def missing_engines() -> list[str]:
    """Inference engines that could be peers and are not installed."""
    return [name for name in INFERENCE_ENGINES if importlib.util.find_spec(name) is None]


def openvino_runner(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Runner:
    """`module` converted to OpenVINO, computing in `dtype` on as many threads as torch has; x and result in float32."""
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    with torch.no_grad():
        converted = openvino.convert_model(module, example_input=x)
    model = openvino.compile_model(converted, "CPU", settings)
    request, array = model.create_infer_request(), x.numpy()
    return _engine_runner(lambda: request.infer([array])[0])


def onnxruntime_runner(module: nn.Module, x: Tensor) -> Runner:
    """`module` exported to ONNX and run by ONNX Runtime on as many threads as torch has."""
    import onnxruntime

    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return _engine_runner(lambda: session.run(None, feed)[0])


def _engine_runner(run: Callable[[], object]) -> Runner:
    return Runner(run, lambda: {"out": torch.as_tensor(run()).clone()})


INFERENCE_ENGINES = {"openvino": openvino_runner, "onnxruntime": onnxruntime_runner}
BFLOAT16_ENGINES = ("openvino",)
"""Those that compute in bfloat16 when asked to, by a third argument."""
