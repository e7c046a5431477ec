"""Where real pictures come from: scikit-learn's digits, folders of images, and torchvision's MNIST and CIFAR-10."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms.v2 import functional as transforms

from vdm_utils.errors import VDMError
from vdm_utils.pictures import ImageSet, Pictures

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
PROJECT_DATA = Path(__file__).resolve().parent.parent / "data"  # notebooks run in a folder of their own
SECONDS = 10.0  # without a word from a server, after which a download is given up; torchvision would wait for ever
HELD_OUT = 5_000  # at most so many training pictures, and at most a tenth of them, are the validation split
# pictures of every class; of MNIST, whose classes differ, those of the smallest
PUBLISHED = {"CIFAR10": {"train": 5_000, "test": 1_000}, "MNIST": {"train": 5_421, "test": 892}}


def digits(split: str, seed: int) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (8×8, 0..16), each pixel doubled to 16×16; 60/15/25 % splits."""
    from sklearn.datasets import load_digits

    scanned = load_digits()
    pixels = torch.from_numpy((scanned.images * (255 / 16)).round().astype(np.uint8))[:, None]
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    order = np.random.default_rng(0).permutation(len(pixels))  # the split itself never depends on `seed`
    bounds = {"train": (0, 1078), "validation": (1078, 1348), "test": (1348, 1797)}[split]
    part = torch.from_numpy(order[slice(*bounds)])
    classes = torch.from_numpy(scanned.target.astype(np.int64))
    pictures = ImageSet("digits", split, pixels[part], classes[part], [str(d) for d in range(10)], seed=seed)
    pictures.patch_size = 2
    return pictures


# ---------------------------------------------------------------- image files


def read_image(file: Path, channels: int = 3) -> Image.Image:
    """One picture of any mode (grey, palette, transparent, CMYK, 16 bits), upright, with 1 or 3 channels of 8 bits."""
    try:
        # from 90 million pixels on Pillow only warns: a file of a few kilobytes that unpacks to them would fill the memory
        bombs = warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)
        with bombs, Image.open(file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels, whose range is not known")
            if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            elif image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:  # what is see-through is white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB" if channels == 3 else "L")
    # Pillow raises OSError, SyntaxError, ValueError, DecompressionBombError … depending on the format and the damage
    except Exception as error:
        raise VDMError("an image cannot be read", where=str(file), expected="a picture file", got=error,
                       fix="replace or delete it, or leave such files out with skip_unreadable") from error  # fmt: skip


def read_or_skip(file: Path, channels: int = 3) -> Image.Image | None:
    """The same, or None, with a warning, where the file cannot be read."""
    try:
        return read_image(file, channels)
    except VDMError as error:
        logger.warning("left out: %s", str(error).replace("\n", " "))
        return None


def read_fitted(files: Sequence[str | Path], size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Picture files as uint8 [B, C, height, width]: scaled to cover `size`, and the centre cut out."""
    fitted = [ImageOps.fit(read_image(Path(f), channels), size[::-1], Image.Resampling.BICUBIC) for f in files]
    return torch.stack([transforms.pil_to_tensor(picture) for picture in fitted])


def read_pictures(files: Sequence[str | Path], size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Picture files as `pixel_values` [B, C, height, width] in −1..1, fitted to `size`."""
    return transforms.to_dtype(read_fitted(files, size, channels), torch.float32, scale=True) * 2 - 1


def class_folders(folder: Path) -> list[str]:
    """The sorted names of the folders in a folder, hidden ones left out: a class is its place in this list."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def check_same_classes(folders: Sequence[Path]) -> None:
    """Raise `VDMError` unless all these splits have the same class folders: a label would mean another class in each."""
    for folder in folders[1:]:
        if differing := sorted(set(class_folders(folders[0])) ^ set(class_folders(folder))):
            raise VDMError("the splits have different classes", where=str(folder), expected=f"the folders of {folders[0]}",
                           got=f"only in one of the two: {', '.join(differing)}", fix="give both the same class folders")  # fmt: skip


def list_images(folder: Path) -> tuple[list[Path], np.ndarray, list[str]]:
    """Files, their class indices, and the sorted class names of `<folder>/<class>/<image>`; hidden files are ignored."""
    names = class_folders(folder)
    if len(names) < 2:
        raise VDMError("too few class folders", where=str(folder), expected="at least 2", got=len(names),
                       fix="lay the images out as <folder>/<class>/<image>")  # fmt: skip
    files, classes = [], []
    for label, name in enumerate(names):
        found = sorted(
            p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        if not found:
            raise VDMError("a class folder holds no image", where=f"{folder}/{name}", expected="image files", got="none",
                           fix="remove the folder or unpack the data again")  # fmt: skip
        files += found
        classes += [label] * len(found)
    return files, np.array(classes), names


def read_image_folder(
    name: str, folder: Path, split: str, skip_unreadable: bool
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """MNIST or CIFAR10 as `<folder>/<class>/<image>`, in memory: uint8 [M, C, H, W], class indices [M], class names (sorted).
    Of a folder of training pictures only those of the `split` (`train` or `validation`, see `held_out`) are read."""
    files, classes, names = list_images(folder)
    counts, whole = np.bincount(classes), PUBLISHED[name][folder.name]
    if counts.min() < whole:
        logger.warning("%s holds only %d pictures in %s, of %d per class: unless you chose them, unpack the data again",
                       folder, counts.min(), names[counts.argmin()], whole)  # fmt: skip
    part = np.arange(len(files)) if split == "test" else held_out(np.arange(len(files)), split)
    read = read_or_skip if skip_unreadable else read_image
    images = {i: read(files[i], 1 if name == "MNIST" else 3) for i in part}
    images = {i: transforms.pil_to_tensor(image) for i, image in images.items() if image is not None}
    sizes = {tuple(image.shape[1:]) for image in images.values()}
    if len(sizes) != 1:
        raise VDMError("images of different sizes" if sizes else "no image can be read", where=str(folder), expected="one size",
                       got=sorted(sizes)[:4], fix="resize them to one size first, or unpack the data again")  # fmt: skip
    return torch.stack([*images.values()]), torch.from_numpy(classes[[*images]]), names


class FolderImages(Pictures):
    """Image files of any size, read when they are asked for: scaled to cover a square, and its centre cut out."""

    patch_size = 16

    def __init__(self, name, split, files: list[Path], classes: np.ndarray, names, *, side: int, seed=0):
        super().__init__(name, split, len(files), seed)
        self.files, self.classes, self.id2label = files, torch.from_numpy(classes), dict(enumerate(names))
        self.image_size = (side, side)

    def _draw(self, index):
        pixels = read_fitted([self.files[i] for i in index], self.image_size)
        return {"pixels": pixels, "labels": self.classes[torch.from_numpy(index)]}


def held_out(
    members: np.ndarray, split: str, missing: Sequence[str] = ("validation",), most: int = HELD_OUT
) -> np.ndarray:
    """Those of the training pictures `members` that are a split, shuffled; it never depends on a seed.

    Each `missing` split gets a tenth, at `most` so many, and at least one where there are three; `train` gets the others.
    """
    order = np.random.default_rng(0).permutation(members)
    cut = max(1, min(len(order) // 10, most)) if len(order) >= 3 else 0
    if split == "train":
        return order[cut * len(missing) :]
    first = cut * missing.index(split)
    return order[first : first + cut]


def image_folder(
    name: str, root: Path, split: str, folders: dict[str, str], *, side: int, seed: int, skip_unreadable: bool
) -> FolderImages:
    """A split of a folder with `<class>/` folders in it, or in its `train`, `validation` and `test` folders.

    `folders` names the sub-folder of each split, e.g. {"train": "train", "test": "val"}. A split without one is taken
    out of the training pictures: a tenth, drawn class by class.
    """
    present = {part: root / sub for part, sub in folders.items() if (root / sub).is_dir()}
    if "train" in present:
        check_same_classes(list(present.values()))
    if split != "train" and split in present:
        files, classes, names = list_images(present[split])
        part = np.arange(len(files))
    else:
        files, classes, names = list_images(present.get("train", root))
        missing = [other for other in ("test", "validation") if other not in present]
        most = HELD_OUT // len(names)
        per_class = [held_out(np.flatnonzero(classes == c), split, missing, most) for c in range(len(names))]
        part = np.concatenate(per_class)
    if skip_unreadable:
        part = np.array([i for i in part if read_or_skip(files[i]) is not None], dtype=np.int64)
    if not len(part):
        raise VDMError(f"no picture for the {split} split", where=str(root), expected="at least 3 pictures per class",
                       got=len(files), fix=f"add pictures, or make a {split} folder with class folders in it")  # fmt: skip
    return FolderImages(name, split, [files[i] for i in part], classes[part], names, side=side, seed=seed)


# ---------------------------------------------------------------- datasets that have to be somewhere


def search_path(data_dir: str | os.PathLike | None) -> list[Path]:
    """Where downloaded data is looked for, in order."""
    candidates = [data_dir, os.environ.get("VDM_DATA_DIR"), "data", PROJECT_DATA if PROJECT_DATA.is_dir() else None]
    return list(dict.fromkeys(Path(c) for c in candidates if c))


def find_image_folder(name: str, part: str, data_dir) -> Path | None:
    """`<place>/<name>/<part>`, with class folders in it, in the first place that has it: MNIST or CIFAR10 as picture files."""
    return next((f for p in search_path(data_dir) if (f := p / name.lower() / part).is_dir()), None)


def reads_files(name: str, data_dir) -> bool:
    """Whether a dataset's pictures are files, one each, which may be damaged one by one."""
    return name in ("folder", "ImageNet") or any(
        find_image_folder(name, part, data_dir) for part in PUBLISHED.get(name, ())
    )


def imagenet(split: str, data_dir, **options) -> FolderImages:
    """ImageNet as torchvision lays it out: `imagenet/{train,val}/<wnid>/*`, never downloaded. `options`: of `image_folder`."""
    places = [place / name for place in search_path(data_dir) for name in ("imagenet", "ImageNet")]
    root = next((p for p in places if (p / "val").is_dir() and (p / "train").is_dir()), None)
    if root is None:
        raise VDMError("ImageNet is not here", where="load_data", expected="imagenet/train/<wnid>/* and imagenet/val/<wnid>/* in "
                       + ", ".join(map(str, search_path(data_dir))), got="no such folders",
                       fix="unpack it there (image-net.org), or set VDM_DATA_DIR; it is never downloaded")  # fmt: skip
    pictures = image_folder("ImageNet", root, split, {"train": "train", "test": "val"}, **options)
    mapping = root / "LOC_synset_mapping.txt"  # "n01440764 tench, Tinca tinca", as distributed with the pictures
    if mapping.is_file():
        words = dict(line.split(" ", 1) for line in mapping.read_text().splitlines() if " " in line)
        pictures.id2label = {i: words.get(n, n).split(",")[0] for i, n in pictures.id2label.items()}
    return pictures


def own_folder(split: str, data_dir, **options) -> FolderImages:
    """A user's own pictures: `<data_dir>/<class>/*`, or that in `train`, `validation` and `test`. `options`: of `image_folder`."""
    root = Path(data_dir or "data/")
    if not root.is_dir():
        raise VDMError("no such folder", where="dataset folder", expected="data_dir with one folder per class", got=root,
                       fix="check data_dir")  # fmt: skip
    validation = "val" if (root / "val").is_dir() else "validation"
    return image_folder("folder", root, split, {"train": "train", "validation": validation, "test": "test"}, **options)


def drop_half_unpacked(folder: Path) -> None:
    """Delete files of MNIST that are shorter than their heads say: a killed unpacking leaves such, and torchvision, which only
    looks whether a file is there, would never unpack it again."""
    for file in folder.glob("*-ubyte"):
        head = np.fromfile(file, ">i4", count=4)  # a number whose last byte says how many sizes follow it, and these
        shape = head[1 : 1 + head[0] % 256] if len(head) == 4 else head
        if len(head) < 4 or file.stat().st_size < 4 + 4 * len(shape) + shape.prod(dtype=np.int64):
            file.unlink()


def download(dataset: type[MNIST | CIFAR10], place: Path, part: str) -> MNIST | CIFAR10:
    """torchvision's download, by one process at a time: those that waited find the files and ask for nothing."""
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / f".{dataset.__name__}.lock"):  # the system opens it when its holder is killed
        drop_half_unpacked(place / "MNIST" / "raw")  # of CIFAR-10 every file is checked
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(SECONDS)
        try:
            return dataset(str(place), train=part == "train", download=True)
        finally:
            socket.setdefaulttimeout(patience)


def find_or_download(name: str, part: str, places: list[Path]) -> MNIST | CIFAR10:
    """torchvision's dataset, from the first place that has its files, or else downloaded to the first place."""
    dataset = {"MNIST": MNIST, "CIFAR10": CIFAR10}[name]
    for place in places:
        with suppress(Exception):  # torchvision raises RuntimeError, OSError … depending on what is missing or damaged
            return dataset(str(place), train=part == "train", download=False)
    try:
        return download(dataset, places[0], part)
    except Exception as error:  # URLError too
        raise VDMError(f"{name} is not here and cannot be downloaded", where="load_data", expected=f"{name.lower()}/{part}/<class>/* "
                       f"or torchvision's files in {', '.join(map(str, places))}", got=f"{type(error).__name__}: {error}",
                       fix="unpack it there, set VDM_DATA_DIR, or use toy, shapes or digits, which need no files") from error  # fmt: skip


def downloadable(name: str, split: str, data_dir, seed: int, skip_unreadable: bool) -> ImageSet:
    """MNIST or CIFAR10: an image folder, else torchvision's own files, else torchvision's download."""
    part = "test" if split == "test" else "train"
    folder = find_image_folder(name, part, data_dir)
    if folder is not None:
        if (found := len(class_folders(folder))) != 10:
            raise VDMError("data only half unpacked", where=str(folder), expected="10 class folders",
                           got=found, fix="unpack the data again")  # fmt: skip
        check_same_classes([half for half in (folder.with_name("train"), folder.with_name("test")) if half.is_dir()])
        images, classes, names = read_image_folder(name, folder, split, skip_unreadable)
    else:
        found = find_or_download(name, part, search_path(data_dir))
        images = torch.as_tensor(found.data)
        images = images[:, None] if name == "MNIST" else images.permute(0, 3, 1, 2).contiguous()
        classes, names = torch.as_tensor(found.targets), found.classes
        if split != "test":
            chosen = torch.from_numpy(held_out(np.arange(len(images)), split))
            images, classes = images[chosen], classes[chosen]
    return ImageSet(name, split, images, classes, list(names), seed=seed)
