"""The folders of classes that `make_emoji_data.py` writes: by subcategory, held out by concept."""

import json
from pathlib import Path

import pytest
from PIL import Image

from models import ModelError
from tests.disk import full_disk
from tests.scripts.test_train_networks import script


def test_a_held_out_concept_is_held_out_in_every_style(tmp_path: Path) -> None:
    """Every sixth of a class by its name, and those of held_out.txt; what is in no class is left out."""
    module, found = script("make_emoji_data"), []
    Image.new("RGBA", (72, 72)).save(tmp_path / "x.png")
    names = {"heart": list("abcdefgh"), "animal-mammal": ["cat", "dog"], "arrow": ["up"]}
    for kind, several in names.items():
        for name in several:
            (tmp_path / f"{name}.png").write_bytes((tmp_path / "x.png").read_bytes())
            found += [(style, name, {"subcategory": kind}, tmp_path / f"{name}.png") for style in ("noto", "twemoji")]
    found.append(("noto", "cat", {}, tmp_path / "x.png"))                  # a variation of skin colour has no entry
    module.write_classes(found, module.Config(tmp_path, tmp_path / "out", size=32), {"dog"})
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    styles = ("noto", "twemoji")
    expected = {f"classes/heart/{style}-{name}.png" for style in styles for name in "abcdegh"}
    expected |= {f"classes/mammal/{style}-cat.png" for style in styles}
    held_out = ("heart/{}-f.png", "mammal/{}-dog.png")
    expected |= {f"classes_held_out/{file.format(style)}" for style in styles for file in held_out}
    assert written == expected
    assert Image.open(tmp_path / "out/classes/heart/noto-a.png").size == (32, 32)
    assert Image.open(tmp_path / "out/classes/heart/noto-a.png").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_captioned_is_a_thing_of_its_own_and_what_is_held_out_is_taught_to_nothing(tmp_path: Path) -> None:
    """A clock face is left out, by its subcategory; a colour of skin is a picture for the autoencoder alone."""
    module, dark = script("make_emoji_data"), {"1F3FF": {"image": "dark.png"}}
    entries = [
        {"name": "VASE", "category": "Objects", "subcategory": "household", "image": "vase.png"},
        {"name": "ONE OCLOCK", "category": "Travel & Places", "subcategory": "time", "image": "clock.png"},
        {"name": "HORSE RACING", "category": "Activities", "subcategory": "sport", "image": "rider.png",
         "skin_variations": dark},
        {"name": "POODLE", "category": "Animals & Nature", "subcategory": "animal-mammal", "image": "poodle.png"},
    ]  # fmt: skip
    for vendor in module.STYLES:
        images = tmp_path / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        images.mkdir(parents=True)
        for file in ("vase.png", "clock.png", "rider.png", "dark.png", "poodle.png"):
            Image.new("RGBA", (64, 64)).save(images / file)
        (tmp_path / f"emoji-datasource-{vendor}" / "emoji.json").write_text(json.dumps(entries))
    module.main(module.Config(tmp_path, tmp_path / "out", size=16))
    for kind, wanted in (("captioned", {"vase", "rider"}), ("held_out", {"poodle"})):
        rows = [json.loads(line) for line in (tmp_path / "out" / kind / "captions.jsonl").read_text().splitlines()]
        files = {f"{style}/{name}.png" for style in module.STYLES.values() for name in wanted}
        assert {row["file"] for row in rows} == files
        assert len(rows) == len(files)
        folder = tmp_path / "out" / kind
        assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == files
    assert {p.stem for p in (tmp_path / "out" / "vae").rglob("*.png")} == {"vase", "clock", "rider", "dark"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"categories": ("Objects", "Food")}, "no pictures are of the category 'Food'; there are Objects"),
        ({"size": 0}, "--size is how many pixels"),
        ({"packages": Path("nowhere")}, "there is no nowhere.emoji-datasource-google.emoji.json: install"),
    ],
)
def test_flags_that_make_no_sense_leave_nothing(tmp_path: Path, flags: dict, said: str) -> None:
    module = script("make_emoji_data")
    entry = {"name": "VASE", "category": "Objects", "subcategory": "household", "image": "x.png"}
    for vendor in module.STYLES:
        images = tmp_path / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        images.mkdir(parents=True)
        Image.new("RGBA", (64, 64)).save(images / "x.png")
        (tmp_path / f"emoji-datasource-{vendor}" / "emoji.json").write_text(json.dumps([entry]))
    with pytest.raises(ModelError, match=said):
        module.main(module.Config(**{"packages": tmp_path, "output": tmp_path / "out"} | flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("room", "file"), [(100, r"red\.png"), (700, r"captions\.jsonl")])
def test_a_full_disk_is_named_with_the_file_and_tears_none(tmp_path: Path, room: int, file: str) -> None:
    """Half a captions.jsonl would be a smaller data set."""
    module = script("make_emoji_data")
    entries = [
        {"name": f"RED {i}", "category": "Objects", "subcategory": "household", "image": "red.png"} for i in range(9)
    ]
    for vendor in module.STYLES:
        images = tmp_path / "in" / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        images.mkdir(parents=True)
        Image.linear_gradient("L").resize((64, 64)).save(images / "red.png")
        (tmp_path / "in" / f"emoji-datasource-{vendor}" / "emoji.json").write_text(json.dumps(entries))
    with full_disk(room), pytest.raises(OSError, match=file):
        module.main(module.Config(tmp_path / "in", tmp_path / "out", size=32))
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        Image.open(path).load()
