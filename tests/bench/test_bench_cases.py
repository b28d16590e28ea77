"""The cases themselves: what they count, and that their contenders give what the gate expects."""

import dataclasses
import functools

import pytest
import torch

from bench import networks
from bench import test_bn_relu_conv2d as convolution
from bench import test_densenet as densenet
from bench import test_gated_excitation as operator
from bench import test_hcgnet as hcgnet
from bench import test_hybrid_block as block
from bench import test_masked_conv2d as masked
from bench import test_memory_contrast as memory_bank
from bench import test_memory_update as bank_update
from bench import test_peer_contrast as peers
from bench import test_subnet_execution as subnets
from bench.case import Case, Contender, Gate
from bench.peers import Subject, gradient_runner, step_runner
from pyext.models.hcgnet import HCGNet

CPU = torch.device("cpu")


def assert_contenders_pass(case: Case) -> None:
    """All but torch.compile, which takes long, pass the gate, before and after a run that is not looked at."""
    gate = Gate(case)
    for contender in case.contenders:
        if "torch.compile" not in contender.name:
            runner = contender.build()
            gate.check(contender, runner.results())
            runner.run()
            gate.check(contender, runner.results())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_has_a_name_of_its_own_and_peers_to_beat(device):
    device = torch.device(device)
    modules = operator, convolution, block, masked, memory_bank, bank_update, peers, hcgnet, densenet, subnets
    cases = [case for module in modules for case in module.cases(device)]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names)
        assert {contender.ours for contender in case.contenders} == {True, False}
        assert set(case.plain) <= set(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_pass_the_gate(kernel, dtype, monkeypatch):
    monkeypatch.setattr(convolution, "BATCH", 3)
    setup = convolution.Setup(convolution.Layer(6, 4, 8, kernel, 1, 2 if kernel == 3 else 1), CPU, dtype)
    kinds = ["pyext cpu", "eager", "eager channels_last", *["pyext"] * (dtype == torch.float32)]
    contenders = [Contender(kind, functools.partial(setup.build, kind), "pyext" in kind) for kind in kinds]
    assert_contenders_pass(dataclasses.replace(convolution._case(setup), contenders=contenders))


def test_gpu_cases_of_bn_relu_conv2d_cover_both_dtypes_and_both_backends():
    cases = convolution.cases(torch.device("cuda"))
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    for case in cases:
        assert {"pyext cuda", "pyext triton", "eager"} < {contender.name for contender in case.contenders}


def test_masked_layers_pass_the_gate():
    setup = masked.Setup(16, 24, 5, 3, CPU)
    case = masked._case(setup)
    assert setup.work().operations == 3 * 25 * 6 * (18 * 4 + 3)
    assert setup.work().bytes == 4 * (9 * 4 * 6 + 3 * 25 * (4 + 6))
    assert_contenders_pass(case)


def test_sub_networks_of_one_batch_pass_the_gate():
    mixed = subnets.Mixed(CPU)
    case = subnets._mixed_case(CPU)
    ours = mixed.ours().results()["out"]
    assert ours.shape == (64, subnets.CLASSES)
    gate = Gate(case)
    gate.check(case.contenders[0], {"out": ours})


def test_block_work_of_one_position():
    # Two convolutions of each module, by hand for the first: 48 x 24 and 9 x 12 x 12 multiply-adds.
    cells = [48 * (24 + 12 * m) + 9 * 12 * 12 for m in range(block.MODULES)]
    gates = block.MODULES * operator.inference_work(1, 12, 1).operations
    work = block.work(24, 12, 1, 1)
    assert work.operations == 2 * sum(cells) + gates
    assert work.bytes == 4 * (sum(cells) + 24 + 120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_contenders_pass_the_gate(dtype):
    case = block._case(block.Setup(5, 4, 6, 2, CPU, dtype))
    assert_contenders_pass(case)


def test_operator_work_of_the_smallest_shape():
    # C=2, P=1: 56*2 + 9 per image, small matrices 2*(2*1*2 + 2*4 + 2*2*2) = 40; backward 120 per element and twice 40.
    assert operator.inference_work(3, 2, 1).operations == 3 * (56 * 2 + 9 + 40)
    assert operator.inference_work(64, 12, 1024, 2).bytes == 2 * 64 * 12 * 1024 * 2
    assert operator.training_work(3, 2, 1).operations == 3 * (56 * 2 + 9 + 40 + 120 * 2 + 80)
    assert operator.inference_work(64, 12, 1024).bytes == 2 * 64 * 12 * 1024 * 4
    assert operator.training_work(64, 12, 1024).bytes == 5 * 64 * 12 * 1024 * 4


def test_network_work_is_that_of_the_paper():
    network = hcgnet.NETWORKS["A1"]
    one = networks.work(network, 1, training=False)
    assert one.operations == pytest.approx(2 * 0.16e9, rel=0.05)
    assert networks.work(network, 64, training=True).operations == 3 * 64 * one.operations
    assert one.bytes == 4 * (3 * 32 * 32 + 100 + 1_102_651)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_our_contenders_and_eager_pass_the_operators_gate(training, dtype):
    case = operator._case(operator.Setup(6, 5, training, CPU, dtype))
    assert_contenders_pass(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_our_contenders_and_eager_pass_a_networks_gate(training, dtype):
    tiny = hcgnet._network("tiny", "CifarNet", (8, 12), (2, 2), lambda classes: HCGNet((8, 12), (2, 2), classes))
    peers = "" if training else "cast"
    case = networks.case_of(networks.Setup(dataclasses.replace(tiny, size=8), 16, training, CPU, dtype), peers)
    gate = Gate(case)
    for contender in case.contenders:
        if contender.name.startswith("torch.compile"):
            continue
        runner = contender.build()
        runner.run()
        gate.check(contender, runner.results())


@pytest.mark.parametrize("step", [False, True])
def test_training_results_do_not_depend_on_what_ran_before(step):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    subject = Subject(module, list(module.parameters()), [module[0].running_mean])
    x = torch.randn(4, 3)
    runner = (
        step_runner(subject, x, torch.tensor([0, 1, 0, 1])) if step else gradient_runner(subject, x, torch.ones(4, 2))
    )
    first = {name: value.clone() for name, value in runner.results().items()}
    for _ in range(3):
        runner.run()
    again = runner.results()
    assert set(first) == set(again) == {"grad_parameters", "running", *(["loss"] if step else ["out", "grad_u"])}
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_memory_contrast_work_is_that_of_the_definition():
    few, many = memory_bank.work(256), memory_bank.work(16384)
    assert few.bytes == 2 * (4 * 64 * 257 * 128 * 4 + 12 * 64 * 257 * 4)
    assert many.bytes == 2 * (4 * 50_000 * 128 * 4 + 12 * 64 * 16385 * 4)
    assert many.operations == 2 * 2 * 12 * 64 * 16385 * 128


def test_contenders_pass_memory_contrasts_gate(monkeypatch):
    monkeypatch.setattr(memory_bank, "SAMPLES", 40)
    monkeypatch.setattr(memory_bank, "BATCH", 5)
    case = memory_bank._case(256, CPU)
    assert_contenders_pass(case)


def test_densenet40_of_the_bench_is_pyexts():
    network = densenet._networks()["40-12"]
    own, plain = network.pyext().double().eval(), network.plain().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(own(x), plain(x))


def test_peer_contrast_work_is_that_of_the_definition():
    # Two peers of three images: half of 6 x 6 products in each pass and all of them once more, of 5 multiply-adds.
    assert peers.work(2, 3, 5).operations == 2 * 5 * (18 + 18 + 36)
    assert peers.work(2, 3, 5).bytes == 4 * 3 * 2 * 3 * 5
    assert peers.work(2, 3, 5, 2).bytes == 2 * 3 * 2 * 3 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peers_and_batch", [(1, 37), (2, 20)])
def test_contenders_pass_peer_contrasts_gate(peers_and_batch, dtype, monkeypatch):
    monkeypatch.setattr(peers, "TRUTH_ROWS", 7)
    case = peers._case(peers.Setup(*peers_and_batch, CPU, dtype))
    assert_contenders_pass(case)


def test_gpu_cases_of_peer_contrast_cover_both_dtypes_and_both_backends():
    cases = peers.cases(torch.device("cuda"))
    for dtype in ("bfloat16", "float32"):
        for count, batch in peers.GPU_SIZES:
            (case,) = (c for c in cases if c.name.endswith(f" {count} peers, {batch} images {dtype}"))
            assert {"pyext", "pyext triton", "eager"} < {contender.name for contender in case.contenders}
