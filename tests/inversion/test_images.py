import errno
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from inversion import InversionError, find_images, read_folder, read_images

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def colour(images: Tensor, y: int, x: int, i: int = 0) -> tuple[int, int, int]:
    """The 8-bit colour of a pixel."""
    return tuple(((images[i, :, y, x] + 1) * 127.5).round().int().tolist())


def halves(size: tuple[int, int], left: tuple = RED, right: tuple = BLUE) -> Image.Image:
    """An image whose halves differ."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


@pytest.fixture(autouse=True)
def no_surprising_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_shape_dtype_and_range(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (0, 255, 51)).save(tmp_path / "a.png")
    images = read_folder(tmp_path, 32)
    assert images.shape == (1, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_files_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, rgb in (("b.png", BLUE), ("a.JPG", RED), ("c.webp", GREEN)):
        Image.new("RGB", (32, 32), rgb).save(tmp_path / name)
    assert [file.name for file in find_images(tmp_path)] == ["a.JPG", "b.png", "c.webp"]
    assert colour(read_folder(tmp_path, 32), 5, 5, i=1) == BLUE


def test_a_camera_s_turn_is_undone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise by 90° to see it upright
    halves((64, 64)).save(tmp_path / "a.png", exif=exif)
    images = read_folder(tmp_path, 64)
    assert colour(images, 2, 32) == RED  # what was left is now on top
    assert colour(images, 61, 32) == BLUE


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_an_image_is_cropped_in_the_middle_never_squashed(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, ((size[0] - 32) // 2, (size[1] - 32) // 2, (size[0] + 32) // 2, (size[1] + 32) // 2))
    image.save(tmp_path / "a.png")
    images = read_folder(tmp_path, 32)
    assert {colour(images, y, x) for y in (0, 15, 31) for x in (0, 15, 31)} == {GREEN}


def test_lanczos_is_what_resamples(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    expected = np.asarray(Image.fromarray(noise).resize((32, 32), Image.Resampling.LANCZOS))
    found = ((read_folder(tmp_path, 32)[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.convert(mode).save(
        tmp_path / "a.png", **({"transparency": image.convert("P").getpixel((31, 0))} if mode == "P" else {})
    )
    images = read_folder(tmp_path, 32)
    assert colour(images, 5, 29) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(
        tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    )
    assert colour(read_folder(tmp_path, 32), 5, 5) == (255, 255, 255)


def test_a_transparent_grey_of_sixteen_bits_lies_on_white(tmp_path: Path) -> None:
    """Pillow writes no such file: its tRNS chunk is put behind the header."""
    pixels = np.full((32, 32), 50_000, dtype=np.uint16)
    pixels[:, :16] = 1000
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole, chunk = (tmp_path / "a.png").read_bytes(), b"tRNS" + struct.pack(">H", 1000)
    inserted = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(whole[:33] + inserted + whole[33:])
    images = read_folder(tmp_path, 32)
    assert colour(images, 16, 4) == (255, 255, 255)
    assert colour(images, 16, 28) == (195, 195, 195)


@pytest.mark.parametrize(("dtype", "suffix"), [("<u2", "png"), ("<u2", "tiff"), (">u2", "tiff"), ("<i4", "tiff")])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, dtype: str, suffix: str) -> None:
    for wide in (0x4040, 0x40C0, 0x3FC0):                                   # 0x40 · 257, and half a step beside it
        Image.fromarray(np.full((32, 32), wide, dtype)).save(tmp_path / f"a.{suffix}")
        assert colour(read_folder(tmp_path, 32), 5, 5) == (0x40, 0x40, 0x40)


def test_hidden_and_foreign_files_are_skipped_with_one_warning(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for name in (".DS_Store", "notes.md", "b.txt", "a.txt", "raw.heic"):
        (tmp_path / name).write_bytes(b"\x00\x01 <x>")
    (tmp_path / "more").mkdir()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        files = find_images(tmp_path)
    assert [file.name for file in files] == ["a.png"]
    (warning,) = found
    for name in ("notes.md", "b.txt", "raw.heic", "more"):
        assert name in str(warning.message)
    assert ".DS_Store" not in str(warning.message)  # which nobody put there
    assert "a.txt" not in str(warning.message)  # it is the caption of a.png


def test_hidden_images_are_hidden(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "._a.png")
    with pytest.warns(UserWarning, match=r"\._a\.png"):
        assert len(find_images(tmp_path)) == 1


def test_a_folder_that_is_called_like_an_image_is_none(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.warns(UserWarning, match=r"no readable image: b\.png"):
        assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_of_many_files_eight_are_named(tmp_path: Path) -> None:
    for i in range(11):
        (tmp_path / f"{i:02d}.md").touch()
    with pytest.raises(InversionError, match=r"only 00\.md, .*, 07\.md and 3 more: readable"):
        find_images(tmp_path)


def test_subfolders_are_read_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "a.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    assert [file.name for file in find_images(tmp_path, recursive=True)] == ["b.png", "a.png"]


def test_enlarging_a_lot_is_said_once(tmp_path: Path) -> None:
    for name, side in (("a.png", 31), ("b.png", 20), ("c.png", 32)):
        Image.new("RGB", (side, 64)).save(tmp_path / name)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        read_folder(tmp_path, 64)
    (warning,) = found
    assert "a.png (31×64), b.png (20×64)" in str(warning.message)
    assert "c.png" not in str(warning.message)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="there is no folder of images"):
        read_folder(tmp_path / "none", 32)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    halves((64, 64)).save(tmp_path / "a.png")
    with pytest.raises(InversionError, match=r"a\.png is a file: name the folder that holds the images"):
        read_folder(tmp_path / "a.png", 32)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="is empty: put the images"):
        read_folder(tmp_path, 32)


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(InversionError, match=r"no readable image, only notes\.md: readable are \.avif"):
        read_folder(tmp_path, 32)


def test_photographs_in_a_format_that_is_not_read_are_not_called_no_images(tmp_path: Path) -> None:
    halves((32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"a telephone's photograph")
    with pytest.warns(UserWarning, match=r"no readable image: b\.heic; readable .*; HEIC .* export them as JPEG"):
        read_folder(tmp_path, 32)
    (tmp_path / "c.jpg").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic")         # as some messengers send it
    with pytest.raises(InversionError, match=r"c\.jpg is a HEIC photograph, whatever its name, .* export them as JPEG"):
        read_images([tmp_path / "c.jpg"], 32)


def test_images_in_subfolders_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    halves((32, 32)).save(tmp_path / "inner" / "a.png")
    with pytest.raises(InversionError, match=r"only inner: .*; folders in it are not searched: name one of them, or"):
        find_images(tmp_path)


def test_what_the_system_does_not_let_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves((32, 32)).save(tmp_path / "a.png")

    def refused(file: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(Image, "open", refused)                 # for root all can be read
    with pytest.raises(PermissionError, match="Permission denied"):
        read_images([tmp_path / "a.png"], 32)


def test_a_large_photograph_is_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves((64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings(record=True) as said:
        read_images([tmp_path / "a.png"], 32)
    assert not said


def test_home_may_be_written_as_usual(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    halves((32, 32)).save(tmp_path / "a.png")
    assert find_images("~") == [tmp_path / "a.png"]
    assert torch.equal(read_images(["~/a.png"], 32), read_folder(tmp_path, 32))


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image(tmp_path: Path, keep: float, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(InversionError, match=rf"a\.{suffix} is damaged or cut short"):
        read_folder(tmp_path, 32)


@pytest.mark.parametrize("size", [(1, 1), (640, 15)])
def test_an_image_of_nothing(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(InversionError, match=rf"a\.png has only {size[0]}×{size[1]} pixels"):
        read_folder(tmp_path, 32)


def test_a_missing_image(tmp_path: Path) -> None:
    with pytest.raises(InversionError, match="there is no image at"):
        read_images([tmp_path / "a.png"], 32)


def test_files_may_be_named_by_texts(tmp_path: Path) -> None:
    halves((64, 64)).save(tmp_path / "a.png")
    assert torch.equal(read_images([str(tmp_path / "a.png")], 32), read_images([tmp_path / "a.png"], 32))
    with pytest.warns(UserWarning, match=r"enlarged to 256×256, and so blurred: a\.png"):
        read_images([str(tmp_path / "a.png")], 256)


def test_there_is_nothing_in_no_files_and_no_pixels(tmp_path: Path) -> None:
    halves((64, 64)).save(tmp_path / "a.png")
    with pytest.raises(InversionError, match="the list of files is empty"):
        read_images([], 32)
    with pytest.raises(InversionError, match="size is at least 1"):
        read_images([tmp_path / "a.png"], 0)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_no_list_of_files(tmp_path: Path, kind: type) -> None:
    with pytest.raises(InversionError, match=r"a list of files: take find_images\('.*photos'\)"):
        read_images(kind(tmp_path / "photos"), 32)


def test_pixels_of_unknown_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InversionError, match="floating-point pixels"):
        read_folder(tmp_path, 32)
    for number in (65536, -1, 255):
        Image.fromarray(np.full((32, 32), number, np.int32)).save(tmp_path / "a.tiff")
        with pytest.raises(InversionError, match=f"pixels of {number} to {number}, of unknown white"):
            read_folder(tmp_path, 32)


def test_what_is_intact_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(InversionError, match=r"notes\.md is damaged or cut short, or no image at all"):
        read_images([tmp_path / "notes.md"], 32)
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")          # 24 KB
    with pytest.raises(InversionError, match=r"large\.png has more than 178956970 pixels, .*: make it smaller"):
        read_images([tmp_path / "large.png"], 32)


def test_hidden_folders_are_not_searched(tmp_path: Path) -> None:
    for folder in (".thumbnails", "photos"):
        (tmp_path / folder).mkdir()
        halves((32, 32)).save(tmp_path / folder / "a.png")
    with pytest.warns(UserWarning, match=r"\.thumbnails"):
        assert find_images(tmp_path, recursive=True) == [tmp_path / "photos" / "a.png"]
    assert find_images(tmp_path / ".thumbnails", recursive=True) == [tmp_path / ".thumbnails" / "a.png"]    # as asked
