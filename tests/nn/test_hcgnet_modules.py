"""HCGNet's modules keep torch's contract, and compute what their submodules say in every state they can be in."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from pyext._backend import backend
from pyext.nn import SMG, GatedExcitation, HybridBlock, Transition

MODULES = {
    "gates": (lambda **kw: GatedExcitation(8, **kw), 8),
    "smg": (lambda **kw: SMG(12, 8, **kw), 12),
    "block": (lambda **kw: HybridBlock(3, 12, 4, 8, **kw), 12),
    "transition": (lambda **kw: Transition(24, 12, **kw), 24),
}
HIDDEN = {"gates": "", "smg": "", "block": "SMG2.", "transition": ""}


@pytest.fixture(params=MODULES)
def name(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def nan_filled():
    """What ``torch.empty`` returns is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def build(name, dtype=torch.float64, **arguments):
    """A module of kind `name` whose statistics and biases are not those of initialisation."""
    module = MODULES[name][0](dtype=dtype, **arguments)
    for key, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point():
            noise = 0.1 * torch.randn_like(tensor)
            tensor.data += noise.abs() if key.endswith("running_var") else noise
    return module


def maps(name, n=3, h=6, w=5, dtype=torch.float64):
    return torch.randn(n, MODULES[name][1], h, w, dtype=dtype)


def gates_of(module):
    return [m for m in module.modules() if isinstance(m, (GatedExcitation, SMG, Transition))]


def composed(module):
    """A copy of `module` that runs submodule by submodule, because a hook that does nothing asks for it."""
    module = copy.deepcopy(module)
    for gates in gates_of(module):
        gates.fc1.register_forward_hook(lambda *_: None)
        assert gates.unfused_reason() is not None
    return module


def assert_same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_step(a, b, x):
    """Outputs, gradients and buffers of `a` and `b` on `x` agree."""
    xs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [module(x) for module, x in zip((a, b), xs, strict=True)]
    assert_same(*outs)
    weight = torch.randn_like(outs[0])
    for out in outs:
        (out * weight).sum().backward()
    assert_same(xs[0].grad, xs[1].grad)
    assert_same({k: p.grad for k, p in a.named_parameters()}, {k: p.grad for k, p in b.named_parameters()})
    assert_same(dict(a.named_buffers()), dict(b.named_buffers()))


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_operator_and_submodules_agree(name, training):
    module = build(name).train(training)
    assert all(gates.unfused_reason() is None for gates in gates_of(module))
    assert_same_step(module, composed(module), maps(name))


def test_frozen_normalisation_uses_and_keeps_its_statistics(name):
    module = build(name).train()
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    assert all(gates.unfused_reason() is None for gates in gates_of(module))
    before = {k: b.clone() for k, b in module.named_buffers()}
    assert_same_step(module, composed(module), maps(name))
    assert_same(dict(module.named_buffers()), before, 0)


def each(attribute, value):
    def change(module):
        for gates in gates_of(module):
            for norm in (gates.conv_3x3.norm, gates.conv_5x5.norm, gates.bn_attention, gates.bn_forget):
                setattr(norm, attribute, value)

    return change


@pytest.mark.parametrize(("attribute", "value"), [("momentum", 0.3), ("eps", 0.1)])
def test_momentum_and_eps_are_those_of_the_submodules(name, attribute, value):
    module = build(name).train()
    usual = copy.deepcopy(module)
    each(attribute, value)(module)
    assert all(gates.unfused_reason() is None for gates in gates_of(module))
    x = maps(name)
    assert_same_step(module, composed(module), x)
    expected = usual(x)
    if attribute == "eps":
        assert not torch.allclose(module(x), expected, atol=1e-3)
    else:
        running = "conv_3x3.norm.running_mean"
        ours, theirs = (gates_of(m)[-1].get_buffer(running) for m in (module, usual))
        assert not torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(("attribute", "value"), [("momentum", 0.3), ("eps", 0.1)])
def test_layers_of_a_block_may_differ_in_momentum_and_eps(attribute, value):
    module = build("block", dtype=torch.float32).train()
    for norm in module.SMG2.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            setattr(norm, attribute, value)
    x, plain = maps("block", dtype=torch.float32), composed(module)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            ours, theirs = (m.train(training)(x) for m in (module, plain))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


def replace_norms(**arguments):
    def change(module):
        for gates in gates_of(module):
            gates.conv_3x3.norm = nn.BatchNorm2d(gates.conv_3x3.norm.num_features, dtype=torch.float64, **arguments)

    return change


def on_gates(action):
    return lambda module: [action(gates) for gates in gates_of(module)]


UNFUSED = {
    "one frozen": (on_gates(lambda g: g.bn_attention.eval()), "the four normalisations differ"),
    "one eps": (on_gates(lambda g: setattr(g.bn_forget, "eps", 0.1)), "the four normalisations differ"),
    "one momentum": (on_gates(lambda g: setattr(g.bn_forget, "momentum", 0.5)), "the four normalisations differ"),
    "cumulative": (each("momentum", None), "average cumulatively"),
    "no affine": (replace_norms(affine=False), "no affine parameters"),
    "no running statistics": (replace_norms(track_running_stats=False), "keeps no running statistics"),
    "parametrization": (
        on_gates(lambda g: nn.utils.parametrizations.weight_norm(g.fcall)),
        "fcall is a ParametrizedConv2d",
    ),
    "another activation": (
        on_gates(lambda g: setattr(g, "conv_5x5", nn.Sequential(g.conv_5x5.norm, nn.SiLU(), g.conv_5x5.conv))),
        "conv_5x5 was replaced",
    ),
    "another dilation": (
        on_gates(lambda g: [setattr(g.conv_5x5.conv, key, (1, 1)) for key in ("dilation", "padding")]),
        "conv_5x5.conv has another dilation",
    ),
    "a bias": (
        on_gates(
            lambda g: setattr(g.conv_3x3.conv, "bias", nn.Parameter(torch.randn(g.conv_3x3.conv.out_channels).double()))
        ),
        "conv_3x3.conv has another dilation, padding or stride, or a bias",
    ),
    "hook on a branch": (
        on_gates(lambda g: g.conv_3x3.register_forward_pre_hook(lambda m, args: (args[0] + 1,))),
        "conv_3x3 was replaced or has hooks",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("state", UNFUSED)
def test_states_that_the_operator_cannot_express_run_submodule_by_submodule(name, state, training):
    change, reason = UNFUSED[state]
    module = build(name).train(training)
    change(module)
    reasons = [gates.unfused_reason() for gates in gates_of(module)]
    if state == "one frozen" and not training:
        assert reasons == [None] * len(reasons)
    else:
        assert all(reason in why for why in reasons)
    assert_same_step(module, composed(module) if state != "hook on a branch" else copy.deepcopy(module), maps(name))


def test_composition_is_the_operator_s_reference():
    gates, u = build("gates"), maps("gates")
    gates.conv_3x3.norm.eval()
    for norm in (gates.conv_5x5.norm, gates.bn_attention, gates.bn_forget):
        norm.eval()
    with backend("reference"):
        assert_same(composed(gates)(u), gates(u))


def test_synchronised_normalisation_falls_back():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(build("smg")).eval()
    assert "conv_3x3.norm is a SyncBatchNorm" in module.unfused_reason()
    assert_same(module(maps("smg")).isfinite().all(), torch.tensor(True))


def test_replicas_of_data_parallel_compute_the_same():
    gates, u = build("gates").eval(), maps("gates")

    def replica(module):
        copied = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            setattr(copied, key, None if parameter is None else parameter.detach().clone())
        for key, child in module._modules.items():
            setattr(copied, key, replica(child))
        return copied

    copied = replica(gates)
    assert not list(copied.fc1.parameters(recurse=False))
    assert_same(copied(u), gates(u))


def test_without_gradients_the_result_is_the_same(name, nan_filled):
    for module, n, dense in itertools.product((build(name),), (1, 3), (True, False)):
        x = maps(name, n)
        x = x if dense else x.contiguous(memory_format=torch.channels_last)
        for training in (False, n > 1):
            a, b = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
            with torch.no_grad():
                out = a(x)
            assert_same(out, b(x))
            assert_same(dict(a.named_buffers()), dict(b.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_error_of_the_writing_in_place_is_that_of_plain_torch(name, dtype, training):
    module, x = build(name).to(dtype).train(training), maps(name).to(dtype)
    truth = composed(module).double()(x.double())
    with torch.no_grad():
        ours, plain = copy.deepcopy(module)(x), composed(module)(x)
    limit = 2 * (plain - truth).norm() + 4 * torch.finfo(dtype).eps * truth.norm() / truth.numel() ** 0.5
    assert (ours - truth).norm() <= limit


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(name, training, grad):
    module, x = build(name, torch.float32).train(training), maps(name).float()
    truth = composed(module).double()(x.double())
    results, other = [], composed(module)
    for m in (module, other):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            results.append(m(x))
    errors = [(out.double() - truth).norm() for out in results]
    assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.bfloat16).eps * truth.norm() / truth.numel() ** 0.5
    if grad:
        results[0].sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


# --- torch's conventions ----------------------------------------------------------------------------------------------


def test_memory_format_of_the_input_is_kept(name):
    module = build(name).eval()
    for x in (maps(name), maps(name).contiguous(memory_format=torch.channels_last)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out = module(x)
            last = x.is_contiguous(memory_format=torch.channels_last)
            assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert_same(out, module(x.contiguous()))


def test_slices_and_transposed_maps(name):
    module = build(name).eval()
    x = maps(name, h=8, w=6)
    larger = torch.randn(3, 2 * x.shape[1], 8, 12, dtype=x.dtype)
    larger[:, ::2, :, ::2] = x
    assert_same(module(larger[:, ::2, :, ::2]), module(x))
    assert_same(module(x.transpose(2, 3).contiguous().transpose(2, 3)), module(x))


def test_copies_pickles_and_loads(name):
    module, x = build(name).eval(), maps(name)
    fresh = MODULES[name][0](dtype=torch.float64).eval()
    fresh.load_state_dict(module.state_dict())
    assigned = MODULES[name][0](device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh, assigned.eval()):
        assert_same(other(x), module(x), 0)


def test_replaced_parameters_and_conversions_take_effect(name):
    module, x = build(name).eval(), maps(name)
    before = module(x)
    gates = gates_of(module)[-1]
    gates.fc2.bias = nn.Parameter(gates.fc2.bias.detach() + 1)
    after = module(x)
    assert not torch.allclose(after, before)
    assert_same(after, composed(module)(x))
    assert module.float()(x.float()).dtype == torch.float32
    changed = {k: 0 * p for k, p in module.named_parameters() if k.endswith(HIDDEN[name] + "fc1.weight")}
    assert changed
    assert not torch.equal(torch.func.functional_call(module, changed, (x.float(),)), module(x.float()))


def test_hooks_on_the_module_itself(name):
    module, x, calls = build(name), maps(name), []
    for m in gates_of(module):
        m.register_forward_hook(lambda m, args, out: calls.append(type(m)))
        m.register_full_backward_hook(lambda m, *_: calls.append("backward"))
    with torch.no_grad():
        module(x)
    assert len(calls) == len(gates_of(module))
    module(x.requires_grad_()).sum().backward()
    assert calls.count("backward") == len(gates_of(module))


def test_parameters_can_be_drawn_anew():
    module = build("smg")
    before = copy.deepcopy(module.state_dict())
    module(maps("smg"))
    module.reset_parameters()
    assert not torch.equal(module.fc1.weight, before["fc1.weight"])
    assert torch.equal(module.bn_forget.weight, torch.ones(4, dtype=torch.float64))
    assert module.conv_3x3.norm.num_batches_tracked == 0


def test_device_and_dtype(name):
    module = MODULES[name][0](device="meta", dtype=torch.bfloat16)
    tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
    assert all(t.device.type == "meta" and t.dtype == torch.bfloat16 for t in tensors)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (GatedExcitation(8), "GatedExcitation(\n  8, reduction_factor=2, forget_factor=2\n"),
        (SMG(12, 8, 2, 2, 4, 1), "SMG(\n  12, growth_rate=8, reduction_factor=4, forget_factor=1\n"),
        (Transition(24, 12), "Transition(\n  24, 12, reduction_factor=4, forget_factor=4\n"),
    ],
)
def test_repr(module, line):
    assert repr(module).startswith(line)


def test_hidden_sizes():
    gates = GatedExcitation(10, reduction_factor=3, forget_factor=4)
    assert gates.fcall.weight.shape == (6, 20, 1, 1)
    assert gates.fc1.weight.shape == (2, 10, 1, 1)
    assert gates(torch.randn(2, 10, 4, 4)).shape == (2, 10, 4, 4)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_stride_of_a_transition(stride):
    assert Transition(12, 8, stride)(torch.randn(2, 12, 7, 6)).shape == (2, 8, -(-7 // stride), -(-6 // stride))


def test_block_is_a_sequential_that_can_be_changed():
    block, x = build("block").eval(), maps("block")
    with torch.no_grad():
        longer = copy.deepcopy(block).append(nn.ReLU())
        assert_same(longer(x), block(x).relu())
    assert len(block) == 3


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole_and_exports(name, training):
    module, x = build(name, torch.float32).train(training), maps(name).float()
    eager, compiled = copy.deepcopy(module), copy.deepcopy(module)
    expected, result = eager(x), torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
    assert_same(result, expected, 1e-5)
    for out in (expected, result):
        out.square().sum().backward()
    assert_same(
        {k: p.grad for k, p in compiled.named_parameters()}, {k: p.grad for k, p in eager.named_parameters()}, 1e-4
    )
    assert_same(dict(compiled.named_buffers()), dict(eager.named_buffers()), 1e-5)
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(copy.deepcopy(module), (x,), dynamic_shapes=(batch,)).module()
    assert_same(exported(x), expected, 1e-5)
    assert exported(torch.cat([x, x])).shape[0] == 6


# --- bad input --------------------------------------------------------------------------------------------------------


def test_wrong_channels_and_empty_maps(name):
    module = build(name)
    channels = MODULES[name][1]
    for shape in ((2, channels + 1, 4, 4), (2, channels, 0, 0), (2, channels, 0, 4), (channels, 4, 4)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"expected \(N, {channels}, H, W\)"):
                module(torch.randn(shape, dtype=torch.float64))


def test_one_value_per_channel_is_torch_s_own_error(name):
    module = build(name).train()
    for n, h in ((1, 4), (1, 1)):
        for m in (module, composed(module)):
            with pytest.raises(
                ValueError, match="Expected more than 1 value per channel when training, got input size"
            ):
                m(maps(name, n, h, h))
    assert module.eval()(maps(name, 1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch(name, training, grad):
    module = build(name).train(training)
    before = {k: b.clone() for k, b in module.named_buffers() if "running" in k}
    with torch.set_grad_enabled(grad):
        out = module(maps(name, 0))
        assert out.shape[0] == 0
        assert out.shape == composed(module)(maps(name, 0)).shape
    if grad:
        out.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    assert_same({k: module.get_buffer(k) for k in before}, before, 0)


def test_nan_propagates_within_its_image(name):
    module = build(name).eval()
    x = maps(name)
    x[1, 0, 2, 2] = torch.nan
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert module(x).isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_mixed_dtypes(name):
    with pytest.raises((TypeError, RuntimeError), match=r"dtype|type"):
        build(name, torch.float32)(maps(name))


@pytest.mark.parametrize("arguments", [(4, 2, 8), (4, 16, 2)])
def test_factors_that_leave_nothing_hidden(arguments):
    with pytest.raises(ValueError, match="hidden values, expected at least 1"):
        GatedExcitation(*arguments)
