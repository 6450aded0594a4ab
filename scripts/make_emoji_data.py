"""Turn two npm packages of emoji art into images and captions for train_vae.py and train_diffusion.py.

    npm install --prefix data/npm emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python scripts/make_emoji_data.py --packages data/npm/node_modules --output data/emoji

writes, over white and at 64x64,
    vae/         every picture except those of held-out concepts, for the autoencoder
    captioned/   the concepts that the diffusion model learns, with captions.jsonl
    held_out/    the concepts that nothing is trained on
    classes/     a folder a class of pictures that look alike, for classifiers and models of classes
    classes_held_out/   every sixth concept of each class, and those of held_out/, which nothing of classes is taught
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _command import run
from PIL import Image
from tqdm import tqdm

from models import ModelError
from models.replacing import replacing

STYLES = {"google": "noto", "twitter": "twemoji"}
HELD_OUT = Path(__file__).parents[1] / "models/data/emoji/held_out.txt"

# Pictures that a small model can tell apart and draw: things, animals, food, places. Left out are signs, letters,
# flags, yellow faces (a hundred variations of one disc) and people (twenty pixels of detail that matter).
CATEGORIES = {"Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects"}
EXTRA_SUBCATEGORIES = {"face-costume", "heart"}
LEFT_OUT = {
    "time", "hotel", "place-map", "av-symbol", "mail", "money", "office", "book-paper", "lock", "sound", "writing",
    "phone", "other-object", "award-medal", "computer", "medical", "light & video", "music",
}  # fmt: skip
# Classes that can be told apart at 32x32, by subcategory.
CLASSES = {
    "building": {"place-building"},
    "clock": {"time"},
    "face": {"face-smiling", "face-affection", "face-tongue", "face-concerned"},
    "fruit": {"food-fruit", "food-vegetable"},
    "hand": {
        "hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands", "hand-prop",
    },
    "heart": {"heart"},
    "mammal": {"animal-mammal"},
    "vehicle": {"transport-ground"},
}  # fmt: skip
LEFT_OUT_NAMES = re.compile(r"moon|suit$|oncoming|banknote|ballot|waning|waxing|station|^bust|sign$|symbol$|stop$")


@dataclass
class Config:
    """packages: the folder that holds both npm packages. output: a folder to write into (made if needed).

    categories: of emoji.json, such as "Animals & Nature", that the captioned concepts are limited to; all if none.
    """

    packages: Path
    output: Path = Path("data/emoji")
    size: int = 64
    categories: tuple[str, ...] = ()


def captions(name: str, style: str, subcategory: str) -> list[str]:
    """The ways in which a picture is described; training picks one at random each time."""
    kind = re.sub(r"[-&]", " ", subcategory)
    return [
        name,
        f"{name} in {style} style",
        f"a {style} emoji of {name}",
        f"an emoji of {name}",
        f"a picture of {name}",
        f"a drawing of {name}",
        f"a {style} drawing of {name}, {kind}",
        f"an icon of {name}, {kind}",
    ]


def is_drawn(entry: dict) -> bool:
    """Whether the diffusion model learns this concept."""
    wanted = entry["category"] in CATEGORIES or entry["subcategory"] in EXTRA_SUBCATEGORIES
    return wanted and entry["subcategory"] not in LEFT_OUT and not LEFT_OUT_NAMES.search(entry["name"].lower())


def class_of(entry: dict) -> str | None:
    """The class of a picture, if it is in one."""
    return next((name for name, kinds in CLASSES.items() if entry.get("subcategory") in kinds), None)


def write_classes(found: list[tuple[str, str, dict, Path]], config: Config, held_out: set[str]) -> None:
    """Write the two folders of classes, from what `pictures` found."""
    concepts = {key: sorted({name for _, name, entry, _ in found if class_of(entry) == key}) for key in CLASSES}
    held_out = held_out | {name for names in concepts.values() for name in names[5::6]}
    for style, name, entry, file in found:
        if key := class_of(entry):
            target = config.output / ("classes_held_out" if name in held_out else "classes") / key
            write_png(target / f"{style}-{file.name}", over_white(file, config.size))


def pictures(config: Config) -> Iterator[tuple[str, str, dict, Path]]:
    """(style, name, entry, file) of every picture, variations of skin colour included."""
    for vendor, style in STYLES.items():
        package = config.packages / f"emoji-datasource-{vendor}"
        if not (package / "emoji.json").is_file():
            raise ModelError(f"there is no {package / 'emoji.json'}: install the package with npm")
        for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
            name = re.sub(r"[^a-z0-9' -]+", " ", entry["name"].lower().replace("’", "'")).strip()
            for variant in [entry, *entry.get("skin_variations", {}).values()]:
                file = package / "img" / vendor / "64" / variant["image"]
                if file.exists():
                    yield style, name, entry if variant is entry else {}, file


def over_white(file: Path, size: int) -> Image.Image:
    """The picture on a white ground, size x size."""
    picture = Image.open(file).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def write_png(path: Path, picture: Image.Image) -> None:
    """The picture, written beside `path` and renamed."""
    with replacing(path) as beside:
        picture.save(beside, format="PNG")


def main(config: Config) -> None:
    """Write the folders."""
    if config.size < 1:
        raise ModelError(f"--size is how many pixels wide and high, at least 1, not {config.size}")
    held_out = set(HELD_OUT.read_text(encoding="utf-8").split("\n")) - {""}
    rows: dict[str, list[dict]] = {"captioned": [], "held_out": []}
    found = list(pictures(config))
    known = {entry["category"] for _, _, entry, _ in found if entry and is_drawn(entry)}
    if unknown := set(config.categories) - known:
        raise ModelError(f"no pictures are of the category {min(unknown)!r}; there are {', '.join(sorted(known))}")
    write_classes(found, config, held_out)
    for style, name, entry, file in tqdm(found, desc="pictures"):
        picture = over_white(file, config.size)
        drawn = entry and is_drawn(entry) and (not config.categories or entry["category"] in config.categories)
        kinds = ["held_out"] if name in held_out else ["vae"] + ["captioned"] * bool(drawn)
        for kind in kinds:
            write_png(config.output / kind / style / file.name, picture)
            if kind != "vae" and entry:
                row = {"file": f"{style}/{file.name}", "name": name, "style": style}
                rows[kind].append(row | {"captions": captions(name, style, entry["subcategory"])})
    for kind, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with replacing(config.output / kind / "captions.jsonl") as beside:
            beside.write_text(text, encoding="utf-8")
        print(f"{kind}: {len(lines)} pictures of {len({line['name'] for line in lines})} concepts")


if __name__ == "__main__":
    run(main)
