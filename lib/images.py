"""Images on their way in: decoded to RGB, fitted to a size, or left on disk and read when indexed."""

from __future__ import annotations

import copy
import io
import os
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageOps

# Raster formats only: none that starts a program, as EPS does.
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
OPEN_FILES = 32  # HDF5 files that one H5Images keeps open


class DataError(ValueError):
    """One line: the file or parameter, what was found, what was expected."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # libraries quoted in it may use several


@dataclass(repr=False, eq=False)
class Split:
    """Images uint8 (N,H,W,3), labels int64 (N,), optional foreground masks bool (N,H,W), slide ids str (N,)."""

    images: np.ndarray | LazyImages
    labels: np.ndarray
    masks: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"Split of {len(self):,} images"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """The split of these rows only; lazy images stay lazy."""
        images = self.images.view(rows) if isinstance(self.images, LazyImages) else self.images[rows]
        chosen = [None if values is None else values[rows] for values in (self.masks, self.groups)]
        return Split(images, self.labels[rows], *chosen)


class LazyImages:
    """Rows of images that are read when indexed by one number; `view` selects rows without reading."""

    def __init__(self, count: int) -> None:
        self.rows = np.arange(count)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, rows: np.ndarray) -> LazyImages:
        other = copy.copy(self)
        other.rows = self.rows[rows]
        return other


class ImageFiles(LazyImages):
    """Image files; each index gives uint8 (H,W,3), of that file's own size."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(len(paths))
        self.paths = paths

    def where(self, index: int) -> str:
        return self.paths[self.rows[index]]

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self.where(index), self.where(index))


class H5Encoded(LazyImages):
    """Encoded images (JPEG bytes and the like) in a variable-length uint8 dataset; each index gives (H,W,3)."""

    def __init__(self, path: Path, key: str) -> None:
        with open_h5(path) as file:
            if h5py.check_vlen_dtype(file[key].dtype) != np.uint8 or file[key].ndim != 1:
                raise DataError(f"{path}: {key!r} is {describe(file[key])}, expected (n,) of variable-length uint8")
            super().__init__(len(file[key]))
        self.path, self.key = path, key

    def where(self, index: int) -> str:
        return f"{self.path}[{self.key!r}][{self.rows[index]}]"

    def __getitem__(self, index: int) -> np.ndarray:
        with open_h5(self.path) as file:
            data = file[self.key][self.rows[index]].tobytes()
        return decode(io.BytesIO(data), self.where(index))


class H5Images(LazyImages):
    """uint8 RGB images (N,H,W,3) on disk: dataset `key` of one or more HDF5 files, end to end.

    Index it with an int, a slice, or an integer or bool array in any order, with repetitions. It pickles, and opens
    its files anew in every process (HDF5 handles do not survive a fork), so DataLoader workers may share it.
    """

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        lengths, shapes = [], {}
        for path in paths:
            with open_h5(path) as file:
                found = need(file, key, path)
                size = found.shape[1:3]
                if found.dtype != np.uint8 or not (found.ndim == 3 or found.ndim == 4 and found.shape[3] in (1, 3)):
                    raise DataError(f"{path}: {key!r} is {describe(found)}, expected (n, height, width, 3) uint8")
                if shapes and size not in shapes:
                    raise DataError(f"{path}: images of {size}, expected {next(iter(shapes))} as in {paths[0]}")
                shapes[size] = True
                lengths.append(len(found))
        super().__init__(sum(lengths))
        self.paths, self.key = list(paths), key
        self.ends, self.size = np.cumsum(lengths), size
        self._open, self._pid = {}, os.getpid()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), *self.size, 3

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def where(self, index: int) -> str:
        file = int(np.searchsorted(self.ends, self.rows[index], side="right"))
        return f"{self.paths[file]}[{self.key!r}][{self.rows[index] - (self.ends[file - 1] if file else 0)}]"

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: int | slice | np.ndarray) -> np.ndarray:
        rows = np.atleast_1d(self.rows[index])
        wanted, back = np.unique(rows, return_inverse=True)  # h5py wants rising, unique rows
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        owner = np.searchsorted(self.ends, wanted, side="right")
        for file in np.unique(owner):
            mine = owner == file
            out[mine] = self._read(file, wanted[mine] - (self.ends[file - 1] if file else 0))
        if not np.array_equal(wanted, rows):
            out = out[back]
        return out[0] if np.ndim(self.rows[index]) == 0 else out

    def _read(self, number: int, rows: np.ndarray) -> np.ndarray:
        first, last = rows[0], rows[-1] + 1
        try:
            stored = self._file(number)[self.key]
            if last - first == len(rows):
                block = stored[first:last]
            elif last - first <= 4 * len(rows):  # one long read is faster than many short ones
                block = stored[first:last][rows - first]
            else:
                block = stored[rows]
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.paths[number]}: {self.key!r} cannot be read ({error}), expected a whole file"
            ) from None
        return block if block.ndim == 4 else block[..., None]  # assignment repeats a grey channel

    def _file(self, number: int) -> h5py.File:
        if self._pid != os.getpid():
            self._open, self._pid = {}, os.getpid()
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = open_h5(self.paths[number])
        return self._open[number]


def decode(data: str | io.BytesIO, where: str) -> np.ndarray:
    """An image file as uint8 RGB (H,W,3): upright by its EXIF tag, 16 bits scaled to 8, transparency laid on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(data, formats=PILLOW_FORMATS) as image:
                return _rgb(ImageOps.exif_transpose(image), where)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{where}: a decompression bomb, expected at most {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error) as error:  # what Pillow's decoders raise
        size = data.getbuffer().nbytes if isinstance(data, io.BytesIO) else os.path.getsize(data)
        raise DataError(f"{where}: {size:,} bytes that do not decode ({error}), expected a whole image") from None


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{where}: grey values {values.min()} to {values.max()}, expected 16 bits at most")
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{where}: floating-point pixels, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def fit(image: np.ndarray, size: int | None) -> np.ndarray:
    """Resized so that the short side is `size`, then centre-cropped to a square; as it is when it has that size.

    Bicubic; bool masks take the nearest pixel, which is all that Pillow does with them.
    """
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.asarray(ImageOps.fit(Image.fromarray(image), (size, size), method=Image.Resampling.BICUBIC))


def open_h5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not readable as HDF5 ({error}), expected a whole file") from None


def need(file: h5py.File, key: str, path: Path) -> h5py.Dataset:
    if not isinstance(file.get(key), h5py.Dataset):
        raise DataError(f"{path}: keys {sorted(file)}, expected {key!r}")
    return file[key]


def describe(dataset: h5py.Dataset) -> str:
    return f"{dataset.shape} {dataset.dtype}"
