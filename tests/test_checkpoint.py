"""Checkpoints: round trips, published wrappings, and files that are missing, cut off, foreign or unsafe."""

import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pyext import checkpoint
from pyext.checkpoint import CheckpointError, atomic_save, load_checkpoint, load_weights, state_dict


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def fresh():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def assert_equal_weights(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights.pth.tar"])
def test_round_trip(network, tmp_path, name):
    atomic_save(tmp_path / name, network.state_dict())
    assert_equal_weights(load_weights(fresh(), tmp_path / name), network)
    assert os.listdir(tmp_path) == [name]


def test_views_and_shared_memory_reach_safetensors(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    atomic_save(tmp_path / "x.safetensors", {"a": base.t(), "b": base[1]})
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], base.t())
    assert torch.equal(loaded["b"], base[1])


@pytest.mark.parametrize("wrapper", checkpoint.WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_wrappings(network, tmp_path, wrapper, prefix):
    weights = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    published = {"epoch": 3, "acc": np.float64(0.93), "best": np.float32(1), "optimizer": {"state": {}}}
    torch.save({**published, wrapper: weights}, tmp_path / "published.pth.tar")
    assert_equal_weights(load_weights(fresh(), tmp_path / "published.pth.tar"), network)


def test_old_format_of_torch(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_equal_weights(load_weights(fresh(), tmp_path / "old.pth"), network)


def test_name_that_starts_like_a_prefix_alone_is_kept():
    assert list(state_dict({"module.a": torch.ones(1), "b": torch.ones(1)})) == ["module.a", "b"]


def test_equal_contents_give_equal_files(network, tmp_path):
    for name in ("a.pt", "b.pt"):
        atomic_save(tmp_path / name, network.state_dict())
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_failing_write_leaves_the_old_file_and_no_other(network, tmp_path, name, monkeypatch):
    atomic_save(tmp_path / name, network.state_dict())
    before = (tmp_path / name).read_bytes()

    def disk_full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        atomic_save(tmp_path / name, fresh().state_dict())
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == before


def test_data_is_on_the_disk_before_it_has_its_name(network, tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    atomic_save(tmp_path / "weights.pt", network.state_dict())
    assert events == ["sync", "replace", "sync"]


def test_missing_folder(network, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        atomic_save(tmp_path / "nowhere" / "weights.pt", network.state_dict())


def test_safetensors_hold_tensors_only(tmp_path):
    with pytest.raises(TypeError, match="tensors only, not epoch"):
        atomic_save(tmp_path / "x.safetensors", {"epoch": 3})
    assert not os.listdir(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_file(network, tmp_path, name, share):
    path = tmp_path / name
    atomic_save(path, network.state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"{name} is truncated or damaged"):
        load_weights(fresh(), path)


def test_truncated_file_of_torch_s_old_format(network, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"old\.pth is truncated or damaged"):
        load_checkpoint(path)


def test_empty_file(tmp_path):
    (tmp_path / "weights.pt").touch()
    with pytest.raises(CheckpointError, match="is empty: its writing was interrupted"):
        load_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"<html>404</html>", b"\x89PNG\r\n", pickle.dumps([1, 2])[:-1] + b"x"])
def test_foreign_file(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.pt is not a torch checkpoint"):
        load_checkpoint(tmp_path / "weights.pt")


class Trap:
    sprung = False

    def __reduce__(self):
        return Trap.spring, ()

    @staticmethod
    def spring():
        Trap.sprung = True


@pytest.mark.parametrize("new_format", [False, True])
def test_code_in_the_file_is_not_run(tmp_path, new_format):
    path = tmp_path / "trap.pt"
    torch.save({"net": Trap()}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match="holds Python objects besides tensors"):
        load_checkpoint(path)
    assert not Trap.sprung


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "net": {"a": 1}}, "holds no state dict .found keys 'epoch', 'net'"),
        ([1, 2], "holds no state dict .found list"),
        ({}, "holds no state dict"),
    ],
)
def test_no_weights_inside(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        load_weights(fresh(), tmp_path / "weights.pt")


def test_weights_of_another_network_change_nothing(network, tmp_path):
    weights = {**network.state_dict(), "extra": torch.ones(1), "0.bias": torch.ones(9)}
    del weights["1.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, tmp_path / "weights.pt")
    for part in ("1 missing: 1.weight", "1 unknown: extra", "1 of another shape: 0.bias (9,), expected (4,)"):
        assert part in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_long_lists_are_cut(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"7 missing: 0\.weight, 0\.bias, 1\.weight and 4 more"):
        load_weights(fresh(), tmp_path / "weights.pt")
