"""What only a GPU has: streams, CUDA graphs, its memory, and the kernels that it really runs."""

from __future__ import annotations

import torch
from operators import DEVICE, OPERATORS, draw, each_backend, each_mode, each_operator, each_operator_with, on_device

from bench.resources import report, triton_kernels
from bench.samples import SAMPLES
from bench.small_calls import run_all


@each_backend
@each_operator
def test_work_goes_to_the_current_stream(name, backend):
    """The input is written on that stream after a wait: work on another one would read what was there before."""
    samples, call = SAMPLES[name], on_device(draw(name))
    first = next(iter(call.leaves))
    u = call.leaves[first]
    stale = torch.zeros_like(u)
    with torch.no_grad():
        expected = samples.run(call, False, backend=backend)
        call.leaves[first] = stale
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            stale.copy_(u)
            actual = samples.run(call, False, backend=backend)
        stream.synchronize()
    assert torch.equal(actual, expected)


@each_mode
@each_backend
@each_operator
def test_is_captured_in_a_cuda_graph(name, backend, training):
    samples, call = SAMPLES[name], on_device(draw(name), differentiable=True)
    leaves = list(call.leaves.values())
    other = torch.randn(leaves[0].shape, device=DEVICE, dtype=leaves[0].dtype)

    def step():
        out = samples.run(call, training, backend=backend)
        return out, *(torch.autograd.grad(out.sum(), leaves) if samples.differentiable else ())

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].copy_(other)
    graph.replay()
    replayed = [x.clone() for x in captured]
    for actual, expected in zip(replayed, step(), strict=True):
        assert torch.equal(actual, expected)


@each_backend
@each_operator_with("independent_images")
def test_more_than_two_to_the_31_elements(name, backend):
    samples = SAMPLES[name]
    call = on_device(draw(name, torch.bfloat16))
    first = next(iter(call.leaves))
    image = call.leaves[first].shape[1:]
    batch = 2**31 // image.numel() + 2
    large = torch.randn((batch, *image), device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        call.leaves[first] = large
        out = samples.run(call, False, backend=backend)
        for part in (slice(0, 3), slice(batch - 3, batch)):
            call.leaves[first] = large[part].clone()
            assert torch.equal(out[part], samples.run(call, False, backend=backend))


def executed_kernels() -> set[str]:
    """Names of all kernels that a run of the small calls starts."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run_all(DEVICE, OPERATORS, ("cuda", "triton"))
    return {event.key for event in profile.key_averages()}


def test_small_calls_run_every_kernel():
    """What compute-sanitizer sees by bench/gpu.sh is all that there is."""
    executed = executed_kernels()
    recorded = report.read()
    cuda = {key.split("<")[0].rsplit("::")[-1] for key in recorded["cuda"].kernels["sm_90"]}
    triton = {kernel for module in triton_kernels.modules() for kernel in triton_kernels.declared_kernels(module)}
    missing = {kernel for kernel in cuda | triton if not any(kernel in name for name in executed)}
    assert missing == set()
