"""Known datasets: where they lie, and how they are downloaded, checked and unpacked.

Checksums and sizes as published: CIFAR, Fashion-MNIST and Imagenette in tensorflow/datasets (`url_checksums/` and
`datasets/imagenette/checksums.tsv`); Tiny ImageNet's is reported alike by several independent projects, for the
248,100,043 bytes whose widely published MD5 is 90528d7ca1a48142e341f4ef8d21d0de.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import shutil
import socket
import stat
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from lib.images import DataError

BLOCK = 1 << 20
EXPANSION = 100  # an honest image archive unpacks to far less than this many times its size …
EXPANSION_FLOOR = 64 << 20  # … except that tiny archives may reach this many bytes

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


class Remote(NamedTuple):
    """A file to download: `size` in bytes and `sha256` in hex are those of the file at `url`."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_FASHION = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas/"

FASHION_MNIST = (
    Remote(
        _FASHION + "train-images-idx3-ubyte.gz",
        26421880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    Remote(
        _FASHION + "train-labels-idx1-ubyte.gz",
        29515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    Remote(
        _FASHION + "t10k-images-idx3-ubyte.gz",
        4422102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    Remote(
        _FASHION + "t10k-labels-idx1-ubyte.gz",
        5148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)
ARCHIVES = {
    "cifar10": Remote(
        _TORONTO + "cifar-10-binary.tar.gz",
        170052171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "cifar100": Remote(
        _TORONTO + "cifar-100-binary.tar.gz",
        168513733,
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    "tiny-imagenet-200": Remote(
        "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
        248100043,
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    ),
    "imagenette2-160": Remote(
        _FASTAI + "imagenette2-160.tgz",
        99003388,
        "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
    ),
    "imagenette2-320": Remote(
        _FASTAI + "imagenette2-320.tgz",
        341663724,
        "569b4497c98db6dd29f335d1f109cf315fe127053cedf69010d047f0188e158c",
    ),
}
NAMES = ("fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenette")


def known(name: str, root: Path, img_size: int | None = None) -> Path:
    """File or folder of the known dataset `name` (one of NAMES), downloaded into `root` if it is not there.

    Imagenette comes with short sides of 160 or 320 px: the smaller one where `img_size` needs no more.
    Raises DataError offline (with the URL to fetch by hand) and on a wrong checksum.
    """
    if name == "fashion-mnist":
        for folder in (DEBIAN_FASHION, root / name):
            if all((folder / file.name).exists() for file in FASHION_MNIST):
                return folder
        return [download(file, root / name / file.name) for file in FASHION_MNIST][0].parent
    if name in ("cifar10", "cifar100"):
        return download(ARCHIVES[name], root / ARCHIVES[name].name)
    if name == "tiny-imagenet":
        return _unpacked("tiny-imagenet-200", root)
    best = "imagenette2-320" if (img_size or 0) > 160 else "imagenette2-160"
    here = [folder for folder in sorted(root.glob("imagenette*")) if (folder / "train").is_dir()]
    if best != "imagenette2-160":  # its images would be enlarged
        here = [folder for folder in here if folder.name != "imagenette2-160"]
    return next((folder for folder in here if folder.name == best), here[0] if here else _unpacked(best, root))


def _unpacked(archive: str, root: Path) -> Path:
    folder = root / archive
    if not folder.is_dir():
        file = download(ARCHIVES[archive], root / ARCHIVES[archive].name)
        try:
            extract(file, folder)
        except DataError:
            if not folder.is_dir():  # else another process has unpacked it meanwhile
                raise
    return folder


def download(file: Remote, target: Path) -> Path:
    """Downloads `file` to `target` unless it is there. Either way its SHA-256 is checked; returns `target`."""
    if target.exists():
        _verify(target, file, f"{target}: delete it to download it again")
        return target
    with replacing(target) as part:
        try:
            with urllib.request.urlopen(file.url, timeout=60) as response, open(part, "wb") as out:
                _copy(response, out, file)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise DataError(
                f"{file.url}: download failed ({reason}); fetch it by hand and put it at {target}"
            ) from None
        _verify(part, file, file.url)
    return target


def _copy(source: IO[bytes], out: IO[bytes], file: Remote) -> None:
    done = 0
    with progress(file.size, file.name, unit="B", unit_scale=True) as bar:
        while block := source.read(BLOCK):
            done += len(block)
            if done > file.size:
                raise DataError(f"{file.url}: more than {file.size:,} bytes, expected exactly that many")
            out.write(block)
            bar.update(len(block))


def _verify(path: Path, file: Remote, what: str) -> None:
    with open(path, "rb") as content:
        found = hashlib.sha256()
        while block := content.read(BLOCK):
            found.update(block)
    if found.hexdigest() != file.sha256:
        raise DataError(
            f"{what}: found SHA-256 {found.hexdigest()} ({path.stat().st_size:,} bytes), "
            f"expected {file.sha256} ({file.size:,} bytes)"
        )


def extract(archive: Path, folder: Path) -> None:
    """Unpacks a .zip or tar archive as `folder`; a single top folder in the archive becomes `folder` itself.

    Everything is unpacked beside `folder` and then renamed. Raises DataError, leaving nothing behind, on absolute or
    climbing names, links, devices, names given twice, absurd expansion and damage.
    """
    budget = max(EXPANSION_FLOOR, EXPANSION * archive.stat().st_size)
    with replacing(folder) as part:
        part.mkdir()
        try:
            for name, kind, size, content in _members(archive):
                path = part / _safe(name, archive)
                budget -= size
                if kind == "special":
                    raise DataError(f"{archive}: {name!r} is a link or device, expected only files and folders")
                if budget < 0:
                    raise DataError(f"{archive}: expands to more than {EXPANSION} times its size, refused")
                if kind == "folder":
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with content() as source, open(path, "xb") as out:  # x: a name given twice is refused
                    shutil.copyfileobj(source, out, BLOCK)
        except FileExistsError as error:
            raise DataError(f"{archive}: {Path(error.filename).name!r} is there twice, expected once") from None
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
            raise DataError(f"{archive}: damaged archive ({error}), expected a whole one") from None
        tops = list(part.iterdir())
        if len(tops) == 1 and tops[0].is_dir():
            top = tops[0].rename(part.with_suffix(".top"))
            part.rmdir()
            top.rename(part)


def _members(archive: Path) -> Iterator[tuple[str, str, int, Callable[[], IO[bytes]]]]:
    """(name, "file" | "folder" | "special", size in bytes, opener) of each member."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = "special" if not plain else "folder" if info.is_dir() else "file"
                yield info.filename, kind, info.file_size, partial(zipped.open, info)
        return
    with tarfile.open(archive) as tar:
        for info in tar:
            kind = "file" if info.isreg() else "folder" if info.isdir() else "special"
            yield info.name, kind, info.size, partial(tar.extractfile, info)


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))  # a backslash separates on Windows
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise DataError(f"{archive}: member {name!r}, expected a relative path inside the archive")
    return path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: flushed and renamed onto it at the end, removed when something fails.

    What killed processes of this host left behind for the same target is swept first.
    """
    prefix = f".{target.name}.{socket.gethostname()}."
    part = target.parent / f"{prefix}{os.getpid()}.part"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{glob.escape(prefix)}*.part"):
            if old == part or not _alive(int(old.name.removeprefix(prefix).removesuffix(".part"))):
                _remove(old)
        yield part
        if part.is_file():
            with open(part, "rb") as written:
                os.fsync(written.fileno())
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(part)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # missing, most often
            path.unlink()


def progress(total: int, what: str, **options: object) -> tqdm:
    """A progress bar for work of more than a second; in a log file it speaks every ten seconds at most."""
    return tqdm(
        total=total,
        desc=what,
        delay=1,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        **options,
    )
