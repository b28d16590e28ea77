import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import with_torchvision, write_images

from pyext.train.data import (
    ArrayImages,
    CentreCrop,
    EpochBatches,
    HeldOutBatches,
    Preprocessing,
    checked,
    load_data,
    loader,
    to_tensor,
)
from pyext.train.errors import UserError, require


def stream(images, epoch=0, first_step=0, workers=0, seed=0):
    batches = EpochBatches(len(images), 8, seed)
    batches.epoch, batches.first_step = epoch, first_step
    return list(checked(loader(images, batches, workers, pin_memory=False)))


def assert_same(first, second):
    assert len(first) == len(second)
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def array_images(**options):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 9, 9), generator=random, dtype=torch.uint8)
    return ArrayImages(images, torch.arange(30), **options)


def test_batches_depend_on_seed_epoch_and_index_alone():
    whole = stream(array_images(shift=2, flip=True), epoch=4)
    assert len(whole) == 3
    torch.rand(3)
    np.random.rand(3)
    assert_same(stream(array_images(shift=2, flip=True), epoch=4), whole)
    assert_same(stream(array_images(shift=2, flip=True), epoch=4, first_step=1), whole[1:])
    assert_same(stream(array_images(shift=2, flip=True), epoch=4, workers=2), whole)
    for other in (stream(array_images(shift=2, flip=True), epoch=5), stream(array_images(), epoch=4)):
        assert not torch.equal(other[0][0], whole[0][0])


def test_augmentation_is_a_shifted_and_mirrored_window_of_the_padded_image():
    images = array_images(shift=2, flip=True)
    seen = set()
    for index in range(30):
        augmented = images.__getitems__([(0, index)])[0][0]
        padded = torch.nn.functional.pad(images.images[index], [2] * 4)
        windows = {
            (row, column, flip): padded[:, row : row + 9, column : column + 9].flip([-1] if flip else [])
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
        }
        matches = [place for place, window in windows.items() if torch.equal(window, augmented)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 15


def test_processes_share_each_batch_without_overlap():
    single = EpochBatches(30, 8, seed=0)
    ranks = [EpochBatches(30, 8, seed=0, rank=rank, processes=2) for rank in range(2)]
    for whole, *parts in zip(single, *ranks, strict=True):
        assert [len(part) for part in parts] == [4, 4]
        assert sorted(whole) == sorted(parts[0] + parts[1])
    held_out = [HeldOutBatches(31, 8, rank=rank, processes=2) for rank in range(2)]
    assert sorted(key[1] for batches in held_out for batch in batches for key in batch) == list(range(31))
    assert [len(list(batches)) for batches in held_out] == [len(batches) for batches in held_out] == [2, 2]


def test_batches_that_cannot_be_made_are_errors():
    with pytest.raises(UserError, match="7 training images are fewer than one batch of 8"):
        EpochBatches(7, 8, seed=0)
    with pytest.raises(UserError, match="cannot be shared equally by 3 processes"):
        EpochBatches(30, 8, seed=0, processes=3)
    with pytest.raises(UserError, match="batch norm needs two images per process"):
        EpochBatches(30, 2, seed=0, processes=2)


def test_normalisation():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images.double() / 255 - 0.25) / 0.5
    torch.testing.assert_close(Preprocessing(4, (0.25,) * 3, (0.5,) * 3).normalise(images), expected.float())


def test_digits_split_is_fixed_stratified_and_whole():
    data, again = load_data("digits", None, seed=1), load_data("digits", None, seed=2)
    assert torch.equal(data.held_out.labels, again.held_out.labels)
    assert len(data.train) + len(data.held_out) == 1797
    assert data.classes == tuple("0123456789")
    counts = torch.bincount(data.held_out.labels)
    assert counts.min() >= 34
    assert counts.max() <= 37
    assert data.train.images.shape[1:] == (3, 32, 32)
    values = data.preprocessing.normalise(data.train.images)
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


def test_centre_crop_keeps_the_middle_of_any_shape():
    for size, shape in ((8, (8, 8)), (8, (20, 11)), (70, (75, 200)), (16, (5, 7))):
        image = Image.fromarray(np.full((*shape, 3), 7, np.uint8))
        assert CentreCrop(size)(image).size == (size, size)
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    assert (to_tensor(CentreCrop(8)(Image.fromarray(pixels))) == 200).all()


def test_require_names_the_missing_package():
    with pytest.raises(UserError, match=r"plots needs no_such_package: install it with `pip install pyext-kernels"):
        require("no_such_package.part", "plots")


def cifar_archive(folder, name, monkeypatch):
    """A small archive of the real format and names, whose MD5 sums torchvision is told."""
    import torchvision.datasets

    source = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    random = np.random.default_rng(0)
    classes = [f"class{i}" for i in range(10 if name == "cifar10" else 100)]
    key = "labels" if name == "cifar10" else "fine_labels"

    def batch():
        return {"data": random.integers(0, 256, (20, 3072), dtype=np.uint8), key: list(range(10)) * 2}

    files = {entry[0]: pickle.dumps(batch()) for entry in [*source.train_list, *source.test_list]}
    files[source.meta["filename"]] = pickle.dumps({source.meta["key"]: classes})
    folder.mkdir()
    with tarfile.open(folder / source.filename, "w:gz") as archive:
        for file, content in files.items():
            entry = tarfile.TarInfo(f"{source.base_folder}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

    def md5(content):
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(source, "train_list", [[f, md5(files[f])] for f, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [[f, md5(files[f])] for f, _ in source.test_list])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(files[source.meta["filename"]])})
    monkeypatch.setattr(source, "tgz_md5", md5((folder / source.filename).read_bytes()))
    return source, files


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a web server that serves `tmp_path`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@with_torchvision
def test_cifar_is_downloaded_checked_and_read(name, tmp_path, monkeypatch, server):
    source, files = cifar_archive(tmp_path / "server", name, monkeypatch)
    monkeypatch.setattr(source, "url", f"{server}/server/{source.filename}")
    data = load_data(name, tmp_path / "data")
    assert (tmp_path / "data" / source.base_folder).is_dir()
    assert len(data.classes) == {"cifar10": 10, "cifar100": 100}[name]
    assert len(data.train) == 20 * len(source.train_list)
    assert len(data.held_out) == 20
    test_batch = pickle.loads(files[source.test_list[0][0]])
    images, labels = data.held_out.__getitems__([(0, 3), (0, 14)])
    assert torch.equal(images.flatten(1), torch.from_numpy(test_batch["data"][[3, 14]]))
    assert labels.tolist() == [3, 4]
    monkeypatch.setattr(source, "url", f"{server}/gone")
    assert torch.equal(load_data(name, tmp_path / "data").train.images, data.train.images)


@with_torchvision
def test_interrupted_cifar_download_is_an_error_that_names_the_file_and_mends_itself(tmp_path, monkeypatch, server):
    source, _ = cifar_archive(tmp_path / "server", "cifar10", monkeypatch)
    whole, url = (tmp_path / "server" / source.filename).read_bytes(), f"{server}/server/{source.filename}"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / source.filename).write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(source, "url", f"{server}/gone/{source.filename}")
    with pytest.raises(UserError, match=r"cifar10 is not in .*data and could not be downloaded.*10-python") as info:
        load_data("cifar10", tmp_path / "data")
    assert "\n" not in str(info.value)
    monkeypatch.setattr(source, "url", url)
    assert len(load_data("cifar10", tmp_path / "data").train) == 100


@with_torchvision
def test_image_folder_is_read_with_random_crops_that_depend_on_the_place_alone(image_folder):
    data = load_data(str(image_folder), None, image_size=16)
    assert data.classes == ("blue", "green", "red")
    whole = stream(data.train, epoch=2)
    assert whole[0][0].shape == (8, 3, 16, 16)
    torch.rand(3)
    assert_same(stream(data.train, epoch=2, first_step=1, workers=2), whole[1:])
    assert not torch.equal(stream(data.train, epoch=3)[0][0], whole[0][0])
    images, labels = data.held_out.__getitems__([(0, i) for i in range(9)])
    assert images.float().mean(dim=(2, 3)).argmax(dim=1).tolist() == (2 - labels).tolist()


@with_torchvision
def test_missing_and_odd_folders_are_errors(image_folder, tmp_path):
    with pytest.raises(UserError, match="neither digits, cifar10"):
        load_data(str(tmp_path / "nowhere"), None)
    with pytest.raises(UserError, match=r"train is missing: .* should hold train/CLASS/IMAGE and val/CLASS/IMAGE"):
        load_data("imagenet", tmp_path / "nowhere")
    write_images(image_folder / "val", ("pink",), 1)
    with pytest.raises(UserError, match="train/ and val/ hold different classes, among them pink"):
        load_data(str(image_folder), None)
    (image_folder / "train" / "pink").mkdir()
    with pytest.raises(UserError, match="holds no CLASS/IMAGE files for some class"):
        load_data(str(image_folder), None)


@pytest.mark.parametrize("workers", [0, 2])
@with_torchvision
def test_truncated_image_is_named_in_one_sentence(image_folder, workers):
    bad = image_folder / "train" / "red" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    data = load_data(str(image_folder), None, image_size=16)
    with pytest.raises(UserError, match=r"cannot read .*red/3\.png as an image") as info:
        stream(data.train, workers=workers)
    assert "\n" not in str(info.value)
