"""A sub-network is the whole network with channels zeroed, and the small module that it becomes."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from exactness import inexact
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CLASSES, NETWORKS, Zeroed, drawn_atlas, network
from torch import nn

from pyext.nn import SMG
from pyext.subnet import AtlasError, UnsupportedNetwork, plan, recalibrate, reconstruct
from pyext.subnet.blocks import KeptBlock

CASES = {}
GROUPED = ("mixed", "resnext", "hcgnet", "hcgnet imagenet", "hcgnet published")
"""Where a group of a convolution may keep outputs without inputs: the small module has a zero weight for it."""


def case(name):
    """The network, its images' shape and its atlas; made once."""
    if name not in CASES:
        model, shape = network(name)
        CASES[name] = model, shape, drawn_atlas(model, shape)
    return CASES[name]


def drawn_groups(traced, random, keep):
    groups = random.random(len(traced.fixed)) < keep
    for layer in traced.gates:
        groups[random.choice(traced.groups_of(layer))] = True
    return groups


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), keep=st.sampled_from([0.05, 0.3, 0.6, 0.95]), data=st.data())
def test_equals_the_zeroed_network_and_its_own_materialised_form(name, seed, keep, data):
    model, shape, atlas = case(name)
    classes = data.draw(st.lists(st.integers(0, CLASSES - 1), min_size=1, unique=True))
    random = np.random.default_rng(seed)
    subnet = reconstruct(model, atlas, [0], keep=1.0)
    subnet.select(classes, drawn_groups(subnet.plan, random, keep))
    x = torch.from_numpy(random.standard_normal((2, *shape)))
    expected = Zeroed(subnet.plan, subnet.groups).run(x)[:, sorted(classes)]
    small = subnet.materialize()
    with torch.no_grad():
        for _ in range(2):  # the second time with the weights gathered before
            close(subnet(x), expected)
        close(small(x), expected)
    close(subnet(x), expected)
    assert subnet.labels == {c: i for i, c in enumerate(sorted(classes))}
    assert {t.data_ptr() for t in small.parameters()}.isdisjoint(t.data_ptr() for t in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 9), gradients=st.booleans())
def test_images_of_one_batch_run_their_own_sub_networks(name, seed, images, gradients):
    model, shape, atlas = case(name)
    random = np.random.default_rng(seed)
    tasks = [sorted(random.choice(CLASSES, count, replace=False).tolist()) for count in (2, 4, 1)]
    subnet = reconstruct(model, atlas, tasks, keep=0.6)
    x, ids = torch.from_numpy(random.standard_normal((images, *shape))), random.integers(0, 3, images)
    with torch.set_grad_enabled(gradients):
        logits = subnet(x, task=torch.from_numpy(ids))
    assert logits.shape == (images, 4)
    assert subnet.tasks == tasks
    for task, classes in enumerate(tasks):
        rows = torch.from_numpy(np.flatnonzero(ids == task))
        if len(rows):
            close(logits[rows, : len(classes)], subnet.switch(classes, keep=0.6)(x[rows]))
        assert (logits[rows, len(classes) :] == float("-inf")).all()


def test_wrong_tasks_are_named():
    model, shape, atlas = case("resnet8")
    x = torch.randn(2, *shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="has no tasks: name them with assign"):
        reconstruct(model, atlas, [0])(x, task=[0, 0])
    subnet = reconstruct(model, atlas, [[0, 1], [2]], keep=0.5)
    for task, message in (([0], r"task has shape \(1,\)"), ([0, 2], "outside 0 to 1"), ([0.0, 1.0], "expected int64")):
        with pytest.raises(ValueError, match=message):
            subnet(x, task=task)
    with pytest.raises(ValueError, match="no batch statistics in common"):
        subnet.train()(x, task=[0, 1])
    subnet.eval()
    with pytest.raises(ValueError, match="tasks is empty"):
        subnet.assign([])
    with pytest.raises(ValueError, match="numbers and lists"):
        reconstruct(model, atlas, [[0], 1])
    with pytest.raises(ValueError, match=r"classes has \[9\]"):
        reconstruct(model, atlas, [[0], [9]])


def test_gathered_weights_stay_within_bounds(monkeypatch):
    model, shape = network("vgg16")
    subnet = reconstruct(model, drawn_atlas(model, shape), [0], keep=0.3)
    x = torch.randn(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        subnet(x)
        one = subnet._compact.bytes
        assert one > 0.2 * sum(p.nbytes for p in model.parameters())
        monkeypatch.setattr("pyext.subnet.subnet.GATHERED_BYTES", int(2.5 * one))
        for classes in ([1], [2], [3], [0]):
            expected = subnet.switch(classes, keep=0.3)(x)
            assert torch.equal(subnet(x), expected)
    held = [compact.bytes for _, compact in subnet._seen.values()]
    assert sum(held) <= 3.5 * one
    assert held.count(0) >= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_kept_is_the_network_itself_and_its_summary_counts_its_parameters(name):
    model, shape, atlas = case(name)
    subnet = reconstruct(model, atlas, range(CLASSES), keep=1.0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    close(subnet(x), model(x))
    count = sum(p.numel() for p in model.parameters())
    assert subnet.summary().parameters == (count, count)
    assert str(subnet.summary()).splitlines()[-1].split()[:2] == ["all", f"{count:,}"]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in GROUPED])
def test_kept_parameters_are_those_of_the_small_module_and_fit_the_share(name, scope):
    model, _, atlas = case(name)
    subnet = reconstruct(model, atlas, [1, 4], keep=0.3, scope=scope)
    kept, whole = subnet.summary().parameters
    assert kept == sum(p.numel() for p in subnet.materialize().parameters())
    assert 0.2 < kept / whole <= 0.3


def test_multiply_adds_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)).double()
    subnet = reconstruct(model, drawn_atlas(model, (3, 8, 8)), [0, 1], keep=1.0)
    subnet.select([0, 1], subnet.plan.fixed | np.isin(np.arange(len(subnet.groups)), subnet.plan.groups_of("0")[:3]))
    assert subnet.summary().multiply_adds == (36 * 9 * 3 * 3 + 3 * 36 * 2, 36 * 9 * 3 * 4 + 4 * 36 * CLASSES)
    assert subnet.summary().parameters == (9 * 3 * 3 + 3 * 36 * 2 + 2, 9 * 3 * 4 + 4 * 36 * CLASSES + CLASSES)


def test_best_channels_are_kept_and_shared_ones_take_the_best_of_their_layers():
    model, _, atlas = case("resnet8")
    subnet = reconstruct(model, atlas, [2, 3], threshold=1.2, combine="mean")
    means = {layer: atlas.importance(layer)[[2, 3]].mean(0).numpy() for layer in atlas.layers}
    for group in range(len(subnet.groups)):
        found = [m for k, v in means.items() for m in v[subnet.plan.groups_of(k) == group]]
        if found:
            assert subnet.groups[group] == (np.mean(found) >= 1.2)


def test_switching_back_gives_the_same_and_forgets_no_training():
    model, shape = network("resnet8")
    atlas = drawn_atlas(model, shape)
    subnet, x = reconstruct(model, atlas, [0, 1], keep=0.4), torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        before = subnet(x)
        other = subnet.switch([2, 3, 5], keep=0.5)(x)
        assert other.shape == (3, 3)
        assert torch.equal(subnet.switch([1, 0], keep=0.4)(x), before)
        model.classifier.weight.mul_(2)  # what was gathered must not outlive the weights
        close(subnet(x) - model.classifier.bias[:2], 2 * (before - model.classifier.bias[:2]))


@pytest.mark.parametrize("name", ["resnet8", "hcgnet"])
def test_training_a_subnet_moves_the_kept_weights_and_statistics_of_the_network_alone(name):
    model, shape = network(name)
    subnet = reconstruct(model, drawn_atlas(model, shape), [0, 4], keep=0.3)
    before = copy.deepcopy(model.state_dict())
    small, x = subnet.materialize().train(), torch.randn(5, *shape, dtype=torch.float64)
    subnet.train()
    expected = small(x)
    actual = subnet(x)
    close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    kept = {node.name: subnet.groups[subnet.plan.channels[node.name]] for node, _ in subnet.plan.layers()}
    for node, layer in subnet.plan.layers():
        rows = torch.from_numpy(kept[node.name])
        assert not layer.weight.grad[~rows].any()
        grad = layer.weight.grad[rows]
        if layer.weight.dim() > 1 and getattr(layer, "groups", 1) == 1:
            grad = grad[:, torch.from_numpy(subnet.groups[subnet.plan.inputs(node)])]
        if getattr(layer, "groups", 1) == 1:
            close(grad, small.get_submodule(node.target).weight.grad)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            close(layer.running_var[rows], small.get_submodule(node.target).running_var)
            assert torch.equal(layer.running_var[~rows], before[f"{node.target}.running_var"][~rows])


def test_recalibrating_measures_the_statistics_anew_and_nothing_else():
    model, shape = network("resnet8")
    small = reconstruct(model, drawn_atlas(model, shape), [0, 4], keep=0.3).materialize()
    before, batches = copy.deepcopy(small.state_dict()), torch.randn(3, 4, *shape, dtype=torch.float64)
    assert recalibrate(small, batches) is small
    assert not any(module.training for module in small.modules())
    maps = torch.stack([small.features.conv1(x).mean((0, 2, 3)) for x in batches])
    close(small.features.bn1.running_mean, maps.mean(0).detach())
    assert small.features.bn1.momentum == 0.1
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    with pytest.raises(ValueError, match="batches has no batch"):
        recalibrate(small, [])
    with pytest.raises(ValueError, match="no batch norm"):
        recalibrate(nn.Linear(2, 2), batches)


@pytest.mark.parametrize("batch", [1, 9])
def test_float32_uses_torchs_convolutions_for_batches_and_agrees(batch):
    model, shape = network("vgg16")
    model = model.float()
    subnet = reconstruct(model, drawn_atlas(model, shape), [0, 1], keep=0.3)
    x = torch.randn(batch, *shape)
    expected = subnet.materialize().double()(x.double()).float()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(subnet(x), expected, rtol=1e-4, atol=1e-5)
        model.features.block1[0].weight.mul_(2)
        assert not torch.allclose(subnet(x), expected, rtol=1e-3)
    kinds = {kind.__name__ for _, kind, _ in subnet._compact._gathered}
    assert kinds == ({"Dense", "KeptLinear"} if batch >= 8 else {"PreparedChain"})


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["vgg16", "hcgnet", "mobilenet_v2"])
def test_autocast_computes_in_its_dtype_as_exactly_as_torch(name, gradients):
    model, shape = network(name)
    subnet = reconstruct(model.float(), drawn_atlas(model, shape), [[0, 1], [1, 4]], keep=0.3)
    x, ids = torch.randn(6, *shape), torch.tensor([0, 1, 0, 0, 1, 1])
    small = subnet.materialize()
    with torch.no_grad():
        truth = copy.deepcopy(small).double()(x.double())
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        out, mixed, plain = subnet(x), subnet(x, task=ids)[ids == 0], small(x)
    assert out.dtype == mixed.dtype == plain.dtype == torch.bfloat16
    assert not inexact({"logits": out.detach()}, [([plain.detach()], [truth])], {})
    assert not inexact({"logits": mixed.detach()}, [([plain.detach()[ids == 0]], [truth[ids == 0]])], {})


def test_blocks_of_hcgnet_run_whole_and_follow_their_weights():
    model, shape, atlas = case("hcgnet")
    model = copy.deepcopy(model)
    subnet, x = reconstruct(model, atlas, [[0, 1], [2, 3]], keep=0.4), torch.randn(3, *shape, dtype=torch.float64)
    ids = torch.tensor([1, 0, 1])
    for _ in range(2):
        with torch.no_grad():
            close(subnet(x), subnet.materialize()(x))
            close(subnet(x, task=ids)[1:2], subnet(x[1:2]))
        kinds = [kind for _, kind, _ in subnet._compact._gathered]
        assert kinds.count(KeptBlock) == 3  # two dense blocks and the transition between them
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    model.features.HybridBlock1.SMG1.bn_forget.eps = 1e-3  # the operator has one eps for all
    with torch.no_grad():
        close(subnet(x), subnet.materialize()(x))
    assert KeptBlock not in {kind for _, kind, _ in subnet._compact._gathered}


def test_state_dict_is_the_networks_and_a_copy_is_independent():
    model, shape, atlas = case("mixed")
    subnet = reconstruct(model, atlas, [0, 1], keep=0.5)
    assert list(subnet.state_dict()) == [f"network.{name}" for name in model.state_dict()]
    x, other = torch.randn(2, *shape, dtype=torch.float64), copy.deepcopy(subnet)
    expected = subnet(x).detach()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(subnet(x), expected)
    assert not torch.equal(other(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_subnet_is_saved_and_loaded(name):
    model, shape, atlas = case(name)
    subnet, file = reconstruct(model, atlas, [[1, 2], [0, 2]], keep=0.5), io.BytesIO()
    torch.save(subnet, file)
    file.seek(0)
    loaded, x = torch.load(file, weights_only=False), torch.randn(2, *shape, dtype=torch.float64)
    assert repr(loaded) == repr(subnet)
    assert torch.equal(loaded(x), subnet(x))
    assert torch.equal(loaded(x, task=[1, 0]), subnet(x, task=[1, 0]))
    assert torch.equal(loaded.switch([0, 1], keep=0.6)(x), subnet.switch([0, 1], keep=0.6)(x))
    parameter = next(loaded.network.parameters())
    assert parameter is next(loaded.plan.module.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_materialised_module_is_saved_and_loaded(name):
    model, shape, atlas = case(name)
    small, file = reconstruct(model, atlas, [1, 2], keep=0.5).materialize(), io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.equal(torch.load(file, weights_only=False)(x), small(x))


@pytest.mark.parametrize("name", ["mixed", "resnet8", "mobilenet_v2", "hcgnet"])
def test_materialised_module_is_exported_to_onnx(name):
    model, shape = network(name)
    subnet = reconstruct(model, drawn_atlas(model, shape), [1, 2], keep=0.5)
    small, x, file = subnet.materialize().float(), torch.randn(2, *shape), io.BytesIO()
    torch.onnx.export(small, (x,), file, dynamo=False, input_names=["x"])
    (found,) = onnxruntime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": []}, "classes is empty"),
        ({"classes": [0, 6, -1]}, r"classes has \[-1, 6\], expected 0 to 5"),
        ({"classes": [1, 1]}, r"\[1, 1\] names a class twice"),
        ({"classes": [0], "keep": 0.0}, r"keep is 0.0, expected a share in \(0, 1\]"),
        ({"classes": [0], "keep": 1.5}, r"keep is 1.5, expected a share in \(0, 1\]"),
        ({"classes": [0], "keep": float("nan")}, "keep is nan"),
        ({"classes": [0], "keep": None}, "keep is None"),
        ({"classes": [0], "keep": 1e-5}, "keep is 1e-05, .* leaves a layer without channels: one in each takes"),
        ({"classes": [0], "threshold": -1.0}, "threshold is -1.0, expected 0 or more"),
        ({"classes": [0], "threshold": 6.0}, r"layer features.conv1 is left without channels"),
        ({"classes": [0], "scope": "all"}, "scope is 'all', expected one of"),
        ({"classes": [0], "combine": "sum"}, "combine is 'sum', expected one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model, _, atlas = case("resnet8")
    with pytest.raises(ValueError, match=message):
        reconstruct(model, atlas, **arguments)


def test_class_without_images_and_atlas_of_another_network_are_refused():
    model, shape = network("resnet8")
    atlas = drawn_atlas(model, shape)
    atlas.counts[3] = 0
    with pytest.raises(ValueError, match=r"classes has \[3\], of which the atlas has seen no images"):
        reconstruct(model, atlas, [2, 3])
    with torch.no_grad():
        model.classifier.bias[0] += 1
    with pytest.raises(AtlasError, match="made of another network than this CIFARResNet"):
        reconstruct(model, atlas, [2])
    subnet = reconstruct(*case("resnet8")[::2], [2])
    with pytest.raises(ValueError, match=r"groups has shape \(3,\)"):
        subnet.select([2], np.ones(3, dtype=bool))
    with pytest.raises(ValueError, match=r"layer features.conv1 is left without channels"):
        subnet.select([2], np.zeros_like(subnet.groups))


class Called(nn.Module):
    """A network whose middle is `function`."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function, self.linear = nn.Conv2d(3, 4, 1), function, nn.Linear(4, 2)
        self.softmax, self.hooked = nn.Softmax(1), SMG(4, 4)
        self.hooked.register_forward_hook(lambda module, x, y: 2 * y)

    def forward(self, x):
        return self.linear(self.function(self, self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x: net.softmax(x), r"node softmax \(softmax\) is a Softmax"),
        (lambda net, x: torch.softmax(x, 1), "node softmax is an operation whose channels cannot be followed"),
        (lambda net, x: x.view(-1, 2, 2, 8, 8).flip(2).view(-1, 4, 8, 8), "node view is a reshape to"),
        (lambda net, x: x.mean(1, keepdim=True) * x, "node mean is a mean over 1, expected the positions"),
        (lambda net, x: x.sum(1, keepdim=True) * x, "node sum_1 is a sum over 1, expected the positions"),
        (lambda net, x: x[:, :, :, :4] * x.mean((2, 3)), "node mul is arithmetic with tensors of different dim"),
        (lambda net, x: torch.cat([x, x], dim=2), "node cat is a concatenation over dimension 2"),
        (lambda net, x: x[:, [1, 0, 3, 2]], "node getitem is an index into"),
        (lambda net, x: x if x.sum() > 0 else -x, "torch.fx cannot trace Called"),
        (lambda net, x: net.conv(x), "node conv_1 fails: Given groups=1, weight of size"),
        (lambda net, x: x * x.shape[2], "node mul is arithmetic with something other than"),
        (lambda net, x: x + net.linear.weight.sum(), "node linear_weight is an operation"),
        (lambda net, x: F.pad(x, (1, 1), value=1.0), "node pad is padding other than"),
        (lambda net, x: net.hooked(x), "torch.fx cannot trace Called"),
    ],
)
def test_unsupported_coupling_names_its_node(function, message):
    with pytest.raises(UnsupportedNetwork, match=message):
        plan(Called(function), (3, 8, 8))


@pytest.mark.parametrize("name", ["hcgnet", "hcgnet imagenet"])
def test_plan_is_the_same_without_gradients_and_leaves_the_maps_that_all_channels_share_without_a_gate(name):
    model, shape, atlas = case(name)
    with torch.inference_mode():
        found = plan(model, shape)
    assert list(found.channels) == list(plan(model, shape).channels)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert atlas.layers == list(found.gates)
    assert set(convolutions) - set(atlas.layers) == {name for name in convolutions if "context" in name}


def test_layers_called_twice_and_shapes_that_are_none_are_refused():
    conv = nn.Conv2d(3, 3, 1)
    twice = nn.Sequential(conv, nn.ReLU(), conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(UnsupportedNetwork, match=r"node _0_1 \(0\) is a layer that is called twice"):
        plan(twice, (3, 8, 8))
    with pytest.raises(UnsupportedNetwork, match=r"returns \(3, 8, 8\), expected logits"):
        plan(nn.Sequential(conv), (3, 8, 8))
    with pytest.raises(UnsupportedNetwork, match="no convolution"):
        plan(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)), (3, 8, 8))
    with pytest.raises(ValueError, match=r"input_shape is \(3, 8\), expected"):
        plan(twice, (3, 8))
    reflected = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(UnsupportedNetwork, match="padding_mode 'reflect'"):
        plan(reflected, (3, 8, 8))
