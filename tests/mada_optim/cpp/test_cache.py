"""Compiled libraries are kept, and taken, only where nobody but the user can write."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mada_optim import MADA
from mada_optim.cpp import cache
from mada_optim.kernels.native import executor as native
from mada_optim.kernels.native import library

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away and be another user")


@pytest.fixture
def fallback(tmp_path, monkeypatch) -> Path:
    """The folder under the temporary directory, which does not exist yet; MADA_CACHE_DIR cannot be made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(cache, "_FALLBACKS_WARNED_OF", set())
    (tmp_path / "file").touch()
    monkeypatch.setenv("MADA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    return tmp_path / "temporary" / f"mada-optim-{os.geteuid()}"


def make(empty: Path) -> Path:
    made = empty / "made"
    made.write_text("ours")
    return made


def cached() -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cache.cached("library", make)


def test_without_a_folder_of_its_own_there_is_one_under_the_temporary_directory(fallback):
    with pytest.warns(UserWarning, match="Set MADA_CACHE_DIR to a folder that only you can write to") as caught:
        paths = [cache.cached(name, make) for name in ("library", "library", "another")]
    assert len(caught) == 1
    path = fallback / "library"
    assert paths == [path, path, fallback / "another"]
    assert path.read_text() == "ours"
    assert stat.S_IMODE(fallback.stat().st_mode) == 0o700


def test_without_a_home(fallback, monkeypatch):
    """As where a container runs as a user whom it does not know."""

    def unknown(uid: int):
        raise KeyError(uid)

    for name in ("MADA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.warns(UserWarning, match="HOME is not set.*MADA_CACHE_DIR"):
        assert cache.cached("library", make).parent == fallback


def link(folder: Path) -> None:
    elsewhere = folder.with_name("elsewhere of " + folder.name)
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def open_to_others(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def given_away(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)


SPOILED = [link, open_to_others, pytest.param(given_away, marks=needs_root)]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_folder_that_others_may_have_written_to_is_not_used(spoil: Callable[[Path], None], fallback, monkeypatch):
    """The usual one, then both."""
    usual = fallback.parent / "usual"
    spoil(usual)
    (usual / "library").write_text("theirs")
    monkeypatch.setenv("MADA_CACHE_DIR", str(usual))
    assert cached() == fallback / "library"
    assert cached().read_text() == "ours"
    (fallback / "library").unlink()
    fallback.rmdir()
    spoil(fallback)
    with pytest.raises(OSError, match=f"{usual} .*; {fallback} "):
        cached()
    assert (usual / "library").read_text() == "theirs"


def test_the_folder_of_another_user_by_its_owner_alone(fallback, monkeypatch):
    cached()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    fallback.rename(fallback.with_name(f"mada-optim-{owner + 1}"))
    with pytest.raises(OSError, match=f"belongs to user {owner}, not to user {owner + 1}"):
        cached()


@pytest.mark.parametrize("spoil", ["link", "mode", pytest.param("owner", marks=needs_root)])
def test_a_library_that_others_may_have_written_is_made_anew(spoil, fallback):
    path = cached()
    path.write_text("theirs")
    if spoil == "link":
        path.rename(fallback / "elsewhere")
        path.symlink_to(fallback / "elsewhere")
    elif spoil == "mode":
        path.chmod(0o722)
    else:
        os.chown(path, 12345, 12345)
    assert cached().read_text() == "ours"
    assert not path.is_symlink()
    assert path.stat().st_uid == os.geteuid()
    names = {entry.name for entry in fallback.iterdir()}
    assert names == ({"library", "elsewhere"} if spoil == "link" else {"library"})


@pytest.fixture
def _fresh():
    for function in (library.load, library.why_unavailable):
        function.cache_clear()
    yield
    for function in (library.load, library.why_unavailable):
        function.cache_clear()


def one_step(**arguments) -> int:
    """The line at which the step was taken."""
    param = nn.Parameter(torch.ones(3))
    optimizer = MADA([param], hyper_lr=0.0, **arguments)
    param.grad = torch.ones(3)
    optimizer.step()
    return one_step.__code__.co_firstlineno + 5


@pytest.mark.usefixtures("_fresh")
def test_native_kernels_from_the_fallback(fallback, monkeypatch):
    used = []
    load = library.load
    monkeypatch.setattr(native, "load", lambda variant: used.append(variant) or load(variant))
    with pytest.warns(UserWarning, match="MADA_CACHE_DIR") as caught:
        lines = {one_step(), one_step()}
    assert [warning.filename for warning in caught] == [__file__]
    assert {warning.lineno for warning in caught} == lines
    assert used
    assert {path.suffix for path in fallback.iterdir()} == {".so"}


@pytest.mark.usefixtures("_fresh")
def test_the_plain_kernels_where_there_is_no_folder(fallback, monkeypatch):
    open_to_others(fallback)
    with pytest.warns(UserWarning, match="cannot be built.*Set MADA_CACHE_DIR to a folder") as caught:
        lines = {one_step(), one_step()}
    assert [warning.filename for warning in caught] == [__file__]
    assert {warning.lineno for warning in caught} == lines
    assert "compiler" not in str(caught[0].message)
    with pytest.raises(RuntimeError, match="fused=True needs .*MADA_CACHE_DIR.*may be written by others"):
        one_step(fused=True)
