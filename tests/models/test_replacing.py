"""Files that take another's place."""

import os
from pathlib import Path

import pytest

from models.replacing import replacing


@pytest.mark.parametrize("place", ["folder", "."])
def test_a_folder_is_refused_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as refused, replacing(Path(place)) as beside:
        beside.write_text("x")
    assert (refused.value.filename, refused.value.filename2) == (place, None)
    assert os.listdir(tmp_path) == ["folder"]


def test_two_may_write_one_file_and_a_neighbour_stays(tmp_path: Path) -> None:
    """The last one to end wins; what is called `file.part` is somebody's own."""
    file, neighbour = tmp_path / "file", tmp_path / "file.part"
    neighbour.write_text("mine")
    with replacing(file) as first, replacing(file) as second:
        first.write_text("AAAA")
        second.write_text("BB")
    assert file.read_text() == "AAAA"
    assert neighbour.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.part"]
