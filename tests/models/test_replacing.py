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
