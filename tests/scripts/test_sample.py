"""`scripts/sample.py` over a tiny model of random weights: what it writes, and what it refuses."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import models
from diffusion import DiffusionError
from guidance import GuidanceError, generate
from inversion import Concept, InversionError, read_images
from tests.disk import full_disk
from tests.tiny import tiny_classes, tiny_glide, tiny_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "sample.py"
PROMPTS = ("a photo of a dog", "a Picture, of <new>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a learned word and an image."""
    path = tmp_path_factory.mktemp("tiny")
    models.save(tiny_model(), path / "model")
    word = Concept("<new>", torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    word.save(path / "new.safetensors")
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(path / "start.png")
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_and_sheet(folder: Path, script: ModuleType, tmp_path: Path) -> None:
    """Run from another folder, as a user does who has the package installed; then one picture again."""
    flags = ["--model", folder / "model", "--concept", folder / "new.safetensors"]
    flags += ["--image", folder / "start.png", "--steps", 2, "--seed", 7, "--count", 2, "--batch-size", 2]
    flags += ["--output", "out", "--prompt", *PROMPTS]
    command = [str(part) for part in (sys.executable, SCRIPT, *flags)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "wrote 4 images to out" in done.stdout
    assert "warning" not in done.stderr  # of the word, which one batch has and the other has not
    assert "2/2" in done.stderr  # two batches, each of the one step that a strength of 0.8 leaves

    names = ["00-a-photo-of-a-dog-seed7.png", "00-a-photo-of-a-dog-seed8.png"]
    names += ["01-a-picture-of-new-seed7.png", "01-a-picture-of-new-seed8.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "sheet.png"]
    sheet = pixels(tmp_path / "out" / "sheet.png")
    assert sheet.shape == (32, 32, 3)
    tiles = [sheet[:16, :16], sheet[:16, 16:], sheet[16:, :16], sheet[16:, 16:]]
    for tile, name in zip(tiles, names):
        assert (tile == pixels(tmp_path / "out" / name)).all()

    script.main(
        script.Config(
            PROMPTS[1:], str(folder / "model"), steps=2, seed=8, output=tmp_path / "again",
            concept=(str(folder / "new.safetensors"),), image=folder / "start.png",
        )
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["00-a-picture-of-new-seed8.png"]
    again = pixels(tmp_path / "again" / "00-a-picture-of-new-seed8.png")
    assert abs(again - tiles[3]).max() <= 1  # another batch may round a pixel the other way


def test_every_shade_is_rounded_to_itself_and_what_is_beyond_is_cut(script: ModuleType, tmp_path: Path) -> None:
    shades = torch.cat([torch.arange(256) / 127.5 - 1, torch.tensor([-1.5, 1.5])])
    script.write_png(tmp_path / "shades.png", shades.expand(3, 1, 258))
    assert (pixels(tmp_path / "shades.png") == np.array([*range(256), 0, 255])[None, :, None]).all()


def test_a_full_disk_leaves_the_picture_before(script: ModuleType, tmp_path: Path) -> None:
    script.write_png(tmp_path / "x.png", torch.ones(3, 1, 1))
    with full_disk(), pytest.raises(OSError, match="[Ff]ile"):
        script.write_png(tmp_path / "x.png", torch.rand(3, 200, 200))
    assert pixels(tmp_path / "x.png").tolist() == [[[255] * 3]]
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_picture_is_named_after_a_prompt_of_any_script(folder: Path, script: ModuleType, tmp_path: Path) -> None:
    prompts = ("рыжая собака", "犬")
    script.main(script.Config(prompts, str(folder / "model"), steps=1, output=tmp_path / "out"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00-рыжая-собака-seed0.png", "01-犬-seed0.png", "sheet.png"]


def test_a_long_prompt_is_cut_to_a_file_s_name(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "draw", lambda config: iter([torch.zeros(1, 3, 16, 16)]))
    script.main(script.Config(("a dog, " * 50,), output=tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"00-{'a-dog-' * 6}a-do-seed0.png"]


def test_the_flags_draw_what_the_library_draws(folder: Path, script: ModuleType) -> None:
    """A learned word may stand in the negative prompt alone."""
    model, word, start = str(folder / "model"), folder / "new.safetensors", folder / "start.png"
    flags = {"negative": "a <new>", "steps": 4, "scale": 3.0, "sampler": "euler", "strength": 0.5, "batch_size": 1}
    given = script.Config(("a dog", "a cat"), model, seed=4, size=32, concept=(str(word),), image=start, **flags)
    wanted = generate(
        models.load(model), ["a dog", "a cat"], generator=[4, 4], concepts=[Concept.load(word)],
        image=read_images([start], 32), **flags,
    )  # fmt: skip
    assert wanted.shape == (2, 3, 32, 32)                                # the model's own would be 16 by 16
    assert torch.equal(torch.cat(list(script.draw(given))), wanted)


def test_what_was_drawn_before_an_interruption_is_there(
    folder: Path, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = script.Config(PROMPTS[:1], str(folder / "model"), steps=2, count=3, batch_size=1, output=tmp_path / "out")
    drawn = iter((*script.draw(config),))

    def interrupted(*_: object, **__: object) -> Tensor:
        if len(list(tmp_path.glob("out/*"))) == 2:
            raise KeyboardInterrupt
        return next(drawn)

    monkeypatch.setattr(script, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(config)
    names = [f"00-a-photo-of-a-dog-seed{seed}.png" for seed in (0, 1)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_an_upsampler_is_shown_the_image_in_small_and_each_picture_has_its_seed(
    folder: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pictures of each prompt in batches of two: the second batch holds pictures of both prompts."""
    sizes, drawn = [], []

    def generate(model: models.GlideModel, prompts: list[str], image: Tensor, **how: object) -> Tensor:
        assert how["batch_size"] == 2                                # whose own is 8
        sizes.append(tuple(image.shape[2:]))
        drawn.extend(zip(prompts, how["generator"]))
        return torch.zeros(len(prompts), 3, 32, 32)

    monkeypatch.setattr(models, "load", lambda *_, **__: tiny_glide(factor=2))
    monkeypatch.setattr(script, "generate", generate)
    flags = {"count": 3, "seed": 5, "batch_size": 2, "image": folder / "start.png"}
    list(script.draw(script.Config(("a dog", "a cat"), **flags)))
    assert sizes == [(16, 16)] * 3
    assert drawn == [(prompt, seed) for prompt in ("a dog", "a cat") for seed in (5, 6, 7)]


@pytest.mark.parametrize(
    ("offload", "more"), [("none", {}), ("idle", {}), ("stream", {"checkpointing": "blocks"})]
)
def test_the_model_is_loaded_as_the_flags_say(
    script: ModuleType, offload: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def load(source: str, **how: str) -> None:
        asked.update(how, model=source)
        raise models.ModelError("stop")

    monkeypatch.setattr(models, "load", load)
    flags = {"model": "x", "dtype": "bfloat16", "device": "cpu", "prediction": "v_prediction", "variant": "fp16"}
    with pytest.raises(models.ModelError, match="stop"):
        next(script.draw(script.Config(("a dog",), offload=offload, **flags)))
    assert asked == flags | {"offload": offload} | more


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": "heun"}, "no sampler is called 'heun'"),
        ({"concept": ("new.safetensors",)}, "no prompt has the learned word <new>"),
        ({"concept": ("og=new.safetensors",)}, "no prompt has the learned word og"),       # it is part of another
        ({"output": "start.png/inside"}, "nothing can be written to"),
        ({"output": "model"}, "already holds something"),
        ({"count": 0}, "--count is at least 1, not 0"),
    ],
)
def test_refusals_leave_nothing(
    folder: Path, script: ModuleType, options: dict, sentence: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    paths = {"output": "out"} | {key: value for key, value in options.items() if key == "output"}
    rest = {key: value for key, value in options.items() if key != "output"}
    with pytest.raises((DiffusionError, GuidanceError, InversionError), match=sentence):
        script.main(script.Config(("a dog",), "model", steps=2, output=Path(paths["output"]), **rest))
    assert sorted(folder.rglob("*")) == before
    assert "sampling" not in capsys.readouterr().err        # an empty bar before the sentence


def test_no_prompt_is_nothing_to_draw(folder: Path, script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(GuidanceError, match="--prompt names nothing to draw"):
        script.main(script.Config((), str(folder / "model"), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_classes_go_by_name_or_number(script: ModuleType, tmp_path: Path) -> None:
    models.save(tiny_classes(), tmp_path / "x.safetensors")
    script.main(script.Config(("cat", "1", "owl"), str(tmp_path / "x.safetensors"), steps=2, output=tmp_path / "out"))
    cat, number, owl = (pixels(tmp_path / "out" / f"{name}-seed0.png") for name in ("00-cat", "01-1", "02-owl"))
    assert (cat == number).all()
    assert (cat != owl).any()


def test_a_word_that_nobody_learned_is_pointed_out_once(folder: Path, script: ModuleType, tmp_path: Path) -> None:
    concepts = (str(folder / "new.safetensors"),)
    prompts = ("a <new>", "a <frida> beside a <new>")
    with pytest.warns(UserWarning, match="^<frida> is read as letters") as warned:
        script.main(script.Config(prompts, str(folder / "model"), concept=concepts, steps=1, output=tmp_path / "out"))
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = script.read_concepts(concepts, tiny_model(), ("a <new>", "1 < 2 and 3 > 2"))
        assert [concept.placeholder for concept in found] == ["<new>"]
        script.read_concepts(concepts, tiny_model(), (90 * "very " + "<new>",))      # drawing says that it is cut off


@pytest.mark.parametrize(
    ("width", "family", "said"),
    [(32, "glide", "learned with GLIDE; this model is tiny"), (48, "tiny", "vectors of width 48; .* needs 32")],
)
def test_a_word_of_another_model_is_refused(
    script: ModuleType, tmp_path: Path, width: int, family: str, said: str
) -> None:
    Concept("<x>", torch.zeros(1, width), {"family": family}).save(tmp_path / "x.safetensors")
    with pytest.raises(InversionError, match=said):
        script.read_concepts((str(tmp_path / "x.safetensors"),), tiny_model(), ("a <x>",))


def test_a_word_can_be_renamed_and_chosen_among_several(script: ModuleType, tmp_path: Path) -> None:
    save_file({"<a>": torch.zeros(1, 32), "<b>": torch.ones(1, 32)}, tmp_path / "two.safetensors")
    (chosen,) = script.read_concepts((f"<b>={tmp_path / 'two.safetensors'}",), tiny_model(), ("<b>",))
    assert (chosen.placeholder, chosen.vectors.sum()) == ("<b>", 32)
    Concept("dog", torch.zeros(1, 32)).save(tmp_path / "dog.safetensors")
    with pytest.warns(UserWarning, match="takes the place of the model's own 'dog'"):
        script.read_concepts((str(tmp_path / "dog.safetensors"),), tiny_model(), ("a dog",))
    (renamed,) = script.read_concepts((f"<dog>={tmp_path / 'dog.safetensors'}",), tiny_model(), ("a <dog>",))
    assert renamed.placeholder == "<dog>"
