"""Every format in its true form, every fault in one clear line, splits that share nothing, caches never half-used."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from lib import data, digits, fetch
from lib import images as image_files
from lib.data import DataError, H5Images, load

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
# sha256 of digits' val split at seed 0; pin anew when a constant of lib.digits changes
GOLDEN_VAL = "916592d17a2b1836caf99022d35bdfcafbd0826b911b7a73a0cdb5aa6afa6c6f"

rng = np.random.default_rng(0)


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


def pictures(count, height=8, width=8, channels=3):
    return rng.integers(0, 256, (count, height, width, channels)[: 4 if channels else 3], np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def tree(folder, classes=("cat", "dog"), count=5, size=8):
    for name in classes:
        for n in range(count):
            save(folder / name / f"{n}.png", pictures(1, size, size)[0])
    return folder


def h5(path, **content):
    with h5py.File(path, "w") as file:
        for key, value in content.items():
            file[key] = value
    return path


def slides(folder, labels, patches=4, size=8):
    folder.mkdir()
    for n, _ in enumerate(labels):
        h5(folder / f"s{n:02d}.h5", img=pictures(patches + n % 3, size, size))
    (folder / "labels.csv").write_text("Slide ID,Label\n" + "".join(f"s{n:02d},{c}\n" for n, c in enumerate(labels)))
    return folder, folder / "labels.csv"


def fails(tmp_path, source, *expected, **options):
    """`load` raises a DataError of one line that holds all of `expected`, and leaves nothing half-written."""
    with pytest.raises(DataError) as caught:
        load(source, root=tmp_path / "root", **options)
    for part in expected:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "root").rglob("*.h5")) and not list((tmp_path / "root").rglob(".*"))


def checked(dataset):
    """What holds for every dataset."""
    for split in (dataset.train, dataset.val, dataset.test):
        assert split.images.dtype == np.uint8 and split.images.shape[3] == 3
        assert len(split) == len(split.images) == len(split.labels) and split.labels.dtype == np.int64
        assert not len(split) or split.labels.max() < len(dataset.classes)
    assert len(dataset.mean) == len(dataset.std) == 3 and len(dataset.class_ids) == len(dataset.classes)
    assert len(dataset.digest) == 64
    return dataset


def rows_of(split):
    return [image.tobytes() for image in np.asarray(split.images)]


def test_import_is_light():
    code = "import sys, lib; before = set(sys.modules); import lib.data; print(*set(sys.modules) - before)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout.split()
    assert not {"torch", "timm", "sklearn", "pandas", "mlxtend"} & set(loaded)


# ---- digits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_root(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def test_digits_golden():
    images, labels, masks = digits.render("val")
    assert sha256(images.tobytes() + labels.tobytes() + masks.tobytes()).hexdigest() == GOLDEN_VAL


def test_digits_load(digit_root):
    dataset = checked(load("digits", root=digit_root))
    for name in data.SPLITS:
        assert len(getattr(dataset, name)) == 10 * digits.DIGITS_PER_CLASS[name] * digits.COPIES[name]
    again = load("digits", root=digit_root)
    assert again.digest == dataset.digest and rows_of(again.val) == rows_of(dataset.val)
    assert load("digits", root=digit_root, seed=1).digest != dataset.digest


def test_digits_render_is_bitwise_repeatable_and_moves_with_the_seed():
    first, again, other = (digits.render("val", seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and np.array_equal(first[1], other[1])


def test_digit_images_are_in_one_split_only():
    pixels, labels = digits._mnist()
    seen = {name: {pixels[row].tobytes() for row in rows} for name, rows in digits.split().items()}
    assert sum(map(len, seen.values())) == len(pixels) == len(set().union(*seen.values()))
    for name, rows in digits.split().items():
        assert np.array_equal(np.bincount(labels[rows]), [digits.DIGITS_PER_CLASS[name]] * 10)


def test_masks_are_the_digit_and_clutter_keeps_away(monkeypatch):
    monkeypatch.setattr(digits, "TRIES", 1)  # so that many pieces find no place
    images, labels, masks = digits.render("val")
    pixels, mnist_labels = digits._mnist()
    rows = digits.split()["val"]
    for n in range(len(images)):
        digit = pixels[rows[n % len(rows)]]
        assert labels[n] == mnist_labels[rows[n % len(rows)]]
        assert masks[n].sum() == (digit > digits.INK).sum()
        assert (images[n][masks[n]] > digits.INK).all()
        ys, xs = np.nonzero(masks[n])
        box = np.zeros_like(masks[n])
        box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
        assert not ((images[n] > digits.INK) & box & ~masks[n]).any()  # inside the box only the digit's own ink
    clutter = (images > digits.INK) & ~masks
    assert clutter.any((1, 2)).mean() > 0.9


def test_most_patches_are_background_and_position_is_informative():
    _, _, masks = digits.render("val")
    side = digits.CANVAS // 6
    patches = masks.reshape(-1, side, 6, side, 6).any((2, 4))
    assert patches.mean() < 0.3
    map_of = patches.mean(0)
    band, corners = np.fliplr(map_of).diagonal()[1:-1], (map_of[0, 0], map_of[-1, -1])
    assert band.min() > 0.1 and max(corners) < 0.02


# ---- arrays ---------------------------------------------------------------------------------------------------------


def write_idx(path, array):
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def mnist_folder(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pictures(count, 28, 28, None))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder


def test_idx(tmp_path, monkeypatch):
    folder = mnist_folder(tmp_path / "root" / "fashion-mnist")
    monkeypatch.setattr(fetch, "DEBIAN_FASHION", tmp_path / "nowhere")
    dataset = checked(load("fashion-mnist", root=tmp_path / "root"))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (30, 10, 20)  # at least one of each class
    assert dataset.classes[9] == "Ankle boot"
    assert load(mnist_folder(tmp_path / "mnist"), root=tmp_path / "root").classes[9] == "9"
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    assert dataset.test.images[..., 2].tobytes() == raw  # grey in every channel


@pytest.mark.parametrize("fault", ["truncated", "magic", "short", "long", "count", "label"])
def test_idx_faults(tmp_path, fault):
    folder = mnist_folder(tmp_path / "mnist")
    images, labels = folder / "train-images-idx3-ubyte.gz", folder / "train-labels-idx1-ubyte.gz"
    if fault == "truncated":
        images.write_bytes(images.read_bytes()[:-200])
    elif fault in ("magic", "short", "long"):
        body = gzip.decompress(images.read_bytes())
        changed = {"magic": b"\0\0\x0d\x03" + body[4:], "short": body[:-1], "long": body + b"x"}[fault]
        images.write_bytes(gzip.compress(changed))
    else:
        write_idx(labels, np.full(40 if fault == "label" else 39, 10, np.uint8))
    fails(tmp_path, folder, labels if fault in ("count", "label") else images, "expected")


def cifar_archive(path, hundred=False, damage=b""):
    def records(count):
        labels = np.arange(count, dtype=np.uint8)[:, None] % 10
        head = [labels // 5, labels] if hundred else [labels]
        return np.concatenate([*head, rng.integers(0, 256, (count, 3072), np.uint8)], axis=1).tobytes()

    names = {"train.bin": records(50), "test.bin": records(20)}
    names |= {"fine_label_names.txt": b"".join(b"fine%d\n" % n for n in range(10)), "coarse_label_names.txt": b"a\nb\n"}
    if not hundred:
        names = {f"data_batch_{n}.bin": records(10) for n in range(1, 6)} | {"test_batch.bin": records(20)}
        names |= {"batches.meta.txt": b"".join(b"class%d\n" % n for n in range(10)) + b"\n"}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in names.items():
            info = tarfile.TarInfo(f"cifar-binary/{name}")
            info.size = len(content + damage)
            tar.addfile(info, io.BytesIO(content + damage))
    return path, names


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(tmp_path, hundred, monkeypatch):
    name = "cifar100" if hundred else "cifar10"
    root = tmp_path / "root"
    root.mkdir()
    archive, files = cifar_archive(root / fetch.ARCHIVES[name].name, hundred)
    with pytest.raises(DataError, match="SHA-256"):
        load(name, root=root)  # not the published archive
    good = fetch.ARCHIVES[name]._replace(sha256=sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setitem(fetch.ARCHIVES, name, good)
    dataset = checked(load(name, root=root))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (40, 10, 20)
    assert dataset.classes[3] == ("fine3" if hundred else "class3")
    record = files["test.bin" if hundred else "test_batch.bin"][-3072:]
    assert dataset.test.images[-1].transpose(2, 0, 1).tobytes() == record and dataset.test.labels[-1] == 9
    assert not set(rows_of(dataset.train)) & set(rows_of(dataset.val))


def test_cifar_faults(tmp_path):
    archive, _ = cifar_archive(tmp_path / "cifar.tar.gz", damage=b"x")
    fails(tmp_path, archive, archive, "multiple of 3073")
    archive.write_bytes(archive.read_bytes()[:2000])
    fails(tmp_path, archive, archive, "expected a whole")
    with tarfile.open(archive, "w:gz"):
        pass
    fails(tmp_path, archive, archive, "data_batch_1.bin")


# ---- HDF5 -----------------------------------------------------------------------------------------------------------


def test_hdf5_named_splits_stay_in_place(tmp_path):
    train, test, masks = pictures(40), pictures(10), rng.random((40, 8, 8)) > 0.5
    source = h5(
        tmp_path / "a.h5",
        train_images=train,
        train_labels=np.arange(40.0) % 4,
        train_masks=masks,
        test_images=test,
        test_labels=np.arange(10) % 4,
    )
    with h5py.File(source, "a") as file:
        file.attrs["classes"] = ["a", "b", "c", "d"]
    dataset = checked(load(source, root=tmp_path / "root"))
    assert dataset.classes == ["a", "b", "c", "d"] and len(dataset.val) == 4
    assert np.array_equal(dataset.test.images, test)
    row = {image.tobytes(): n for n, image in enumerate(train)}
    for split in (dataset.train, dataset.val):
        rows = [row.pop(image) for image in rows_of(split)]
        assert np.array_equal(split.masks, masks[rows]) and np.array_equal(split.labels, np.array(rows) % 4)
    assert not row  # every image in exactly one of the two
    cache = next((tmp_path / "root").rglob("*.h5"))
    with h5py.File(cache) as file:
        assert not any(key.endswith("images") for key in file)  # no second copy of the pixels


def test_hdf5_resized_with_masks(tmp_path):
    masks = np.zeros((30, 8, 12), bool)
    masks[:, :, 2:6] = True  # the left half of the centre crop
    source = h5(tmp_path / "a.h5", images=pictures(30, 8, 12), labels=np.arange(30) % 3, masks=masks)
    dataset = checked(load(source, root=tmp_path / "root", img_size=4))
    assert dataset.train.images.shape[1:] == (4, 4, 3)
    assert dataset.train.masks.dtype == bool and (dataset.train.masks == [True, True, False, False]).all()


def test_one_unnamed_split_is_divided_alike_every_time(tmp_path):
    source = h5(tmp_path / "a.h5", images=pictures(100, channels=None), labels=np.arange(100) % 4)
    first, again = (checked(load(source, root=tmp_path / f"root{n}", seed=n)) for n in (0, 1))
    assert (len(first.train), len(first.val), len(first.test)) == (72, 8, 20)
    assert first.digest == again.digest  # the run's seed does not move images between splits
    assert len(set(rows_of(first.train) + rows_of(first.val) + rows_of(first.test))) == 100
    assert np.array_equal(np.bincount(first.test.labels), [5, 5, 5, 5])


def test_too_few_images_per_class_to_split_are_all_test(tmp_path):
    jpegs = []
    for pixels in pictures(5):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        jpegs.append(np.frombuffer(buffer.getvalue(), np.uint8))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("jpeg", (5,), h5py.vlen_dtype(np.uint8))[:] = np.array(jpegs + [None], object)[:5]
        file["labels"], file.attrs["class_names"] = [0, 0, 0, 3, 3], list("wxyz")
    with pytest.warns(UserWarning, match="2 images of class 'z', too few"):
        dataset = checked(load(tmp_path / "a.h5", root=tmp_path / "root"))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (0, 0, 5)
    assert dataset.mean == dataset.std == (0.5, 0.5, 0.5)
    assert dataset.test.images[2].tobytes() == np.asarray(Image.open(io.BytesIO(jpegs[2].tobytes()))).tobytes()


BAD_HDF5 = {
    "no keys": ({"foo": [1]}, "keys ['foo']"),
    "no labels": ({"images": pictures(9)}, "expected 'labels'"),
    "channels first": ({"images": pictures(9).transpose(0, 3, 1, 2), "labels": np.arange(9) % 3}, "(9, 3, 8, 8) uint8"),
    "float": ({"images": pictures(9) / 255, "labels": np.arange(9) % 3}, "float64"),
    "flat": ({"images": pictures(9).reshape(9, -1), "labels": np.arange(9) % 3}, "(9, 192) uint8"),
    "count": ({"images": pictures(9), "labels": np.arange(8) % 3}, "expected (9,)"),
    "two-dimensional labels": ({"images": pictures(9), "labels": np.eye(9)}, "(9, 9)"),
    "NaN": ({"images": pictures(9), "labels": np.array([np.nan, *range(8)])}, "NaN"),
    "infinite": ({"images": pictures(9), "labels": np.array([np.inf, *range(8)])}, "infinite"),
    "half": ({"images": pictures(9), "labels": np.arange(9) / 2}, "0.5"),
    "negative": ({"images": pictures(9), "labels": np.arange(9) - 1}, "labels -1 to 7"),
    "text labels": ({"images": pictures(9), "labels": [b"a"] * 9}, "expected (9,) whole numbers"),
    "masks": ({"images": pictures(9), "labels": np.arange(9) % 3, "masks": np.ones((9, 4, 4))}, "'masks' is (9, 4, 4)"),
    "jpeg": ({"jpeg": pictures(9), "labels": np.arange(9) % 3}, "variable-length uint8"),
    "none": ({"images": pictures(0), "labels": np.arange(0)}, "no images"),
}


BAD_NAMES = {
    "one text": ({"classes": '["cat", "dog", "emu"]'}, "one text"),
    "too few ids": ({"classes": ["cat", "dog", "emu"], "wnids": ["n1", "n2"]}, "2 wnids, expected one for each of 3"),
    "one id": ({"classes": ["cat", "dog", "emu"], "wnids": "n1"}, "one text"),
}


@pytest.mark.parametrize("fault", BAD_NAMES)
def test_hdf5_class_names_are_a_list_as_long_as_the_ids(tmp_path, fault):
    names, expected = BAD_NAMES[fault]
    source = h5(tmp_path / "bad.h5", images=pictures(9), labels=np.arange(9) % 3)
    with h5py.File(source, "a") as file:
        file.attrs.update(names)
    fails(tmp_path, source, "bad.h5", expected, "expected")


def test_hdf5_classes_of_one_name_are_told_apart_and_empty_splits_are_none(tmp_path):
    """ImageNet has two cranes; exports may write splits that they do not fill."""
    source = h5(tmp_path / "a.h5", train_images=pictures(30), train_labels=np.arange(30) % 3,
                test_images=pictures(0), test_labels=np.arange(0))  # fmt: skip
    with h5py.File(source, "a") as file:
        file.attrs["classes"] = ["crane", "emu", "crane"]
    dataset = checked(load(source, root=tmp_path / "root"))
    assert dataset.classes == ["crane", "emu", "crane"] and dataset.class_ids == ["0 crane", "1 emu", "2 crane"]
    assert len(dataset.test) == 6 and len(dataset.train) + len(dataset.val) == 24


@pytest.mark.parametrize("fault", BAD_HDF5)
def test_hdf5_faults(tmp_path, fault):
    content, expected = BAD_HDF5[fault]
    fails(tmp_path, h5(tmp_path / "bad.h5", **content), "bad.h5", expected, "expected")


def test_hdf5_labels_beyond_the_classes_and_truncation(tmp_path):
    source = h5(tmp_path / "bad.h5", images=pictures(9), labels=np.arange(9))
    with h5py.File(source, "a") as file:
        file.attrs["classes"] = ["a", "b"]
    fails(tmp_path, source, source, "labels 0 to 8, expected 0 to 1")
    source.write_bytes(source.read_bytes()[:-500])
    fails(tmp_path, source, source, "truncated", "expected a whole file")
    source.write_bytes(b"not HDF5")
    fails(tmp_path, source, source, "expected a whole file")


def many_slides(tmp_path):
    arrays = [pictures(n, 6, 6) for n in (3, 50, 1, 20)]
    paths = [h5(tmp_path / f"{n}.h5", img=array) for n, array in enumerate(arrays)]
    return H5Images(paths, "img"), np.concatenate(arrays)


def test_lazy_images_index_like_numpy(tmp_path):
    lazy, dense = many_slides(tmp_path)
    assert lazy.shape == dense.shape and lazy.dtype == dense.dtype and len(lazy) == 74
    shuffled = rng.permutation(74)
    for index in (
        0,
        -1,
        np.int64(53),
        slice(2, 60, 7),
        slice(5, 5),
        [70, 3, 3, 0],
        shuffled,
        shuffled % 5,
        [],
        dense[:, 0, 0, 0] > 99,
    ):
        index = np.array(index, int) if isinstance(index, list) else index
        assert np.array_equal(lazy[index], dense[index])
    assert np.array_equal(lazy.view(shuffled)[10:20], dense[shuffled][10:20])
    assert np.array_equal(np.asarray(lazy), dense)
    with pytest.raises(IndexError):
        lazy[74]


def total(lazy):
    return int(lazy[:].sum(dtype=np.int64))


def test_lazy_images_pickle_and_open_in_every_process(tmp_path):
    lazy, dense = many_slides(tmp_path)
    assert total(lazy) == dense.sum(dtype=np.int64)  # files are open now
    assert total(pickle.loads(pickle.dumps(lazy))) == dense.sum(dtype=np.int64)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(total, [lazy.view(np.arange(9)), lazy]) == [dense[:9].sum(), dense.sum()]


def test_more_slides_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "OPEN_FILES", 2)
    lazy, dense = many_slides(tmp_path)
    assert np.array_equal(lazy[::-1], dense[::-1]) and len(lazy._open) <= 2


def test_lazy_images_say_which_file_broke(tmp_path):
    lazy, _ = many_slides(tmp_path)
    (tmp_path / "1.h5").write_bytes(b"gone")
    with pytest.raises(DataError, match="1.h5"):
        lazy[:]


# ---- slides ---------------------------------------------------------------------------------------------------------


def test_slides_are_never_torn_apart(tmp_path):
    folder, csv = slides(tmp_path / "slides", ["tumour"] * 14 + ["normal"] * 7)
    dataset = checked(load(folder, root=tmp_path / "root", labels_csv=csv))
    assert dataset.classes == ["normal", "tumour"]
    groups = [set(split.groups) for split in (dataset.train, dataset.val, dataset.test)]
    assert len(groups[0] | groups[1] | groups[2]) == sum(map(len, groups)) == 21
    for split, found in zip((dataset.train, dataset.val, dataset.test), groups, strict=True):
        assert {int(slide[1:]) < 14 for slide in found} == {True, False}  # stratified: both classes everywhere
        assert isinstance(split.images, H5Images)  # the pixels stay where they are
        for row in range(0, len(split), 5):
            assert split.labels[row] == int(int(split.groups[row][1:]) < 14)
            with h5py.File(folder / f"{split.groups[row]}.h5") as file:
                assert (file["img"][()] == split.images[row]).all((1, 2, 3)).any()


def test_slides_resized_are_cached_with_their_ids(tmp_path):
    folder, csv = slides(tmp_path / "slides", [0, 1, 0, 1, 0, 1, 0, 1])
    whole, small = (load(folder, root=tmp_path / "root", labels_csv=csv, img_size=size) for size in (None, 4))
    assert small.train.images.shape[1:] == (4, 4, 3) and np.array_equal(small.train.groups, whole.train.groups)
    assert np.array_equal(load(folder, root=tmp_path / "root", labels_csv=csv, img_size=4).val.groups, whole.val.groups)


def test_undersampling_is_seeded_and_leaves_val_and_test(tmp_path):
    folder, csv = slides(tmp_path / "slides", [0] * 12 + [1] * 4)
    whole, *drawn = (
        load(folder, root=tmp_path / "root", labels_csv=csv, undersample=u, seed=s)
        for u, s in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    counts = np.bincount(whole.train.labels)
    assert counts[0] > counts[1] and all(np.array_equal(np.bincount(d.train.labels), [counts[1]] * 2) for d in drawn)
    assert drawn[0].digest == drawn[1].digest != drawn[2].digest != whole.digest
    assert rows_of(drawn[0].train) == rows_of(drawn[1].train) != rows_of(drawn[2].train)
    assert rows_of(drawn[0].test) == rows_of(whole.test) and set(rows_of(drawn[0].train)) <= set(rows_of(whole.train))


CSV_FAULTS = {
    "unknown id": ("id,label\n" + "".join(f"s{n:02d},{n % 2}\n" for n in range(8)), "1 rows without a slide (s07)"),
    "missing slide": ("id,label\ns00,1\ns01,0\n", "5 slides without a row (s02, s03, s04)"),
    "twice": ("id,label\ns00,1\ns00,1\n", "id 's00' more than once"),
    "no label": ("id,label\ns00,\n", "no label for 's00'"),
    "columns": ("a,b\n1,2\n", "columns ['a', 'b']"),
    "empty": ("", "unreadable"),
    "rare class": ("file,class\n" + "".join(f"s{n:02d}.h5,{int(n > 4)}\n" for n in range(7)), "2 slides of class '1'"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_slide_label_faults(tmp_path, fault):
    folder, csv = slides(tmp_path / "slides", [0, 1, 0, 1, 0, 1, 0])
    content, expected = CSV_FAULTS[fault]
    csv.write_text(content)
    fails(tmp_path, folder, expected, "expected", labels_csv=csv)


def test_slide_faults(tmp_path):
    folder, csv = slides(tmp_path / "slides", [0, 1, 0, 1, 0, 1])
    fails(tmp_path, folder, "expected labels_csv")
    fails(tmp_path, folder, "none.csv", "No such file", labels_csv=tmp_path / "none.csv")
    fails(tmp_path, tree(tmp_path / "tree"), "labels_csv", "no folder of *.h5 slides", labels_csv=csv)
    h5(folder / "s03.h5", img=pictures(2, 9, 9))
    fails(tmp_path, folder, "s03.h5", "(9, 9)", "(8, 8)", labels_csv=csv)
    h5(folder / "s03.h5", image=pictures(2))
    fails(tmp_path, folder, "s03.h5", "expected 'img'", labels_csv=csv)
    h5(folder / "s03.h5", img=pictures(0))
    fails(tmp_path, folder, "s03.h5", "no images", labels_csv=csv)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_folders_with_and_without_named_splits(tmp_path):
    flat = checked(load(tree(tmp_path / "flat", count=10), root=tmp_path / "root"))
    assert (len(flat.train), len(flat.val), len(flat.test)) == (14, 2, 4) and flat.classes == ["cat", "dog"]
    assert np.allclose(flat.mean, flat.train.images.mean((0, 1, 2)) / 255)
    assert np.allclose(flat.std, flat.train.images.std((0, 1, 2)) / 255)
    for name, count in (("train", 10), ("valid", 3), ("test", 4)):
        tree(tmp_path / "named" / name, count=count)
    named = checked(load(tmp_path / "named", root=tmp_path / "root"))
    assert (len(named.train), len(named.val), len(named.test)) == (20, 6, 8)
    nothing_chosen_on_test = tree(tmp_path / "two" / "train", count=10).parent
    tree(nothing_chosen_on_test / "val", count=3)
    two = checked(load(nothing_chosen_on_test, root=tmp_path / "root", val_share=0.2))
    assert (len(two.train), len(two.val), len(two.test)) == (16, 4, 6)  # a labelled val without a test is the test
    assert np.array_equal(two.test.images[0], np.asarray(Image.open(nothing_chosen_on_test / "val" / "cat" / "0.png")))


def test_imagenette_folders_have_names_in_words(tmp_path):
    folder = tree(tmp_path / "imagenette" / "train", ("n01440764", "n03000684"), count=4).parent
    tree(folder / "val", ("n01440764", "n03000684"), count=2)
    dataset = checked(load("imagenette", root=tmp_path))
    assert dataset.classes == ["tench", "chain saw"] and dataset.class_ids == ["n01440764", "n03000684"]


def tiny(folder):
    ids = ["n02", "n01", "n03"]
    for wnid in ids:
        for n in range(4):
            save(folder / "train" / wnid / "images" / f"{wnid}_{n}.JPEG", pictures(1)[0])
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t1\t1\n")
    lines = []
    for n in range(6):
        save(folder / "val" / "images" / f"val_{n}.JPEG", pictures(1)[0])
        lines.append(f"val_{n}.JPEG\t{ids[n % 3]}\t0\t0\t1\t1\n")
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    (folder / "words.txt").write_text("n01\ttench, Tinca tinca\nn02\tcrane\nn03\tpot\nn04\tunused\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def test_tiny_imagenet(tmp_path):
    dataset = checked(load("tiny-imagenet", root=tiny(tmp_path / "tiny-imagenet-200").parent))
    assert dataset.classes == ["tench", "crane", "pot"] and dataset.class_ids == ["n01", "n02", "n03"]
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (9, 3, 6)
    assert dataset.test.labels.tolist() == [1, 0, 2, 1, 0, 2]


def test_tiny_imagenet_faults(tmp_path):
    folder = tiny(tmp_path / "tiny")
    annotations = folder / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_9.JPEG\tn01\t0\t0\t1\t1\n")
    fails(tmp_path, folder, "val_9.JPEG", "missing")
    annotations.write_text(good.replace("n03", "n77"))
    fails(tmp_path, folder, annotations, "'n77'")
    annotations.write_text(good)
    (folder / "wnids.txt").write_text("n01\nn02\nn03\nn04\n")
    fails(tmp_path, folder, folder / "train" / "n04", "missing")


def test_folder_faults(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path, tmp_path / "empty", tmp_path / "empty", "empty folder")
    fails(tmp_path, tmp_path / "none", "none", "no such file or folder")
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path, tmp_path / "notes.txt", "a .txt file, expected")
    folder = tree(tmp_path / "a")
    (folder / "bird").mkdir()
    fails(tmp_path, folder, folder / "bird", "without images")
    named = tree(tmp_path / "b" / "train").parent
    tree(named / "val", ("cat", "cow"))
    fails(tmp_path, named, named / "val" / "cow", "expected cat, dog")
    unlabelled = tree(tmp_path / "d" / "train").parent
    (unlabelled / "test").mkdir()
    save(unlabelled / "test" / "1.png", pictures(1)[0])
    fails(tmp_path, unlabelled, unlabelled / "test", "no folders of classes, expected")
    mixed = tree(tmp_path / "c")
    save(mixed / "dog" / "3.png", pictures(1, 9, 7)[0])
    fails(tmp_path, mixed, "3.png", "7 × 9", "8 × 8", "pass img_size")
    assert load(mixed, root=tmp_path / "root", img_size=6).test.images.shape[1:] == (6, 6, 3)


def test_splits_without_train_are_no_classes(tmp_path):
    for names in (("val",), ("val", "test")):
        lone = tmp_path / "-".join(names)
        for name in names:
            tree(lone / name)
        fails(tmp_path, lone, lone, *(f"{name}/" for name in names), "without train/")
    classes = tree(tmp_path / "d", ("cat", "test"))  # a class may have such a name
    assert load(classes, root=tmp_path).classes == ["cat", "test"]


def test_images_of_other_sizes_in_an_hdf5_file_are_named(tmp_path):
    path = tmp_path / "sizes.h5"
    labels = np.arange(4) % 2
    h5(path, train_images=pictures(4, 8, 8), train_labels=labels, test_images=pictures(4, 9, 7), test_labels=labels)
    fails(tmp_path, path, f"{path}['test_images'][0]", "7 × 9", "8 × 8", "pass img_size")


def test_a_channel_that_never_varies_stays_finite(tmp_path):
    images = pictures(8, 8, 8)
    images[..., 2] = 7
    h5(tmp_path / "two.h5", train_images=images, train_labels=np.arange(8) % 2)
    dataset = load(tmp_path / "two.h5", root=tmp_path)
    assert dataset.std[2] == 1 and dataset.mean[2] == pytest.approx(7 / 255) and all(value > 0 for value in dataset.std)


def test_labels_for_what_brings_its_own_are_refused(tmp_path):
    fails(tmp_path, "digits", "labels_csv is", "digits", "leave it out", labels_csv=tmp_path / "labels.csv")


@pytest.mark.parametrize("dataset, near", [("cifar-10", "cifar10"), ("Digit", "digits"), ("imagenete", "imagenette")])
def test_a_typo_gets_a_suggestion(tmp_path, dataset, near):
    fails(tmp_path, dataset, repr(dataset), f"did you mean {near!r}?")


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": 0},
        {"img_size": 2.5},
        {"val_share": 1},
        {"val_share": float("nan")},
        {"seed": -1},
        {"seed": "a"},
    ],
)
def test_parameters_are_checked(tmp_path, options):
    fails(tmp_path, "digits", next(iter(options)), "expected", **options)


# ---- image files ----------------------------------------------------------------------------------------------------


def decoded(path):
    return image_files.decode(str(path), str(path))


def test_every_pillow_mode_becomes_rgb(tmp_path):
    rgb = pictures(1, 6, 10)[0]
    grey = rgb[..., 0]
    cases = {"L": grey, "1": grey > 99, "RGB": rgb, "I;16": grey.astype(np.uint16) * 257}
    for mode, pixels in cases.items():
        save(tmp_path / f"{mode[0]}.png", pixels)
    assert np.array_equal(decoded(tmp_path / "L.png"), np.stack([grey] * 3, -1))
    assert np.array_equal(decoded(tmp_path / "1.png"), np.stack([(grey > 99) * np.uint8(255)] * 3, -1))
    assert np.array_equal(decoded(tmp_path / "I.png"), np.stack([grey] * 3, -1))  # scaled, not clipped
    save(tmp_path / "big.tif", grey.astype(">u2") * 257)
    assert np.array_equal(decoded(tmp_path / "big.tif"), np.stack([grey] * 3, -1))

    palette = Image.fromarray(rgb).quantize(8)
    palette.save(tmp_path / "P.png")
    assert np.array_equal(decoded(tmp_path / "P.png"), np.asarray(palette.convert("RGB")))
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "C.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "C.jpg").astype(int).mean() - rgb.mean()) < 3
    alpha = np.dstack([rgb, np.full((6, 10), 255, np.uint8)])
    alpha[:3, :, 3] = 0
    save(tmp_path / "A.png", alpha)
    assert (decoded(tmp_path / "A.png")[:3] == 255).all()  # transparent is white
    assert np.array_equal(decoded(tmp_path / "A.png")[3:], rgb[3:])


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90°
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(decoded(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_fit_is_short_side_then_centre_crop():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert image_files.fit(image, 10).tolist() == image[:, 10:20].tolist()  # nothing to resize: an exact crop
    square = pictures(1)[0]
    assert image_files.fit(square, 8) is square and image_files.fit(image, None) is image
    assert image_files.fit(image, 5).shape == (5, 5, 3)


IMAGE_FAULTS = {
    "zero bytes": "0 bytes that do not decode",
    "truncated": "100 bytes that do not decode",
    "not an image": "cannot identify",
    "bomb": "decompression bomb",
    "float": "floating-point",
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_image_faults(tmp_path, fault):
    bad = tmp_path / "tree" / "dog" / ("2.tif" if fault == "float" else "2.png")
    tree(tmp_path / "tree")
    content = {
        "zero bytes": b"",
        "truncated": (tmp_path / "tree" / "dog" / "1.png").read_bytes()[:100],
        "not an image": b"<html>",
    }
    if fault == "bomb":
        Image.new("1", (10000, 9500)).save(bad)  # 95 million pixels in 12 kB, beyond Pillow's warning
    elif fault == "float":
        Image.fromarray(np.ones((8, 8), np.float32)).save(bad)
    else:
        bad.write_bytes(content[fault])
    fails(tmp_path, tmp_path / "tree", bad, IMAGE_FAULTS[fault], "expected")


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path):
    folder = tree(tmp_path / "tree")
    dataset = load(folder, root=tmp_path / "root")
    return folder, tmp_path / "root", dataset, next((tmp_path / "root").rglob("*.h5"))


def test_a_cache_is_used_until_the_source_changes(cached, monkeypatch):
    folder, root, dataset, cache = cached
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", lambda *_: pytest.fail("decoded again"))
        assert load(folder, root=root).digest == dataset.digest
    save(folder / "cat" / "0.png", pictures(1)[0])
    os.utime(folder / "cat" / "0.png", (time.time() + 9, time.time() + 9))
    assert load(folder, root=root).digest != dataset.digest
    assert len(list(cache.parent.iterdir())) == 2


def test_a_cache_knows_what_lies_behind_links(tmp_path):
    folder, links = tree(tmp_path / "tree", count=4), tmp_path / "links"
    links.mkdir()
    for name in ("cat", "dog"):
        (links / name).symlink_to(folder / name)
    (links / "dog" / "again").symlink_to(folder)  # round and round
    before = load(links, root=tmp_path / "root")
    assert before.digest == load(links, root=tmp_path / "root").digest
    save(folder / "cat" / "0.png", pictures(1)[0])
    os.utime(folder / "cat" / "0.png", (time.time() + 9, time.time() + 9))
    assert load(links, root=tmp_path / "root").digest != before.digest


@pytest.mark.parametrize("damage", ["truncated", "half-written", "foreign", "no HDF5"])
def test_a_broken_cache_is_rebuilt(cached, damage):
    folder, root, dataset, cache = cached
    if damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:-100])
    elif damage == "no HDF5":
        cache.write_bytes(b"x")
    else:
        with h5py.File(cache, "a") as file:
            file["train_images"][...] = 0
            if damage == "half-written":
                del file.attrs["complete"]
            else:
                file.attrs["complete"] = "another recipe"
    again = load(folder, root=root)
    assert again.digest == dataset.digest and rows_of(again.train) == rows_of(dataset.train)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    folder, calls = tree(tmp_path / "tree"), []

    def interrupted(path, where, decode=image_files.decode):
        calls.append(where)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return decode(path, where)

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folder, root=tmp_path / "root")
    assert not list((tmp_path / "root" / "cache").iterdir())
    checked(load(folder, root=tmp_path / "root"))


def test_large_datasets_stay_on_disk(cached, monkeypatch):
    folder, root, dataset, _ = cached
    monkeypatch.setattr(data, "IN_RAM", 0)
    lazy = checked(load(folder, root=root))
    assert isinstance(lazy.train.images, H5Images) and rows_of(lazy.train) == rows_of(dataset.train)


def test_an_unwritable_root_is_one_line(tmp_path):
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        load(tree(tmp_path / "tree"), root=tmp_path / "root")


# ---- real files -----------------------------------------------------------------------------------------------------


def test_real_cifar(tmp_path):
    dataset = checked(load(shared("cifar10_20k.h5"), root=tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (18000, 2000, 5000)
    assert dataset.classes[0] == "airplane" and np.allclose(dataset.mean, [0.4914, 0.4819, 0.4467], atol=5e-4)


def test_real_imagenet_is_all_test(tmp_path):
    with pytest.warns(UserWarning, match="all 650 images are test"):
        dataset = checked(load(shared("imagenet_val_650.h5"), root=tmp_path, img_size=64))
    assert len(dataset.test) == 650 and len(dataset.train) == len(dataset.val) == 0
    assert len(dataset.classes) == 1000 and dataset.class_ids[0] == "n01440764"


def test_real_tiny_imagenet(tmp_path):
    dataset = checked(load(shared("tiny-imagenet-200"), root=tmp_path))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (900, 100, 500)
    assert dataset.classes[0] == "bathtub" and dataset.test.images.shape[1:] == (64, 64, 3)


def test_real_imagenette(tmp_path):
    dataset = checked(load(shared("imagenette"), root=tmp_path, img_size=32))
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (1350, 150, 500)
    assert dataset.classes[1] == "English springer"
