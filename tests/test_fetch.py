"""Downloads are checked before use, archives cannot write outside their folder, and failures leave nothing behind."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import tarfile
import zipfile

import pytest

from lib import fetch
from lib.fetch import Remote
from lib.images import DataError


def remote(path):
    return Remote(path.as_uri(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def make_tar(path, members):
    """members: (name, type, bytes or link target)"""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content or ""
                tar.addfile(info)
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(archive, tmp_path, message):
    before = files_below(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        fetch.extract(archive, tmp_path / "out" / "data")
    assert "\n" not in str(caught.value) and str(archive) in str(caught.value)
    assert files_below(tmp_path) == sorted({*before, "out"})  # nothing but the empty parent folder


def test_download_checks_and_keeps(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(os.urandom(3000))
    target = fetch.download(remote(source), tmp_path / "root" / "file.bin")
    assert target.read_bytes() == source.read_bytes()
    assert files_below(target.parent) == ["file.bin"]

    source.unlink()
    assert (
        fetch.download(Remote(source.as_uri(), 3000, hashlib.sha256(target.read_bytes()).hexdigest()), target) == target
    )
    with pytest.raises(DataError, match="delete it.*found SHA-256 .* expected 0000"):
        fetch.download(Remote(source.as_uri(), 3000, "0" * 64), target)


@pytest.mark.parametrize("change", ["content", "longer", "shorter"])
def test_download_of_something_else_leaves_nothing(tmp_path, change):
    source = tmp_path / "source.bin"
    source.write_bytes(b"right" * 100)
    expected = remote(source)
    source.write_bytes({"content": b"wrong" * 100, "longer": b"right" * 101, "shorter": b"right" * 99}[change])
    with pytest.raises(DataError, match="source.bin: .*expected"):
        fetch.download(expected, tmp_path / "root" / "file.bin")
    assert files_below(tmp_path / "root") == []


def test_offline_says_what_to_fetch_and_where_to_put_it(tmp_path):
    url, target = (
        "http://127.0.0.1:9/nothing.zip",
        tmp_path / "root" / "nothing.zip",
    )  # nobody listens at the discard port
    with pytest.raises(DataError) as caught:
        fetch.download(Remote(url, 1, "0" * 64), target)
    assert url in str(caught.value) and str(target) in str(caught.value) and "by hand" in str(caught.value)


def test_unwritable_root_is_one_clear_line(tmp_path):
    (tmp_path / "root").write_text("a file where a folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        fetch.download(Remote("http://127.0.0.1:9/x", 1, "0" * 64), tmp_path / "root" / "x")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_extract_renames_the_top_folder(tmp_path, kind):
    members = [("top/a.txt", b"a"), ("top/sub/b.txt", b"b")]
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", members)
    else:
        plain = [(f"./{name}", tarfile.REGTYPE, content) for name, content in members]
        archive = make_tar(tmp_path / "x.tgz", [("./top", tarfile.DIRTYPE, None), *plain])
    fetch.extract(archive, tmp_path / "root" / "data")
    assert files_below(tmp_path / "root") == ["data", "data/a.txt", "data/sub", "data/sub/b.txt"]


@pytest.mark.parametrize("name", ["/abs.txt", "../up.txt", "a/../../up.txt", "..\\up.txt", "C:\\up.txt", "C:/up.txt"])
def test_climbing_names_are_refused(tmp_path, name):
    good = ("good.txt", tarfile.REGTYPE, b"x")
    refused(make_tar(tmp_path / "x.tar.gz", [good, (name, tarfile.REGTYPE, b"x")]), tmp_path, "relative path")
    refused(make_zip(tmp_path / "x.zip", [("good.txt", b"x"), (name, b"x")]), tmp_path, "relative path")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_tars_are_refused(tmp_path, kind):
    refused(make_tar(tmp_path / "x.tar.gz", [("odd", kind, "/etc/passwd")]), tmp_path, "link or device")


def test_links_in_zips_are_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        zipped.writestr(info, "/etc/passwd")
    refused(tmp_path / "x.zip", tmp_path, "link or device")


def test_bombs_are_refused_before_they_unpack(tmp_path):
    zeros = bytes(fetch.EXPANSION_FLOOR + 1)  # 64 MiB of zeros compress to 64 KiB
    refused(make_zip(tmp_path / "x.zip", [("zeros", zeros)]), tmp_path, "expands")
    refused(make_tar(tmp_path / "x.tar.gz", [("zeros", tarfile.REGTYPE, zeros)]), tmp_path, "expands")


def test_a_name_given_twice_is_refused(tmp_path):
    twice = [("a.txt", tarfile.REGTYPE, b"1"), ("a.txt", tarfile.REGTYPE, b"2")]
    refused(make_tar(tmp_path / "x.tar.gz", twice), tmp_path, "twice")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "neither"])
def test_damaged_archives_are_refused(tmp_path, kind):
    content = os.urandom(5000)
    if kind == "zip":
        archive = make_zip(tmp_path / "x.zip", [("a", content)])
    else:
        archive = make_tar(tmp_path / "x.tar.gz", [("a", tarfile.REGTYPE, content)])
    archive.write_bytes(b"no archive" if kind == "neither" else archive.read_bytes()[:3000])
    refused(archive, tmp_path, "damaged")


def test_what_a_killed_process_left_is_swept_and_the_living_are_left_alone(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = socket.gethostname()
    stale, living = (tmp_path / f".x.{host}.{pid}.part" for pid in (int(dead.stdout), os.getppid()))
    stale.write_text("half"), living.write_text("half")
    with fetch.replacing(tmp_path / "x") as part:
        part.write_text("whole")
    assert files_below(tmp_path) == sorted([living.name, "x"])


def test_known_archives_are_fetched_checked_and_unpacked(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "tiny-imagenet-200.zip", [("tiny-imagenet-200/wnids.txt", b"n1\n")])
    monkeypatch.setitem(fetch.ARCHIVES, "tiny-imagenet-200", remote(archive))
    folder = fetch.known("tiny-imagenet", tmp_path / "root")
    assert (folder / "wnids.txt").read_text() == "n1\n"
    archive.unlink()
    assert fetch.known("tiny-imagenet", tmp_path / "root") == folder  # found, not fetched again


def test_imagenette_in_the_size_that_is_needed(tmp_path):
    for name in ("imagenette2-160", "imagenette2-320"):
        (tmp_path / name / "train").mkdir(parents=True)
    assert fetch.known("imagenette", tmp_path, 64).name == "imagenette2-160"
    assert fetch.known("imagenette", tmp_path, 224).name == "imagenette2-320"


def test_small_imagenette_is_not_enlarged_where_the_large_one_is_wanted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fetch, "_unpacked", lambda archive, root: asked.append(archive) or root / archive)
    (tmp_path / "imagenette2-160" / "train").mkdir(parents=True)
    fetch.known("imagenette", tmp_path, 224)
    assert asked == ["imagenette2-320"]
    (tmp_path / "imagenette" / "train").mkdir(parents=True)  # put there by hand
    assert fetch.known("imagenette", tmp_path, 224).name == "imagenette" and asked == ["imagenette2-320"]


def test_two_processes_may_unpack_the_same_archive(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "tiny-imagenet-200.zip", [("tiny-imagenet-200/wnids.txt", b"n1\n")])
    monkeypatch.setitem(fetch.ARCHIVES, "tiny-imagenet-200", remote(archive))
    extract = fetch.extract

    def outrun(file, folder):
        extract(file, folder)  # the other process, just before
        extract(file, folder)

    monkeypatch.setattr(fetch, "extract", outrun)
    folder = fetch.known("tiny-imagenet", tmp_path / "root")
    assert (folder / "wnids.txt").read_text() == "n1\n" and [*folder.parent.glob(".*.part")] == []


def test_fashion_mnist_is_taken_from_the_folder_that_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "DEBIAN_FASHION", tmp_path / "debian")
    for folder in ("root/fashion-mnist", "debian"):
        (tmp_path / folder).mkdir(parents=True)
        for file in fetch.FASHION_MNIST:
            (tmp_path / folder / file.name).write_bytes(b"")
        assert fetch.known("fashion-mnist", tmp_path / "root") == tmp_path / folder


def test_published_checksums_are_well_formed():
    for file in (*fetch.FASHION_MNIST, *fetch.ARCHIVES.values()):
        assert file.url.startswith("https://") and file.size > 0
        assert len(bytes.fromhex(file.sha256)) == 32
