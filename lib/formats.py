"""Readers, one per format: which images, which labels, which classes. Nothing is split or copied here.

A reader returns a Source; its images are a uint8 array (N,H,W) or (N,H,W,3), or lazy rows, read when indexed.
What is wrong with a file becomes a DataError of one line: the file, what was found, what was expected.
"""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lib.images import DataError, H5Encoded, H5Images, ImageFiles, LazyImages, Split, describe, need, open_h5

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ID_COLUMNS = ("id", "slide", "slide_id", "slide_name", "case_id", "file", "filename", "name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "y")

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


@dataclass
class Source:
    """What a reader found: splits under "train", "val", "test", or one under "all" when the format names none."""

    parts: dict[str, Split]
    classes: list[str]
    class_ids: list[str]  # as in the files: folder names, WordNet ids; otherwise the classes again


def read(path: Path, labels_csv: Path | None = None) -> Source:
    """The images at `path`, whatever the format. `labels_csv` goes with a folder of HDF5 slides and only with that."""
    if labels_csv and not is_slides(path):
        raise DataError(f"labels_csv={str(labels_csv)!r}: {path} is no folder of *.h5 slides, expected one")
    if path.is_file() and path.suffix in (".h5", ".hdf5"):
        return hdf5(path)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        return cifar(path)
    if path.is_file():
        raise DataError(f"{path}: a {path.suffix or 'nameless'} file, expected .h5, .hdf5 or CIFAR's binary .tar.gz")
    if is_slides(path):
        return slides(path, labels_csv)
    if (path / "train-images-idx3-ubyte.gz").exists():
        return idx(path)
    if (path / "wnids.txt").exists() and (path / "val" / "val_annotations.txt").exists():
        return tiny_imagenet(path)
    return folders(path)


def is_slides(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.h5"))


# ---- arrays ---------------------------------------------------------------------------------------------------------


def hdf5(path: Path) -> Source:
    """`images` or `jpeg` with `labels`, or `train_images`, `train_labels`, `test_…`, `val_…`; `masks` optional.

    Attribute `classes` or `class_names` names the classes (otherwise "0", "1", …), `wnids` their WordNet ids.
    """
    with open_h5(path) as file:
        names = {name: f"{name}_" for name in FOLDERS if f"{name}_images" in file or f"{name}_jpeg" in file}
        if not names and not {"images", "jpeg"} & set(file):
            raise DataError(f"{path}: keys {sorted(file)}, expected images or jpeg with labels, or train_images, …")
        given = next((file.attrs[key] for key in ("classes", "class_names") if key in file.attrs), None)
        classes = None if given is None else _strings(given, f"{path}: the classes")
        ids = _strings(file.attrs["wnids"], f"{path}: wnids") if "wnids" in file.attrs else None
        parts = {}
        for name, prefix in (names or {"all": ""}).items():
            coded = f"{prefix}images" not in file
            images = H5Encoded(path, f"{prefix}jpeg") if coded else H5Images([path], f"{prefix}images")
            labels = need(file, f"{prefix}labels", path)[()]
            labels = check_labels(labels, f"{path}: {prefix}labels", len(images), len(classes) if classes else None)
            parts[name] = Split(images, labels, _masks(file, f"{prefix}masks", images, path))
    if classes is None:
        classes = [str(n) for n in range(1 + max((int(p.labels.max()) for p in parts.values() if len(p)), default=0))]
    if ids is None:  # two classes of one name are two all the same
        ids = classes if len({*classes}) == len(classes) else [f"{n} {name}" for n, name in enumerate(classes)]
    if len(ids) != len(classes):
        raise DataError(f"{path}: {len(ids)} wnids, expected one for each of {len(classes)} classes")
    return Source({name: part for name, part in parts.items() if len(part)} or parts, classes, ids)


def _masks(file: h5py.File, key: str, images: LazyImages, path: Path) -> np.ndarray | None:
    if key not in file:
        return None
    if not isinstance(images, H5Images) or file[key].shape != images.shape[:3]:
        raise DataError(f"{path}: {key!r} is {describe(file[key])}, expected (n, height, width) as the images")
    return file[key][()].astype(bool)


def slides(path: Path, labels_csv: Path | None) -> Source:
    """A folder of one *.h5 per slide, key `img` (n,H,W,3); the CSV gives each slide (file name without .h5) a label."""
    files = {file.stem: file for file in sorted(path.glob("*.h5"))}
    if labels_csv is None:
        raise DataError(f"{path}: a folder of {len(files)} *.h5 slides without labels, expected labels_csv=…")
    label_of = _slide_labels(labels_csv)
    for what, odd in (
        ("rows without a slide", label_of.keys() - files),
        ("slides without a row", files - label_of.keys()),
    ):
        if odd:
            raise DataError(
                f"{labels_csv}: {len(odd)} {what} ({', '.join(sorted(odd)[:3])}), "
                f"expected one row for each of the {len(files)} slides in {path}"
            )
    images = H5Images(list(files.values()), "img")
    lengths = np.diff(images.ends, prepend=0)
    for file, length in zip(files.values(), lengths, strict=True):
        if length == 0:
            raise DataError(f"{file}: 'img' holds no images, expected at least one")
    numeric = all(label.lstrip("-").isdigit() for label in label_of.values())
    classes = sorted(set(label_of.values()), key=int if numeric else str)
    labels = np.repeat([classes.index(label_of[stem]) for stem in files], lengths).astype(np.int64)
    return Source({"all": Split(images, labels, groups=np.repeat(list(files), lengths))}, classes, classes)


def _slide_labels(labels_csv: Path) -> dict[str, str]:
    import pandas as pd  # here: a light import of lib.data matters to every notebook

    try:
        table = pd.read_csv(labels_csv, dtype=str, keep_default_na=False)  # ids such as 007 stay as they are
    except (OSError, ValueError) as error:
        raise DataError(f"{labels_csv}: unreadable ({error}), expected a CSV with a slide and a label column") from None
    names = {str(column).strip().lower().replace(" ", "_"): column for column in table.columns}
    columns = [next((names[n] for n in known if n in names), None) for known in (ID_COLUMNS, LABEL_COLUMNS)]
    if None in columns:
        raise DataError(
            f"{labels_csv}: columns {list(table.columns)}, expected one of {', '.join(ID_COLUMNS)} "
            f"and one of {', '.join(LABEL_COLUMNS)}"
        )
    ids, labels = (table[column].str.strip() for column in columns)
    ids = ids.str.removesuffix(".h5")
    if ids.duplicated().any():
        raise DataError(f"{labels_csv}: id {ids[ids.duplicated()].iloc[0]!r} more than once, expected each slide once")
    empty = labels.str.lower().isin(["", "nan"])
    if empty.any():
        raise DataError(f"{labels_csv}: no label for {ids[empty].iloc[0]!r}, expected one for each slide")
    return dict(zip(ids, labels, strict=True))


def idx(path: Path) -> Source:
    """The four files of (Fashion-)MNIST: train-… and t10k-…, images-idx3-ubyte.gz and labels-idx1-ubyte.gz."""
    parts = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx_array(path / f"{prefix}-images-idx3-ubyte.gz", 3)
        file = path / f"{prefix}-labels-idx1-ubyte.gz"
        parts[name] = Split(images, check_labels(_idx_array(file, 1), str(file), len(images), 10))
    classes = [str(digit) for digit in range(10)]
    return Source(parts, classes, classes)


def _idx_array(path: Path, ndim: int) -> np.ndarray:
    """An idx file of unsigned bytes: 0, 0, 8, ndim, then ndim big-endian 32-bit sizes, then the bytes."""
    try:
        with gzip.open(path) as file:
            head = file.read(4 + 4 * ndim)
            if head[:4] != bytes([0, 0, 8, ndim]) or len(head) < 4 + 4 * ndim:
                raise DataError(
                    f"{path}: starts with {head[:4].hex()}, expected 000008{ndim:02d}, an idx file of bytes"
                )
            shape = tuple(np.frombuffer(head[4:], ">u4").tolist())
            body = file.read(math.prod(shape) + 1)  # never more, however much the archive unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({error}), expected a whole gzip file") from None
    if len(body) != math.prod(shape):
        raise DataError(
            f"{path}: {len(body):,} bytes or more after the header, expected {math.prod(shape):,} for {shape}"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def cifar(path: Path) -> Source:
    """CIFAR-10's or CIFAR-100's binary archive (fine labels), read without unpacking."""
    files = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                if member.isreg() and member.size < 1 << 28 and member.name.endswith((".bin", ".txt")):
                    files[Path(member.name).name] = archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: unreadable ({error}), expected a whole CIFAR binary archive") from None
    ten = {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]}
    hundred = {"train": ["train.bin"], "test": ["test.bin"]}
    for members, names, head in ((ten, "batches.meta.txt", 1), (hundred, "fine_label_names.txt", 2)):
        if {names, *members["train"], *members["test"]} <= files.keys():
            classes = files[names].decode().split()
            parts = {name: _records([files[m] for m in ms], head, len(classes), path) for name, ms in members.items()}
            return Source(parts, classes, classes)
    raise DataError(f"{path}: holds {sorted(files)}, expected {ten['train'][0]}, … or train.bin, test.bin")


def _records(blocks: list[bytes], head: int, classes: int, path: Path) -> Split:
    """Records of `head` label bytes, the last one counting, and 32 × 32 pixels of red, green, blue after each other."""
    data = b"".join(blocks)
    if not data or len(data) % (head + 3072):
        raise DataError(f"{path}: {len(data):,} bytes of records, expected a multiple of {head + 3072}")
    records = np.frombuffer(data, np.uint8).reshape(-1, head + 3072)
    images = records[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return Split(images, check_labels(records[:, head - 1], str(path), len(images), classes))


# ---- folders --------------------------------------------------------------------------------------------------------


def folders(path: Path) -> Source:
    """One folder per class, under train/ (and val/, test/) or directly under `path`; labels in order of folder name."""
    found = {name: path / f for name, given in FOLDERS.items() for f in given if (path / f).is_dir()}
    if found and "train" not in found and any(each.is_dir() for folder in found.values() for each in folder.iterdir()):
        names = " and ".join(f"{folder.name}/" for folder in found.values())
        raise DataError(f"{path}: {names} without train/, expected train/ beside it, or one folder per class")
    named = found if "train" in found else {"all": path}
    ids = sorted(d.name for d in named.get("train", path).iterdir() if d.is_dir() and not d.name.startswith("."))
    if not ids:
        raise DataError(f"{named.get('train', path)}: no folders, expected one folder of images per class")
    parts = {name: _labelled(folder, ids) for name, folder in named.items()}
    return Source(parts, _names(ids, path), ids)


def _labelled(folder: Path, ids: list[str]) -> Split:
    here = {d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")}
    if not here:
        raise DataError(f"{folder}: no folders of classes, expected one for each as in train/, or no {folder.name}/")
    if here - set(ids):
        raise DataError(
            f"{folder / min(here - set(ids))}: no class of that name among the training images, "
            f"expected {', '.join(ids[:3])}, …"
        )
    paths, labels = [], []
    for label, name in enumerate(ids):
        below = _images_below(folder / name)
        if not below and name in here:
            raise DataError(
                f"{folder / name}: a class without images, expected at least one of {sorted(IMAGE_SUFFIXES)}"
            )
        paths += below
        labels += [label] * len(below)
    return Split(ImageFiles(paths), np.array(labels, np.int64))


def tiny_imagenet(path: Path) -> Source:
    """Tiny ImageNet as published; labels in order of WordNet id. Its labelled val/ is the test split."""
    ids = sorted((path / "wnids.txt").read_text().split())
    train = _labelled(path / "train", ids)
    paths, labels = [], []
    annotations = path / "val" / "val_annotations.txt"
    for line in annotations.read_text().splitlines():
        name, wnid, *_ = line.split("\t") + [""]
        image = path / "val" / "images" / name
        if wnid not in ids:
            raise DataError(f"{annotations}: {name!r} is {wnid!r}, expected one of the {len(ids)} ids in wnids.txt")
        if not image.is_file():
            raise DataError(f"{image}: missing, expected because val_annotations.txt names it")
        paths.append(str(image))
        labels.append(ids.index(wnid))
    if len(np.unique(train.labels)) < len(ids):
        missing = ids[min(set(range(len(ids))) - set(train.labels.tolist()))]
        raise DataError(f"{path / 'train' / missing}: missing, expected because wnids.txt names it")
    return Source(
        {"train": train, "test": Split(ImageFiles(paths), np.array(labels, np.int64))}, _names(ids, path), ids
    )


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.join(base, name)
        for base, below, names in os.walk(folder)
        if not below.sort()
        for name in sorted(names)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    ]


def _names(ids: list[str], path: Path) -> list[str]:
    """Words for WordNet ids, from words.txt or the ten of Imagenette; the first synonym; other ids stay as they are."""
    words = dict(IMAGENETTE_CLASSES)
    if (path / "words.txt").exists():
        lines = (path / "words.txt").read_text().splitlines()
        words = {line.split("\t")[0]: line.split("\t")[-1].split(",")[0] for line in lines}
    return [words.get(name, name) for name in ids]


# ---- single values --------------------------------------------------------------------------------------------------


def check_labels(values: np.ndarray, where: str, count: int, classes: int | None = None) -> np.ndarray:
    """`values` as int64 (count,), each a whole number from 0 to below `classes`; DataError otherwise."""
    values = np.asarray(values)
    if values.shape != (count,) or values.dtype.kind not in "iuf":
        raise DataError(f"{where}: {values.shape} {values.dtype}, expected ({count},) whole numbers, one per image")
    if not np.isfinite(values).all():
        raise DataError(f"{where}: {np.sum(~np.isfinite(values))} labels are NaN or infinite, expected whole numbers")
    if (values != np.floor(values)).any():
        raise DataError(f"{where}: label {values[values != np.floor(values)][0]}, expected whole numbers")
    if count and (values.min() < 0 or (classes is not None and values.max() >= classes)):
        upper = "…" if classes is None else classes - 1
        raise DataError(f"{where}: labels {values.min()} to {values.max()}, expected 0 to {upper}")
    return values.astype(np.int64)


def _strings(values: Iterable, where: str) -> list[str]:
    if isinstance(values, str | bytes):
        raise DataError(f"{where} are one text, {values[:40]!r}, expected a list of names")
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
