"""What is drawn of a training, read back from the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inversion.report import comparison, loss_curve, sheet

COLOURS = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))


def places(file: Path) -> list[tuple[float, float]]:
    """The middle of each of the three colours in a PNG, (x, y) in 0..1."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    found = []
    for colour in COLOURS:
        y, x = np.nonzero((abs(pixels - [255 if c > 0 else 0 for c in colour]) < 3).all(axis=2))
        found.append((x.mean() / pixels.shape[1], y.mean() / pixels.shape[0]))
    return found


def test_the_folder_of_a_picture_is_made(tmp_path: Path) -> None:
    sheet(tmp_path / "new" / "sheet.png", torch.zeros(1, 3, 8, 8), ["grey"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_a_path_or_a_text(tmp_path: Path, kind: type) -> None:
    row = {"step": 0, "loss": None, "validation_loss": 0.1, "norms": [1.0], "cosines": [1.0]}
    sheet(kind(tmp_path / "a.png"), torch.zeros(1, 3, 8, 8), ["grey"])
    comparison(kind(tmp_path / "b.png"), [("grey", torch.zeros(1, 3, 8, 8))])
    loss_curve(kind(tmp_path / "c.png"), [row])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_sheet_holds_its_images_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inversion.report.COLUMNS", 2)
    images = torch.tensor(COLOURS)[:, :, None, None].expand(-1, -1, 8, 8)
    sheet(tmp_path / "sheet.png", images, ["red", "green", "blue"])
    red, green, blue = places(tmp_path / "sheet.png")
    assert red[0] < 0.5 < green[0]
    assert max(red[1], green[1]) < 0.5 < blue[1]
    assert blue[0] < 0.5
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_is_as_wide_as_its_images(tmp_path: Path) -> None:
    for count in (1, 2):
        sheet(tmp_path / f"{count}.png", torch.zeros(count, 3, 8, 8), ["grey"] * count)
    one, two = (Image.open(tmp_path / f"{count}.png").size for count in (1, 2))
    assert (two[0], two[1]) == (2 * one[0], one[1])


def test_an_image_stands_upright_in_its_own_colours(tmp_path: Path) -> None:
    red, green, blue = torch.tensor(COLOURS)[:, :, None, None]
    image = torch.zeros(3, 9, 9)                                            # the middle of [-1, 1]: grey
    image[:, :3], image[:, 6:, :3], image[:, 6:, 6:] = red, green, blue
    sheet(tmp_path / "sheet.png", image[None], [""])
    red, green, blue = places(tmp_path / "sheet.png")
    assert red[1] < green[1] == blue[1]
    assert green[0] < red[0] < blue[0]
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert (abs(pixels.astype(int) - 127.5) < 1).all(axis=2).sum() > 1000


def test_a_comparison_holds_a_row_under_another(tmp_path: Path) -> None:
    rows = [(str(i), torch.tensor(colour)[None, :, None, None].expand(2, -1, 8, 8)) for i, colour in enumerate(COLOURS)]
    comparison(tmp_path / "comparison.png", rows, ["seed 0", "seed 1"])
    heights = [y for _, y in places(tmp_path / "comparison.png")]
    assert heights == sorted(heights)
    assert heights[1] - heights[0] > 0.2


def test_rows_need_not_be_of_one_length(tmp_path: Path) -> None:
    """Four drawings, and six samples of either word."""
    red, green, blue = torch.tensor(COLOURS)[:, :, None, None].expand(-1, -1, 8, 8)
    comparison(tmp_path / "comparison.png", [("a", red[None]), ("b", torch.stack([green, blue]))], ["seed 0", "seed 1"])
    red, green, blue = places(tmp_path / "comparison.png")
    assert red[0] == pytest.approx(green[0], abs=0.01)                      # in the first column
    assert green[0] < blue[0]


def test_every_picture_stands_under_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, images = [], torch.zeros(2, 3, 8, 8)
    monkeypatch.setattr("inversion.report._write", lambda figure, file: drawn.append(figure))
    comparison(tmp_path / "comparison.png", [("images", images), ("before", images), ("learned", images)], ["a", "b"])
    sheet(tmp_path / "sheet.png", images, ["red", "green"])
    rows = [(row.get_suptitle(), [axes.get_title() for axes in row.axes]) for row in drawn[0].subfigs]
    assert rows == [("images", ["", ""]), ("before", ["a", "b"]), ("learned", ["a", "b"])]
    assert [axes.get_title() for axes in drawn[1].axes] == ["red", "green"]


@pytest.mark.parametrize("images", [1, 6])
def test_a_long_label_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    drawn, words = [], "before: an emoji of <frida>, started from “large white and light brownish retriever dog” " * 2
    monkeypatch.setattr("inversion.report._write", lambda figure, file: drawn.append(figure))
    comparison(tmp_path / "comparison.png", [(words, torch.zeros(images, 3, 8, 8))] * 2)
    (figure,) = drawn
    figure.savefig(tmp_path / "drawn.png")                                  # which lays it out
    for row in figure.subfigs:
        assert " ".join(row.get_suptitle().split()) == words.strip()
        place = row._suptitle.get_window_extent()
        assert 0 <= place.x0 < place.x1 <= figure.bbox.width
        assert place.y0 > row.axes[0].get_window_extent().y1                # above its images


def test_there_is_no_half_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"loss": 1.0, "validation_loss": 1.0, "norms": [1.0], "cosines": [1.0]}
    drawn = []
    monkeypatch.setattr("inversion.report._write", lambda figure, file: drawn.append(figure))
    for steps in (2, 20):
        loss_curve(tmp_path / "loss.png", [row | {"step": step} for step in range(steps + 1)])
    ticks = [axes.get_xticks() for figure in drawn for axes in figure.axes]
    assert all((each == each.round()).all() for each in ticks)


def test_what_stands_between_dollars_is_no_formula(tmp_path: Path) -> None:
    """As one, these words would be an error of matplotlib's, after the training."""
    words, images = "a $5_{ dog for $6", torch.zeros(2, 3, 8, 8)
    row = {"step": 0, "loss": None, "validation_loss": 1.0, "norms": [1.0], "cosines": [1.0]}
    comparison(tmp_path / "comparison.png", [(words, images)] * 2, [words] * 2)
    sheet(tmp_path / "sheet.png", images, [words] * 2)
    loss_curve(tmp_path / "loss.png", [row], (words, 0.5))
    assert {file.name for file in tmp_path.iterdir()} == {"comparison.png", "sheet.png", "loss.png"}
