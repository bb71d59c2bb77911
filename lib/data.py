"""Datasets: `load` gives train, val and test images of a known dataset or of any path, ready and checked.

Every format (lib.formats) becomes RGB uint8 images of one size. Decoding and resizing happen once: the result lies
in an HDF5 cache under `root`/cache, which is rebuilt when the source or a setting changes or when it is not whole.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from lib import digits, fetch, formats
from lib.formats import Source
from lib.images import DataError, H5Images, LazyImages, Split, fit

__all__ = ["DataError", "Dataset", "H5Images", "NAMES", "Split", "load"]

NAMES = ("digits", *fetch.NAMES)
SPLITS = ("train", "val", "test")
SPLIT_SEED = 20_261_121  # of every split made here; not the run's seed: all runs are measured on the same images
TEST_SHARE = 0.2  # cut off for testing where a dataset names no splits at all
IN_RAM = 1 << 30  # bytes; larger datasets stay on disk and are read image by image
CHUNK = 128  # images handled at a time while a cache is built
STATISTICS = {  # (mean, std) that published weights were trained with
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
VERSION = 2  # of the caches; raise it when their content changes


@dataclass
class Dataset:
    """Three splits and what they have in common. `mean`, `std`: per channel of the train images, on 0..1.

    `class_ids` are the files' own names of the classes (folder names, WordNet ids). `digest` is the SHA-256 over
    the classes and all images, labels, masks and slide ids in their splits: equal digests mean equal data.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str]
    class_ids: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digest: str

    def normalised(self, how: str) -> Dataset:
        """With the mean and std that pretrained weights expect, one of STATISTICS; "data" keeps the data's own."""
        if how == "data":
            return self
        if how not in STATISTICS:
            raise DataError(f"normalise={how!r}: expected data, {', '.join(STATISTICS)}")
        mean, std = STATISTICS[how]
        return replace(self, mean=mean, std=std)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, name)):,} {name}" for name in SPLITS)
        height, width = self.test.images.shape[1:3]
        return f"{self.name}: {sizes}; {len(self.classes)} classes; {height} × {width} px; {self.digest[:12]}"


def load(
    dataset: str | Path = "digits",
    *,
    root: str | Path = "data",
    seed: int = 0,
    img_size: int | None = None,
    labels_csv: str | Path | None = None,
    val_share: float = 0.1,
    undersample: bool = False,
) -> Dataset:
    """The dataset of that name (see NAMES) or at that path: uint8 RGB images, split into train, val and test.

    dataset:     a name; a folder of images, one folder per class, with or without train/ val/ test/ above; a
                 folder laid out as Tiny ImageNet or (gzipped) MNIST; a CIFAR binary archive; an HDF5 file; or a
                 folder of HDF5 slides together with `labels_csv` (see lib.formats.hdf5, lib.formats.slides).
    root:        where downloads and caches go.
    seed:        places digits and clutter of `digits`, and draws for `undersample`; it never moves a split.
    img_size:    short side resized to it (bicubic), then centre-cropped to a square; None keeps the size.
    val_share:   share of the training images (or slides) cut off as val where the data brings no val and test.
                 A labelled val without a test (Imagenette, Tiny ImageNet) *is* the test: nothing is chosen on it.
    undersample: as many training images of each class as of the rarest, drawn with `seed`.

    Without named splits a fifth becomes test and val_share of the rest val, stratified by class, slides whole. A
    class of fewer than three images cannot be split: then all is test, with a warning (slides: a DataError).
    Images stay on disk (H5Images) for slides and from 1 GiB on; otherwise they are numpy arrays.
    Raises DataError, one line saying where, what was found and what was expected.
    """
    _check(seed, img_size, val_share)
    root = Path(root)
    name, path = _locate(dataset, root, img_size)
    labels_csv = Path(labels_csv) if labels_csv else None
    if labels_csv and path is None:
        raise DataError(f"labels_csv is {labels_csv}, but dataset {name} brings its own labels: leave it out")

    def read() -> Source:
        source = _digits(seed) if path is None else formats.read(path, labels_csv)
        if name == "fashion-mnist":  # the files themselves name no classes
            source = replace(source, classes=formats.FASHION_CLASSES)
        return replace(source, parts=_divide(source, val_share, name))

    made_from = (
        {"seed": seed, **digits.settings()} if path is None else {"files": _files(path), "csv": _files(labels_csv)}
    )
    recipe = {"version": VERSION, "name": name, "img_size": img_size, "val_share": val_share, **made_from}
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    cache = root / "cache" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-{key[:12]}.h5"
    if not _complete(cache, key):
        _build(cache, key, name, read(), img_size)
    on_disk = path is not None and formats.is_slides(path)
    loaded = _open(cache, name, read, on_disk)
    return _undersampled(loaded, seed) if undersample else loaded


def _check(seed: int, img_size: int | None, val_share: float) -> None:
    if not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed={seed!r}: expected a whole number from 0")
    if img_size is not None and (not isinstance(img_size, int) or img_size < 1):
        raise DataError(f"img_size={img_size!r}: expected a number of pixels from 1, or None")
    if not 0 <= val_share < 1:
        raise DataError(f"val_share={val_share!r}: expected a share from 0 to below 1")


def _locate(dataset: str | Path, root: Path, img_size: int | None) -> tuple[str, Path | None]:
    """The dataset's name and its file or folder; `digits` has none."""
    if str(dataset) == "digits":
        return "digits", None
    if str(dataset) in fetch.NAMES:
        return str(dataset), fetch.known(str(dataset), root, img_size)
    path = Path(dataset)
    if path.exists():
        return path.resolve().name, path
    near = difflib.get_close_matches(str(dataset).lower(), NAMES, 1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"dataset={str(dataset)!r}: no such file or folder, expected one or a name of {', '.join(NAMES)}{hint}"
    )


def _digits(seed: int) -> Source:
    names = [str(n) for n in range(10)]
    return Source({name: Split(*digits.render(name, seed)) for name in SPLITS}, names, names)


# ---- splits ---------------------------------------------------------------------------------------------------------


def _divide(source: Source, val_share: float, name: str) -> dict[str, Split]:
    parts = dict(source.parts)
    if not any(map(len, parts.values())):
        raise DataError(f"{name}: no images, expected at least one")
    if set(parts) == {"train"}:
        parts = {"all": parts["train"]}
    if "all" in parts:
        whole = parts.pop("all")
        units = _units(whole)
        counts = np.bincount(whole.labels[units], minlength=len(source.classes))
        rare = int(np.argmin(np.where(counts > 0, counts, len(whole) + 1)))
        if counts[rare] >= 3:
            parts["train"], parts["test"] = _cut(whole, TEST_SHARE)
        elif whole.groups is not None:
            raise DataError(
                f"{name}: {counts[rare]} slides of class {source.classes[rare]!r}, expected 3 to split by slide"
            )
        else:
            warnings.warn(
                f"{name}: {counts[rare]} images of class {source.classes[rare]!r}, too few for three splits: "
                f"all {len(whole)} images are test, none are train or val",
                stacklevel=4,
            )
            parts["test"] = whole
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")
    if "val" not in parts and "train" in parts:
        parts["train"], parts["val"] = _cut(parts["train"], val_share)
    some = next(iter(parts.values()))
    return {split: parts[split] if split in parts else some.take(np.arange(0)) for split in SPLITS}


def _units(split: Split) -> np.ndarray:
    """A row of each thing that must not be torn apart: of each image, or of each slide."""
    return np.arange(len(split)) if split.groups is None else np.unique(split.groups, return_index=True)[1]


def _cut(split: Split, share: float) -> tuple[Split, Split]:
    """(rest, cut): of every class `share` of its images or slides, at least one of each and never all."""
    units, cut = _units(split), []
    for label in np.unique(split.labels[units]):
        mine = units[split.labels[units] == label]
        count = min(len(mine) - 1, max(1, round(share * len(mine)))) if share else 0
        cut.append(np.random.default_rng([SPLIT_SEED, label]).permutation(mine)[:count])
    cut = np.concatenate(cut) if cut else units
    chosen = np.isin(np.arange(len(split)), cut) if split.groups is None else np.isin(split.groups, split.groups[cut])
    return split.take(np.flatnonzero(~chosen)), split.take(np.flatnonzero(chosen))


def _undersampled(dataset: Dataset, seed: int) -> Dataset:
    labels, rng = dataset.train.labels, np.random.default_rng(seed)
    seen, counts = np.unique(labels, return_counts=True)
    drawn = [rng.choice(np.flatnonzero(labels == label), counts.min(), replace=False) for label in seen]
    train = dataset.train.take(np.sort(np.concatenate(drawn))) if drawn else dataset.train
    digest = hashlib.sha256(f"{dataset.digest} undersampled with seed {seed}".encode()).hexdigest()
    return replace(dataset, train=train, digest=digest)


# ---- cache ----------------------------------------------------------------------------------------------------------


def _walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders and the names of their files, links followed, each folder once."""
    seen = set()
    for base, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield base, names


def _files(path: Path | None) -> list:
    """Names, sizes and times of change of a file or of all files below a folder: what a cache was made from."""
    if path is None:
        return []
    below = [os.path.join(base, name) for base, names in _walk(path) for name in names]
    if path.is_dir() and not below:
        raise DataError(f"{path}: an empty folder, expected images or HDF5 files")
    try:
        found = [(name, os.stat(name)) for name in sorted(below) or [path]]
        return [str(path.resolve()), *((str(name), info.st_size, info.st_mtime_ns) for name, info in found)]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a readable file") from None


def _complete(cache: Path, key: str) -> bool:
    try:
        with h5py.File(cache, "r") as file:
            return file.attrs.get("complete") == key
    except OSError:  # missing, truncated or no HDF5 at all
        return False


def _build(cache: Path, key: str, name: str, source: Source, img_size: int | None) -> None:
    """Reads every image once: for the digest, mean and std, and for a copy unless the source will do as it is."""
    copied = not all(_in_place(split.images, img_size) for split in source.parts.values())
    size = _size(source, img_size)
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    brightness = np.zeros((3, 256), np.int64)  # how many train pixels have which value, per channel
    bar = fetch.progress(sum(map(len, source.parts.values())), f"{name}: reading images once", unit="img")
    with fetch.replacing(cache) as part, bar, h5py.File(part, "w") as file:
        for split_name, split in source.parts.items():
            shape, start = (len(split), *size, 3), 0
            images = file.create_dataset(f"{split_name}_images", shape, np.uint8) if copied else None
            digest.update(f"{split_name} {shape}".encode())
            for batch in _batches(split.images, img_size, size):
                digest.update(batch)
                if split_name == "train":
                    brightness += [np.bincount(batch[..., c].ravel(), minlength=256) for c in range(3)]
                if copied:
                    images[start : start + len(batch)] = batch
                start += len(batch)
                bar.update(len(batch))
            _write_rest(file, digest, split_name, split, img_size)
        names = {"classes": json.dumps(source.classes), "class_ids": json.dumps(source.class_ids)}
        file.attrs.update(names, copied=copied, digest=digest.hexdigest(), statistics=_mean_std(brightness))
        file.attrs["complete"] = key  # last: without it the file is never used


def _write_rest(file: h5py.File, digest: hashlib._Hash, name: str, split: Split, img_size: int | None) -> None:
    file[f"{name}_labels"] = split.labels
    digest.update(split.labels.tobytes())
    if split.masks is not None:
        masks = np.array([fit(mask, img_size) for mask in split.masks], bool)
        file[f"{name}_masks"] = masks
        digest.update(masks.tobytes())
    if split.groups is not None:
        file.create_dataset(f"{name}_groups", data=split.groups.astype(object), dtype=h5py.string_dtype())
        digest.update("\n".join(split.groups).encode())


def _in_place(images: np.ndarray | LazyImages, img_size: int | None) -> bool:
    return isinstance(images, H5Images) and (img_size is None or images.size == (img_size, img_size))


def _size(source: Source, img_size: int | None) -> tuple[int, int]:
    """(height, width) that all images will have: `img_size`, or that of the first image."""
    if img_size:
        return img_size, img_size
    return next(split.images[0].shape[:2] for split in source.parts.values() if len(split))


def _batches(images: np.ndarray | LazyImages, img_size: int | None, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """uint8 RGB (n,H,W,3) with n up to CHUNK, resized; raises where an image is not of `size`."""
    for start in range(0, len(images), CHUNK):
        rows = range(start, min(start + CHUNK, len(images)))
        batch = images[start : rows.stop] if hasattr(images, "shape") else [images[row] for row in rows]
        if not hasattr(batch, "shape") or batch.shape[1:3] != size:
            batch = [fit(image, img_size) for image in batch]
            for row, image in zip(rows, batch, strict=True):
                if image.shape[:2] != size:
                    found, first = (f"{width} × {height} px" for height, width in (image.shape[:2], size))
                    where = images.where(row) if hasattr(images, "where") else f"image {row}"
                    raise DataError(f"{where}: {found}, expected {first} as the first image: pass img_size")
        batch = np.asarray(batch)
        yield np.ascontiguousarray(batch if batch.ndim == 4 else np.repeat(batch[..., None], 3, axis=3))


def _mean_std(brightness: np.ndarray) -> np.ndarray:
    """Means and standard deviations (2,3) on 0..1 from the histograms (3,256)."""
    pixels, value = brightness.sum(1), np.arange(256) / 255
    if not pixels.all():  # nothing to train on; a half maps 0..1 to -1..1, and nothing is learnt from test images
        return np.full((2, 3), 0.5)
    mean = brightness @ value / pixels
    return np.stack([mean, np.sqrt(np.maximum(brightness @ value**2 / pixels - mean**2, 0))])


def _open(cache: Path, name: str, read: Callable[[], Source], on_disk: bool) -> Dataset:
    with h5py.File(cache, "r") as file:
        mean, std = (tuple(float(x) for x in row) for row in file.attrs["statistics"])
        std = tuple(value or 1.0 for value in std)  # a channel that never varies becomes 0, not 0 / 0
        classes, class_ids = json.loads(file.attrs["classes"]), json.loads(file.attrs["class_ids"])
        digest, copied = file.attrs["digest"], file.attrs["copied"]
        parts = {} if copied else read().parts
        for split in SPLITS if copied else ():
            masks = file[f"{split}_masks"][()] if f"{split}_masks" in file else None
            groups = file[f"{split}_groups"].asstr()[()].astype(str) if f"{split}_groups" in file else None
            parts[split] = Split(H5Images([cache], f"{split}_images"), file[f"{split}_labels"][()], masks, groups)
    if not on_disk and sum(split.images.nbytes for split in parts.values()) < IN_RAM:
        for split in parts.values():
            split.images = np.asarray(split.images)
    return Dataset(name, **parts, classes=classes, class_ids=class_ids, mean=mean, std=std, digest=digest)
