"""The path of a checkpoint as every node is told it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expertmesh import ConfigError
from fleet.arguments import check_ray_address, checked_path


def test_links_stay_for_each_node_to_follow(tmp_path: Path) -> None:
    (tmp_path / "local-copy").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "local-copy")

    assert checked_path(tmp_path / "models") == tmp_path / "models"


def test_a_path_is_absolute_and_a_home_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert checked_path("model") == tmp_path / "model"
    assert checked_path("~/model") == Path("/home/somebody/model")


def test_dots_are_followed_by_the_system_and_not_by_us(tmp_path: Path) -> None:
    """Beyond a link, `..` is the parent of where it leads."""
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "deep" / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "folder")

    assert checked_path(tmp_path / "link" / ".." / "model").samefile(tmp_path / "deep" / "model")


def test_a_home_that_is_nobodys_and_a_folder_that_is_gone_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="checkpoint is '~nobody-of-that-name/model'"):
        checked_path("~nobody-of-that-name/model")

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="checkpoint is 'model'"):
        checked_path("model")
    monkeypatch.undo()
    assert os.getcwd()


@pytest.mark.parametrize("address", ["http://10.0.0.1:6379", "ray://10.0.0.1:10001", "10.0.0.1",
                                     "local", "", 6379])  # fmt: skip
def test_what_is_no_address_of_a_ray_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"ray_address is .*, expected host:port"):
        check_ray_address(address)


@pytest.mark.parametrize("address", [None, "auto", "10.0.0.1:6379", "[::1]:6379"])
def test_an_address_of_a_ray_is_taken(address: str | None) -> None:
    check_ray_address(address)
