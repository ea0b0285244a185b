"""Bytes come into the page cache, whichever way the system reads ahead."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from runtime.kernels.inspection import read_cached
from runtime.model import page_cache
from runtime.model.page_cache import bring, reads_far_ahead


def num_cached(descriptor: int, size: int) -> int:
    return read_cached(descriptor, [bytearray(size)], 0)


def refuse(*_of: int) -> int:
    raise OSError(errno.EINVAL, "this file system sends nothing")


@pytest.mark.parametrize(("far", "sends"), [(False, True), (True, True), (True, False)])
def test_what_was_brought_needs_no_disk_any_more(
    far: bool, sends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (3 << 20) + 17
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(size))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if num_cached(descriptor, size):
            pytest.skip("this file system keeps all its pages, or does not say which")
        monkeypatch.setattr(page_cache, "reads_far_ahead", lambda _device: far)
        if not sends:
            monkeypatch.setattr(os, "sendfile", refuse)
        bring(descriptor, 0, size, more=False)
        assert num_cached(descriptor, size) == size
    finally:
        os.close(descriptor)


def test_only_a_device_that_says_so_is_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_DEVICES", tmp_path)
    for minor, kilobytes in enumerate(("128", "8192", None)):
        folder = tmp_path / f"7:{minor}"
        folder.mkdir()
        if kilobytes is not None:
            (folder / "read_ahead_kb").write_text(f"{kilobytes}\n")
    reads_far_ahead.cache_clear()
    assert [reads_far_ahead(os.makedev(7, minor)) for minor in range(4)] == [False, True, False, False]
    reads_far_ahead.cache_clear()
