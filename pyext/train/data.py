"""Data sets: CIFAR and image folders through torchvision, scikit-learn's bundled digits, one interface over them.

A sample is asked for by (epoch, index), and its augmentation depends on (seed, epoch, index) alone, so the stream of
batches can be entered at any step, with any number of workers or processes. Batches are uint8; `normalise` turns them
into floats on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pyext.train.errors import UserError, require
from pyext.train.randomness import Stream, generator, seed_all

Key = tuple[int, int]
"""What a sampler asks a data set for: (epoch, index)."""

Batch = tuple[Tensor, Tensor]
"""uint8 images (N, 3, S, S) and int64 labels (N,)."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


IndexedBatch = tuple[Tensor, Tensor, Tensor]
"""A batch with the images' places in the data set, (N,) int64."""


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of its input: side of the square image, and the mean and deviation per RGB channel."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) to float32 of mean 0 and deviation 1 over the training set."""
        mean = torch.tensor(self.mean, device=images.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, 3, 1, 1)
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set with its training and held-out parts."""

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: ArrayImages | FolderImages
    held_out: ArrayImages | FolderImages


class ArrayImages(Dataset):
    """Images held in memory as uint8 (N, 3, S, S); `shift` and `flip` augment them.

    `shift` pads by so many black pixels on each side and crops at random; `flip` mirrors half of the images.
    """

    def __init__(self, images: Tensor, labels: Tensor, shift: int = 0, flip: bool = False, seed: int = 0):
        self.images, self.labels = images, labels
        self.shift, self.flip, self.seed = shift, flip, seed
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, index: np.ndarray, like: ArrayImages) -> ArrayImages:
        """The images at `index`, augmented as `like` is."""
        return ArrayImages(self.images[index], self.labels[index], like.shift, like.flip, like.seed)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index = torch.tensor([key[1] for key in keys])
        images = self.images[index]
        if self.shift or self.flip:
            images = self._augment(images, torch.from_numpy(self._draws(keys[0][0]))[index])
        return images, self.labels[index]

    def _draws(self, epoch: int) -> np.ndarray:
        """Row, column and mirror draw of every image in `epoch`."""
        if self._drawn is None or self._drawn[0] != epoch:
            high = [2 * self.shift + 1, 2 * self.shift + 1, 2 if self.flip else 1]
            random = generator(self.seed, Stream.AUGMENTATION, epoch)
            self._drawn = epoch, random.integers(0, high, (len(self), 3))
        return self._drawn[1]

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        side = torch.arange(images.shape[-1])
        rows = draws[:, 0, None] + side
        columns = draws[:, 1, None] + torch.where(draws[:, 2, None] == 1, side.flip(0), side)
        padded = F.pad(images, [self.shift] * 4)
        return padded.permute(0, 2, 3, 1)[
            torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]
        ].permute(0, 3, 1, 2)


class FolderImages(Dataset):
    """Image files with labels; `transform` turns a PIL image into one of the network's size, by torch's generator."""

    def __init__(self, files: Sequence[tuple[str, int]], transform: Callable[[Any], Any], seed: int = 0):
        self.files, self.transform, self.seed = files, transform, seed

    def __len__(self) -> int:
        return len(self.files)

    def part(self, index: np.ndarray, like: FolderImages) -> FolderImages:
        """The images at `index`, transformed as `like` does."""
        return FolderImages([self.files[i] for i in index], like.transform, like.seed)

    @property
    def labels(self) -> Tensor:
        """(N,) int64, as `ArrayImages` has them."""
        return torch.tensor([label for _, label in self.files])

    def __getitems__(self, keys: Sequence[Key]) -> Batch | UserError:
        # A data-loading worker would wrap an exception's message in its traceback, so the error travels as a value.
        try:
            images = torch.stack([self._image(*key) for key in keys])
        except UserError as error:
            return error
        return images, torch.tensor([self.files[index][1] for _, index in keys])

    def _image(self, epoch: int, index: int) -> Tensor:
        image = open_image(self.files[index][0])
        with torch.random.fork_rng(devices=[]):
            seed_all(self.seed, Stream.AUGMENTATION, epoch, index)
            return to_tensor(self.transform(image))


class IndexedImages(Dataset):
    """`images` whose batches also tell each image's place in it."""

    def __init__(self, images: ArrayImages | FolderImages):
        self.images = images

    def __getitems__(self, keys: Sequence[Key]) -> IndexedBatch | UserError:
        batch = self.images.__getitems__(keys)
        return batch if isinstance(batch, UserError) else (*batch, torch.tensor([index for _, index in keys]))


def open_image(path: str | Path) -> Any:
    """The image file at `path` as an RGB PIL image; UserError when it is missing or not an image."""
    image = require("PIL.Image", "reading image files")
    try:
        with image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read {path} as an image: {error}.") from error


def to_tensor(image: Any) -> Tensor:
    """A PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class CentreCrop:
    """Scale the shorter side to 8/7 of `size` (256 for 224; to `size` itself below 64 pixels), then crop the centre."""

    def __init__(self, size: int):
        self.size, self.shorter = size, size if size < 64 else round(size * 8 / 7)

    def __call__(self, image: Any) -> Any:
        scale = self.shorter / min(image.size)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.resize((width, height), resample=2).crop((left, top, left + self.size, top + self.size))


class EpochBatches(Sampler):
    """The training batches of one epoch for one process: set `epoch` and `first_step`, then iterate.

    `batch_size` counts the images of all processes together; the last incomplete batch of an epoch is left out, since
    batch norm and the averaging over processes need equal shares.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        if count < batch_size:
            raise UserError(f"{count} training images are fewer than one batch of {batch_size}: lower --batch-size.")
        if batch_size % processes:
            raise UserError(f"--batch-size {batch_size} cannot be shared equally by {processes} processes.", usage=True)
        if batch_size // processes < 2:
            raise UserError("--batch-size is too small: batch norm needs two images per process at least.", usage=True)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = generator(self.seed, Stream.ORDER, self.epoch).permutation(self.count)
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.processes]]


class HeldOutBatches(Sampler):
    """Every image once, in order, shared out among the processes; the last batch may be smaller."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, processes: int = 1):
        self.indices = range(rank, count, processes)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]


def loader(
    images: ArrayImages | FolderImages | IndexedImages, batches: Sampler, workers: int, pin_memory: bool
) -> DataLoader:
    """A DataLoader over `images` in the order of `batches`; its workers live as long as it does."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def checked(batches: DataLoader) -> Iterator[Any]:
    """The batches of a `loader`, `IndexedBatch` over `IndexedImages` and else `Batch`; raises the UserError that a
    worker met."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def load_data(name: str, folder: str | Path | None, image_size: int | None = None, seed: int = 0) -> ImageData:
    """The data set called `name`: digits, cifar10, cifar100, imagenet, or a path with train/ and val/ folders.

    `folder` is where CIFAR is kept (and downloaded to) or ImageNet lies. UserError names the folder and what it should
    hold when the data is missing or damaged.
    """
    if name == "digits":
        return _digits(image_size or 32, seed)
    if name in _CIFAR:
        if image_size not in (None, 32):
            raise UserError(f"--image-size {image_size}: {name} has 32x32 images.", usage=True)
        return _cifar(name, Path(folder or "data"), seed)
    if name == "imagenet":
        return _folder(name, Path(folder or "data/imagenet"), image_size or 224, seed)
    if not Path(name).is_dir():
        raise UserError(
            f"--data {name} is neither digits, cifar10, cifar100, imagenet nor a folder with train/ and val/.",
            usage=True,
        )
    return _folder(name, Path(name), image_size or 224, seed)


def with_validation(data: ImageData, share: float, seed: int) -> ImageData:
    """`data` whose training part is split: `share` of each class is held out in place of `data`'s held-out images.

    They are preprocessed as those are, without augmentation. At least one image of each class is held out and one
    stays; UserError when a class has fewer than two. The draw depends on `seed` alone.
    """
    labels, random = data.train.labels.numpy(), generator(seed, Stream.VALIDATION)
    validation = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(data.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(
                f"class {name} of {data.name} has {len(members)} training images: a validation part needs 2."
            )
        held_out = min(max(1, round(share * len(members))), len(members) - 1)
        validation[random.permutation(members)[:held_out]] = True
    kept, held = np.flatnonzero(~validation), np.flatnonzero(validation)
    # mypy cannot know that both parts are of one kind.
    train, like = cast("Any", data.train), data.held_out
    return replace(data, train=train.part(kept, train), held_out=train.part(held, like))


def _digits(image_size: int, seed: int) -> ImageData:
    """1,797 real 8x8 images of handwritten digits; a fifth of each class, always the same, is held out."""
    datasets = require("sklearn.datasets", "the digits data set")
    split = require("sklearn.model_selection", "the digits data set").train_test_split
    bunch = datasets.load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16
    grey = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = (grey * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target)
    train, held_out = split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=bunch.target)
    return ImageData(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        preprocessing=Preprocessing(image_size, (0.305,) * 3, (0.324,) * 3),
        train=ArrayImages(images[train], labels[train], shift=image_size // 8, seed=seed),
        held_out=ArrayImages(images[held_out], labels[held_out]),
    )


_CIFAR = {
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
"""torchvision's class, and mean and deviation of the training images."""


def _cifar(name: str, folder: Path, seed: int) -> ImageData:
    class_name, mean, std = _CIFAR[name]
    source = getattr(require("torchvision.datasets", f"the {name} data set"), class_name)
    try:
        parts = [source(str(folder), train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision lets urllib's, tarfile's, pickle's and its own errors through
        raise UserError(
            f"{name} is not in {folder.resolve()} and could not be downloaded from {source.url} ({error}): put the "
            f"file {source.filename} (MD5 {source.tgz_md5}) there, or its unpacked folder {source.base_folder}."
        ) from error
    train, held_out = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), p.targets) for p in parts)
    return ImageData(
        name=name,
        classes=tuple(parts[0].classes),
        preprocessing=Preprocessing(32, mean, std),
        train=ArrayImages(train[0], torch.tensor(train[1]), shift=4, flip=True, seed=seed),
        held_out=ArrayImages(held_out[0], torch.tensor(held_out[1])),
    )


def _folder(name: str, folder: Path, image_size: int, seed: int) -> ImageData:
    image_folder = require("torchvision.datasets", "a folder of images").ImageFolder
    parts = []
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part} is missing: {folder} should hold train/CLASS/IMAGE and val/CLASS/IMAGE.")
        try:
            parts.append(image_folder(str(folder / part)))
        except FileNotFoundError as error:
            raise UserError(f"{folder / part} holds no CLASS/IMAGE files for some class: {error}.") from error
    train, held_out = parts
    if train.classes != held_out.classes:
        odd = sorted(set(train.classes) ^ set(held_out.classes))
        raise UserError(f"{folder}: train/ and val/ hold different classes, among them {', '.join(odd[:5])}.")
    return ImageData(
        name=name,
        classes=tuple(train.classes),
        preprocessing=Preprocessing(image_size, IMAGENET_MEAN, IMAGENET_STD),
        train=FolderImages(train.samples, _random_crop(image_size, auto_augment=name == "imagenet"), seed),
        held_out=FolderImages(held_out.samples, CentreCrop(image_size)),
    )


def _random_crop(image_size: int, auto_augment: bool) -> Callable[[Any], Any]:
    """Crop of random area and aspect, mirrored half of the time; the published ImageNet code adds AutoAugment."""
    transforms = require("torchvision.transforms", "a folder of images")
    steps = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*steps, transforms.AutoAugment()] if auto_augment else steps)
