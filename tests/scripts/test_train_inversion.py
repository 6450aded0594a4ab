"""`scripts/train_inversion.py` over a tiny model of random weights: what it writes, resumes and refuses."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import models
from inversion import Concept, InversionError
from models import ModelError
from tests.tiny import tiny_classes, tiny_glide, tiny_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_inversion.py"
QUICK = {"templates": "emoji", "steps": 4, "batch_size": 4, "learning_rate": 1e-2, "samples": 2}
QUICK |= {"accumulation": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and images, one with a caption."""
    path = tmp_path_factory.mktemp("tiny")
    models.save(tiny_model(), path / "model")
    (path / "photos").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / "photos" / f"{i}.png")
    (path / "photos" / "2.txt").write_text("a photo of a large <frida>")
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("train_inversion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate = partial(module.generate, steps=4)  # where 50 would only take longer
    return module


@pytest.fixture
def config(script: ModuleType, folder: Path, tmp_path: Path) -> Any:
    """Flags of a quick run."""
    given = {"model": str(folder / "model"), "images": folder / "photos", "token": "<frida>"}
    return script.Config(**given, output=tmp_path / "out", **QUICK)


def command(folder: Path, **flags: object) -> subprocess.Popen:
    """The script in a process of its own."""
    flags = {"model": folder / "model", "images": folder / "photos", "token": "<frida>"} | QUICK | flags
    given = [text for key, value in flags.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *given], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"},     # two may run at once
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),     # ignored by what runs in the background
    )  # fmt: skip


def numbers(path: Path) -> dict[str, Any]:
    """metrics.json without what differs between two equal runs."""
    metrics = json.loads((path / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_bytes")}


def test_help_says_what_suits_a_model(script: ModuleType) -> None:
    shown = subprocess.run([sys.executable, str(SCRIPT), "--help"], text=True, capture_output=True, check=True).stdout
    shown, photographs = " ".join(shown.replace("│", " ").split()), script.PHOTOGRAPHS
    glide, emoji, small = (script.RECIPES[name] for name in ("glide", "emoji", "emoji-glide"))
    assert (glide.steps, glide.learning_rate) == (photographs.steps, photographs.learning_rate)
    assert (small.batch_size, small.accumulation) == (emoji.batch_size, emoji.accumulation)
    assert f": {photographs.steps}, with emoji {emoji.steps}, with emoji-glide {small.steps}." in shown
    sizes = photographs.batch_size, glide.batch_size, emoji.batch_size
    assert "suits the model: {}, with GLIDE {}, with emoji {}.".format(*sizes) in shown
    assert glide.accumulation == emoji.accumulation == 1
    assert f"suits the model: {photographs.accumulation}, with GLIDE and emoji 1." in shown
    rates = photographs.learning_rate, emoji.learning_rate, small.learning_rate
    assert "suits the model: {:g}, with emoji {:g}, with emoji-glide {:g}.".format(*rates) in shown


def test_a_run_leaves_everything(script: ModuleType, config: Any, capsys: pytest.CaptureFixture) -> None:
    flags = {"schedule": "constant", "warmup": 1, "patience": 7, "seed": 3}
    script.main(replace(config, init="white dog", name="a large dog", **flags))
    found = {path.name for path in config.output.iterdir()}
    concept, state = "a-large-dog.safetensors", "a-large-dog.training.pt"
    assert found == {"run.json", "metrics.json", "loss.png", "comparison.png", concept, state}
    metrics = json.loads((config.output / "metrics.json").read_text())
    wanted = {f"validation_loss_{key}" for key in ("initial", "best", "caption")}
    assert wanted | {"steps", "seconds", "peak_memory_bytes"} <= set(metrics)
    assert metrics["validation_loss_best"] < metrics["validation_loss_initial"]
    used = {key: QUICK[key] for key in ("steps", "batch_size", "accumulation", "learning_rate")} | flags
    assert used.items() <= metrics["settings"].items()
    learned = Concept.load(config.output / concept)
    assert (learned.placeholder, learned.vectors.shape) == ("<frida>", (2, 32))
    for name in ("loss.png", "comparison.png"):
        assert min(Image.open(config.output / name).size) > 300
    assert "validation loss" in (said := capsys.readouterr().out)
    assert "no step was better" not in said


def test_a_run_in_which_no_step_was_better_says_so(
    script: ModuleType, config: Any, capsys: pytest.CaptureFixture
) -> None:
    """At a rate that float32 cannot hold every step is passed over."""
    script.main(replace(config, learning_rate=1e308, steps=3, samples=0))
    assert numbers(config.output)["best_step"] == 0
    assert "no step was better than the start, which is what was written" in capsys.readouterr().out


def test_what_came_out_is_said_in_a_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(script, "loss_curve", lambda *what: drawn.append(what[1:]))
    metrics = {"validation_loss_initial": 0.5, "validation_loss_best": 0.4, "validation_loss_caption": 0.45}
    result = script.inversion.Result(Concept("<x>", torch.zeros(1, 4)), metrics | {"best_step": 1}, ({"step": 0},))
    script.report(tmp_path, "a dog", result, script.TrainConfig())
    said = "validation loss 0.5000 -> 0.4000 (-20.0%); of “a dog” as plain words 0.4500\n"
    assert capsys.readouterr().out == said
    assert drawn == [(({"step": 0},), ("a dog", 0.45))]


def test_the_model_is_loaded_as_the_flags_say(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(source: str, **how: Any) -> models.LatentModel:
        asked.update(how, model=source)
        return tiny_model()

    monkeypatch.setattr(models, "load", load)
    flags = {"model": "x", "dtype": "bfloat16", "device": "cpu", "prediction": "v_prediction", "variant": "fp16"}
    flags |= {"checkpointing": "attention", "attention": "sliced", "offload": "idle"}
    script.load(replace(config, **flags), upsampler=False)
    assert asked == flags | {"upsampler": False}


def test_the_picture_holds_images_and_both_words_over_the_same_seeds(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        script, "comparison", lambda _, rows, columns: drawn.update(rows=rows, columns=columns)
    )
    load, loaded = script.load, []
    monkeypatch.setattr(script, "load", lambda config, **how: loaded.append(how) or load(config, **how))
    script.main(replace(config, seed=7, learning_rate=0.3))
    assert loaded == [{"upsampler": False}, {}]                             # which learns nothing, but draws
    (_, images), (before, first), (after, second) = drawn["rows"]
    assert drawn["columns"] == ["seed 7", "seed 8"]
    assert (before, after) == ("before: a photo of <frida>, started from “dog”", "learned: a photo of <frida>")
    assert [tuple(row.shape) for row in (images, first, second)] == [(2, 3, 16, 16)] * 3
    model = models.load(config.model)
    words = script.generate(model, "a photo of dog", generator=8, scale=7.5, height=16, width=16)
    assert torch.allclose(words[0], first[1], atol=1e-4)  # the same vectors; rounding in another batch
    assert not torch.allclose(first, second, atol=1e-2)


def test_mirror_images_are_learned_from_only_when_asked(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    told: list[list[list[str]]] = []

    def stop(
        model: object, start: object, images: torch.Tensor, prompts: list[list[str]], *args: object, **options: object
    ) -> None:
        seen.append(images)
        told.append(prompts)
        raise InversionError("stop")

    monkeypatch.setattr(script.inversion, "train", stop)
    for i, flip in enumerate((False, True)):
        with pytest.raises(InversionError, match="stop"):
            script.main(replace(config, flip=flip, output=config.output / str(i)))
    assert torch.equal(seen[1], torch.cat([seen[0], seen[0].flip(-1)]))
    assert told[0][2] == ["a photo of a large {}"]                          # the caption of the third
    assert told[1] == [*told[0], *told[0]]                                  # and of its mirror image


def test_ctrl_c_saves_and_resume_ends_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    whole = command(folder, output=tmp_path / "whole", steps=40, samples=0)
    cut = command(folder, output=tmp_path / "cut", steps=40, samples=0)
    seen = ""
    while not re.search(r"\| [1-9]\d?/40", seen):  # the bar says that steps are done; it leaves numbers out
        letter = cut.stderr.read(1)
        assert letter, seen
        seen += letter
    cut.send_signal(signal.SIGINT)
    out, err = cut.communicate(timeout=300)
    assert cut.returncode == 130, err
    assert f"continue with --resume {tmp_path / 'cut'}" in out + err
    assert not (tmp_path / "cut" / "metrics.json").exists()

    again = command(folder, resume=tmp_path / "cut", steps=40, samples=0)
    for run in (again, whole):
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    first, second = (Concept.load(tmp_path / run / "frida.safetensors").vectors for run in ("cut", "whole"))
    assert torch.equal(first, second)


def test_a_refusal_is_one_sentence_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    done = command(folder, init=" ", output=tmp_path / "out")
    _, err = done.communicate(timeout=300)
    assert done.returncode == 2
    assert err.strip() == "the initial text ' ' has no tokens: give a word such as 'dog'"
    assert not (tmp_path / "out").exists()


def spoil(photos: Path, what: str) -> Path:
    """A folder of images that cannot be used."""
    photos.mkdir()
    if what == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / "a.jpg")
        (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:700])
    if what == "1x1":
        Image.new("RGB", (1, 1)).save(photos / "a.png")
    if what == "unreadable":
        (photos / "a.doc").write_text("hello")
    if what == "caption":
        Image.new("RGB", (32, 32)).save(photos / "a.png")
        (photos / "a.txt").write_text("a dog")
    return photos


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", "is empty"),
        ("unreadable", "no readable image"),
        ("truncated", r"a\.jpg is damaged or cut short"),
        ("1x1", r"a\.png has only 1×1 pixels"),
        ("caption", "does not contain <frida>"),
    ],
)
def test_images_that_are_refused(
    script: ModuleType, config: Any, tmp_path: Path, what: str, message: str
) -> None:
    with pytest.raises(InversionError, match=message):
        script.main(replace(config, images=spoil(tmp_path / "photos", what)))
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"token": "dog"}, InversionError, "already a word of the tokenizer"),
        ({"token": " "}, InversionError, "cannot be a placeholder"),
        ({"init": ""}, InversionError, "has no tokens"),
        ({"init": __file__}, InversionError, "is no file of learned vectors"),
        ({"init": "a large white dog", "vectors": 3}, InversionError, "does not fit 3 vectors"),
        ({"vectors": 23}, InversionError, "the template 'a photo of a large {}'.*at most 17 vectors"),
        ({"templates": "photos"}, InversionError, "no templates are called 'photos'"),
        ({"resolution": 18}, ModelError, "multiples of 4"),
        ({"dtype": "float16", "device": "cpu"}, ModelError, "float16"),
        ({"steps": 0}, InversionError, "steps must be at least 1"),
        ({"learning_rate": -1.0}, InversionError, "learning_rate must be"),
        ({"images": Path("nowhere")}, InversionError, "no folder of images at nowhere"),
        ({"model": "nowhere"}, ModelError, "nowhere"),
        ({"init": "none.safetensors"}, InversionError, "no embedding file"),
        ({"samples": -1}, InversionError, "--samples is how many images .*, 0 or more, not -1"),
    ],
)
def test_flags_that_are_refused(
    script: ModuleType, config: Any, flags: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        script.main(replace(config, **flags))
    assert not config.output.exists()


def test_a_template_without_a_slot_is_refused(script: ModuleType, config: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a photo\n")
    with pytest.raises(InversionError, match="would have no effect"):
        script.main(replace(config, templates=str(tmp_path / "t.txt")))
    assert not config.output.exists()


def test_a_folder_of_another_run_is_refused(script: ModuleType, config: Any) -> None:
    config.output.mkdir()
    (config.output / "metrics.json").write_text("mine")
    with pytest.raises(InversionError, match="already holds something: .* continue it with --resume FOLDER"):
        script.main(config)
    assert [path.read_text() for path in config.output.iterdir()] == ["mine"]


@pytest.mark.parametrize("equals", ["", "="])
def test_a_text_too_long_for_a_file_is_a_text(tmp_path: Path, equals: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    runs, start = importlib.import_module("_runs"), equals + "a large white dog. " * 20 + "a dog"
    runs.write_json(tmp_path / "run.json", {"init": runs._from_anywhere(start)})
    assert json.loads((tmp_path / "run.json").read_text()) == {"init": start}


def test_runs_that_start_in_one_second_have_folders_of_their_own(script: ModuleType) -> None:
    assert len({script.new_folder(None, "frida") for _ in range(5)}) == 5      # they take less than a second


def test_a_name_longer_than_a_file_s_is_cut(script: ModuleType, config: Any) -> None:
    with pytest.warns(UserWarning, match="cut off") as warned:      # as words it is longer than a prompt, too
        script.main(replace(config, name="ένα μεγάλο άσπρο σκυλί " * 12, steps=1, samples=0))
    assert not any("collapsed" in str(warning.message) for warning in warned), "its picture has room for the curves"
    files = sorted(file.name for file in config.output.iterdir())
    assert len(files) == 5, "a concept, its state, and what every run has"
    assert files[-1].startswith("ένα-μεγάλο")
    assert files[-1].endswith(".training.pt")


def test_a_place_that_cannot_be_written_is_refused(script: ModuleType, config: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InversionError, match="nothing can be written"):
            script.main(replace(config, output=output))


def test_a_place_that_may_not_be_written_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = importlib.import_module("_runs")
    (tmp_path / "file").touch()
    with pytest.raises(InversionError, match=r"file being a file: choose another --sheet$"):
        runs.require_places(picture=None, sheet=tmp_path / "file" / "x.png")
    monkeypatch.setattr(os, "access", lambda path, how: how != os.W_OK)          # who runs the tests may write anywhere
    with pytest.raises(InversionError, match=rf"{tmp_path} being read-only: choose another --output$"):
        runs.new_folder(tmp_path / "a" / "b", "frida")
    with pytest.raises(InversionError, match=rf"{tmp_path} being read-only: choose another --sheet$"):
        runs.require_places(sheet=tmp_path / "x.png")


def test_an_upsampler_learns_no_word(script: ModuleType, config: Any, tmp_path: Path) -> None:
    models.save(tiny_glide(factor=2), tmp_path / "upsample.safetensors")
    with pytest.raises(ModelError, match="is an upsampler, which learns no word"):
        script.main(replace(config, model=str(tmp_path / "upsample.safetensors")))
    assert not config.output.exists()


def test_a_model_of_classes_learns_no_word(script: ModuleType, config: Any, tmp_path: Path) -> None:
    models.save(tiny_classes(), tmp_path / "classes.safetensors")
    with pytest.raises(ModelError, match="is told classes and reads no words"):
        script.main(replace(config, model=str(tmp_path / "classes.safetensors")))


def test_what_cannot_be_resumed_is_refused(
    script: ModuleType, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(InversionError, match="is not the folder of a run"):
        script.main(script.Config(resume=tmp_path))
    script.main(replace(config, samples=0, steps=2))
    assert not (config.output / "comparison.png").exists()
    with pytest.raises(InversionError, match=r"has seed 0, not 3: leave it out"):
        script.main(script.Config(resume=config.output, seed=3))
    flags = (config.output / "run.json").read_text()
    other = flags.replace('"steps": 2', '"steps": "abc"')
    for damaged, message in ((other, "steps cannot be 'abc'"), ("[1]", "no flags"), ("{}", "it lacks model, images, ")):
        (config.output / "run.json").write_text(damaged)
        with pytest.raises(InversionError, match=message):
            script.main(script.Config(resume=config.output))
    (config.output / "run.json").write_text(flags)
    capsys.readouterr()
    script.main(script.Config(resume=config.output))
    assert "0/2" in (bar := capsys.readouterr().err)  # the bar of a finished run never moves
    assert "2/2" not in bar
    assert "it had learned to the end" in bar


def test_flags_are_read_as_they_were_written(
    script: ModuleType, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, wrong = importlib.import_module("_runs"), {"samples": True, "schedule": "linear", "images": 5, "seed": 1.5}
    runs.save_flags(tmp_path, config)
    noted = json.loads((tmp_path / "run.json").read_text())

    def again(**changed: object) -> Any:
        runs.write_json(tmp_path / "run.json", noted | changed)
        return runs.resumed(tmp_path, script.Config(resume=tmp_path))

    assert again() == again(of_a_later_version=1) == config
    assert again(learning_rate=1).learning_rate == 1
    for key, value in wrong.items():
        with pytest.raises(InversionError, match=f"is damaged: {key} cannot be {value!r}"):
            again(**{key: value})
    runs.write_json(tmp_path / "run.json", noted)
    monkeypatch.chdir(config.images.parent)
    assert runs.resumed(tmp_path, replace(config, images=Path("photos"))) == config             # given as it was
    moved = replace(config, output=tmp_path)
    assert runs.resumed(tmp_path, moved) == moved
    assert runs.resumed(tmp_path, replace(config, schedule="cosine", samples=6)) == config      # as by default
    with pytest.raises(InversionError, match=f"has samples {config.samples}, not 6: leave it out"):
        runs.resumed(tmp_path, replace(config, samples=6), named={"samples"})
    monkeypatch.setattr("sys.argv", ["train_inversion.py", "--no-flip", "--batch_size=3", "photos", "--init", "-1"])
    assert importlib.import_module("_command").named() == {"flip", "batch_size", "init"}
    (tmp_path / "run.json").write_text(json.dumps(noted)[:-1])
    with pytest.raises(InversionError, match=r"it has no readable run\.json"):
        runs.resumed(tmp_path, config)
    assert [runs._fits(tuple[int, ...], value) for value in ((1, 2), (1, "2"), 1)] == [True, False, False]


def test_a_run_is_resumed_from_another_folder(
    script: ModuleType, config: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    Concept("<old>", torch.randn(2, 32)).save(folder / "old.safetensors")
    relative = {"model": f"{folder.name}/model", "init": f"<old>={folder.name}/old.safetensors"}
    script.main(replace(config, samples=0, steps=2, **relative))
    monkeypatch.chdir(tmp_path)
    script.main(script.Config(resume=config.output))
    monkeypatch.chdir(folder)
    (folder / "mine.txt").write_text("a {} here")
    named, output = {"templates": "mine.txt", "init": "<old>=old.safetensors"}, tmp_path / "named"
    script.main(replace(config, samples=0, steps=2, **named, output=output))
    monkeypatch.chdir(tmp_path)
    script.main(script.Config(resume=output))


def test_a_concept_s_file_is_noted_with_its_word_from_anywhere(
    script: ModuleType, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "two.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    script.save_flags(tmp_path / "run", replace(config, init="<b>=words/two.safetensors"))
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert noted == f"<b>={tmp_path / 'words' / 'two.safetensors'}"


def test_a_word_is_no_file_of_its_name_and_a_file_s_name_may_hold_an_equals_sign(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = importlib.import_module("_runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    for name in ("dog", "lr=1.pt"):
        (tmp_path / name).touch()
    assert [runs._from_anywhere(text) for text in ("emoji", "dog")] == ["emoji", "dog"]
    assert runs.word_and_file("lr=1.pt") == (None, Path("lr=1.pt"))
    assert runs.word_and_file("<a>=lr=1.pt") == ("<a>", Path("lr=1.pt"))


def test_a_concept_s_file_can_be_the_start(script: ModuleType, config: Any, tmp_path: Path) -> None:
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    Concept("<old>", vectors).save(tmp_path / "old.safetensors")
    config = replace(config, init=str(tmp_path / "old.safetensors"), samples=0, steps=1, learning_rate=1e-4)
    script.main(config)
    learned = Concept.load(config.output / "frida.safetensors")
    assert learned.placeholder == "<frida>"
    assert (learned.vectors - vectors).abs().max() <= 1.01e-4  # a step of Adam is as long as its rate
    assert "init" not in learned.metadata              # no words: an upsampler would read the name of the file
    Concept("<old>", vectors, {"init": "white dog"}).save(tmp_path / "words.safetensors")
    start = script.starting_concept(replace(config, init=str(tmp_path / "words.safetensors")), tiny_model(), 1)
    assert start.metadata["init"] == "white dog"
    with pytest.raises(InversionError, match="holds 2 vectors, not 3"):
        script.main(replace(config, vectors=3, output=tmp_path / "other"))


def test_a_concept_s_file_must_be_of_the_model_s_family_and_say_which_word(
    script: ModuleType, config: Any, tmp_path: Path
) -> None:
    Concept("<old>", torch.ones(1, 32), {"family": "glide"}).save(tmp_path / "old.safetensors")
    with pytest.raises(InversionError, match="learned with GLIDE; this model is tiny"):
        script.starting_concept(replace(config, init=str(tmp_path / "old.safetensors")), tiny_model(), 1)
    save_file({"<a>": torch.zeros(1, 32), "<b>": torch.ones(1, 32)}, tmp_path / "two.safetensors")
    start = script.starting_concept(replace(config, init=f"<b>={tmp_path / 'two.safetensors'}"), tiny_model(), 1)
    assert (start.placeholder, start.vectors.sum()) == ("<frida>", 32)


@pytest.mark.parametrize(
    ("init", "at_least", "count"),
    [("white dog", 5, 5), ("white dog", 1, 2), ("dog", 1, 1), ("dog " * 100, 1, 100)],     # longer than any file's name
)
def test_a_word_has_a_vector_a_token_and_as_many_as_suit_the_model(
    script: ModuleType, config: Any, init: str, at_least: int, count: int
) -> None:
    assert len(script.starting_concept(replace(config, init=init), tiny_model(), at_least).vectors) == count


def test_the_shipped_example_is_there(script: ModuleType) -> None:
    files = script.find_images(script.Config().images)
    assert 3 <= len(files) <= 6
    assert script.read_images(files, 64).shape == (len(files), 3, 64, 64)


# --- memory


def test_a_plan_is_printed_and_nothing_else_happens(script: ModuleType, config: Any, capsys: Any) -> None:
    script.main(replace(config, plan=True, device="cuda", dtype="float16", attention="fused", memory_budget="1GiB"))
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("16x16 pixels, batch 4, on cuda: the peak of a training")
    assert head.split()[:5] == ["dtype", "checkpointing", "attention", "offload", "peak"]
    found = [tuple(row.split()[:4]) for row in rows]
    expected = [(level, offload) for level in ("none", "attention", "blocks") for offload in ("none", "idle")]
    assert found == [("float16", level, "fused", offload) for level, offload in (*expected, ("blocks", "stream"))]
    assert [row.split("  ")[-1].strip() for row in rows].count("<- fastest that fits") == 1
    assert not config.output.exists()


def test_a_plan_of_a_run_is_of_its_flags(script: ModuleType, config: Any, capsys: Any) -> None:
    how = {"dtype": "float32", "checkpointing": "none", "attention": "fused", "offload": "none"}      # one row
    script.main(replace(config, samples=0, steps=2, batch_size=3, **how))
    capsys.readouterr()
    script.main(script.Config(resume=config.output, plan=True, memory_budget="1GiB"))
    assert "16x16 pixels, batch 3, on" in (said := capsys.readouterr().out)
    assert "<- fastest that fits" in said


def test_a_plan_says_that_nothing_fits(script: ModuleType, config: Any, capsys: Any) -> None:
    with pytest.raises(InversionError, match="1 KiB are too small for every setting: the smallest"):
        script.main(replace(config, plan=True, device="cuda", memory_budget="1KiB", dtype="float16", offload="none"))
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_drawing_that_takes_more_than_the_budget_is_said(
    script: ModuleType, config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def drawing(shell: Any, setting: Any, side: int, count: int, device: Any) -> int:
        drawn.append(count)
        return 2**30

    monkeypatch.setattr(script.inversion, "drawing", drawing)
    monkeypatch.setattr(script, "PHOTOGRAPHS", replace(script.PHOTOGRAPHS, batch_size=4))
    how = {"dtype": "float32", "device": "cpu", "checkpointing": "none", "offload": "none"}       # one row of a plan
    given = replace(config, steps=1, memory_budget="1000MiB", samples=1, **how)
    script.main(given)
    said = "drawing the samples afterwards takes 1.00 GiB, more than that: --samples 0 leaves it out"
    assert said in capsys.readouterr().out
    assert drawn == [1]                                                    # of one sample one, whatever a batch is
    script.main(replace(given, samples=0, output=config.output / "other"))
    assert said not in capsys.readouterr().out


def test_as_many_samples_are_planned_as_are_drawn_at_once(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def stop(config: Any, shell: Any, *sizes: int, drawn: int) -> None:
        asked.append((*sizes, drawn))
        raise InversionError("stop")

    monkeypatch.setattr(script, "within_budget", stop)
    monkeypatch.setattr(script, "PHOTOGRAPHS", replace(script.PHOTOGRAPHS, batch_size=5))
    for samples in (0, 3, 9):
        with pytest.raises(InversionError, match="stop"):
            script.main(replace(config, resolution=32, samples=samples, memory_budget="1GiB"))
    assert asked == [(32, 4, drawn) for drawn in (1, 3, 5)]                 # a side, and samples of a step


def test_a_budget_chooses_the_fastest_that_fits_and_the_run_keeps_it(
    script: ModuleType, config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(config, dtype="float32", attention="fused", device="cpu", steps=2, samples=0, batch_size=8)
    settings = script.inversion.settings_for(torch.device("cpu"), dtype=torch.float32, attention="fused")
    planned = [script.inversion.Planned(how, (4 - i) * 2**20, 10 + i, 0) for i, how in enumerate(settings)]
    asked: list[Any] = []
    monkeypatch.setattr(script.inversion, "plan", lambda *what: asked.append(what) or planned)
    script.main(replace(given, memory_budget="3.5MiB"))
    said = "3 MiB of 3.5MiB: float32, checkpointing attention, attention fused, offload none"
    assert capsys.readouterr().out.splitlines()[0] == said
    assert json.loads((config.output / "run.json").read_text())["checkpointing"] == "attention"
    script.main(script.Config(resume=config.output, checkpointing="blocks"))       # cheaper, after a shortage
    assert json.loads((config.output / "run.json").read_text())["checkpointing"] == "blocks"
    with pytest.raises(InversionError, match="are too small for every setting: the smallest, float32, checkpointing"):
        script.main(replace(given, memory_budget="1KiB", output=config.output / "other"))
    assert not (config.output / "other").exists()
    wanted = [(16, 8, "cpu", settings)] * 2
    assert [(side, batch, device.type, rest) for _, side, batch, device, rest in asked] == wanted


def test_what_fits_is_what_the_run_gets(
    script: ModuleType, config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, asked = models.Setting(torch.bfloat16, "attention", "sliced", "idle"), []
    planned = [script.inversion.Planned(setting, 2**20, 1, 0)]
    monkeypatch.setattr(script.inversion, "plan", lambda shell, *what: planned)
    monkeypatch.setattr(script.inversion, "drawing", lambda shell, *what: asked.append(what) or 2**21)
    given = replace(config, memory_budget="2MiB", device="cpu")
    found = script.within_budget(given, models.outline(config.model), 24, 3, drawn=5)
    assert found == replace(given, dtype="bfloat16", checkpointing="attention", attention="sliced", offload="idle")
    assert asked == [(setting, 24, 5, torch.device("cpu"))]
    assert "drawing" not in capsys.readouterr().out                     # takes more than learning, and fits


def test_a_plan_knows_the_dtypes_that_a_flag_can_name(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = importlib.import_module("_memory").planned
    monkeypatch.setattr(script.inversion, "plan", lambda *what: {setting.dtype for setting in what[-1]})
    auto = replace(config, device="cuda", dtype="auto")
    assert planned(auto, None, 16, 1) == {torch.float16}
    assert planned(replace(auto, dtype=None), None, 16, 1) == {torch.float16, torch.float32}
    with pytest.raises(ModelError, match="'float17' is no dtype"):
        planned(replace(auto, dtype="float17"), None, 16, 1)


def test_the_flags_of_a_run_stand_for_a_setting(
    script: ModuleType, config: Any
) -> None:
    assert script.how(config) == {}
    assert script.how(replace(config, offload="stream")) == {"checkpointing": "blocks", "offload": "stream"}
    wrong = {"checkpointing": "none", "offload": "stream"}              # which what loads or plans refuses
    assert script.how(replace(config, **wrong)) == wrong


def test_a_plan_is_of_the_model_that_the_flags_name(
    script: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(models, "outline", lambda *what: asked.append(what) or tiny_model())
    given = replace(config, model="x.ckpt", prediction="v_prediction", resolution=None, batch_size=3)
    assert script.planning(given)[1:] == (16, 3)
    assert asked == [("x.ckpt", "v_prediction")]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"memory_budget": "6"}, InversionError, "'6' is no size of memory"),
        ({"memory_budget": "0GiB"}, InversionError, "no memory at all"),
        ({"memory_budget": "6", "plan": True}, InversionError, "'6' is no size of memory"),
        ({"offload": "stream", "checkpointing": "none"}, ModelError, "needs checkpointing blocks, not none"),
        ({"offload": "stream", "checkpointing": "none", "plan": True}, ModelError, "needs checkpointing blocks"),
    ],
)
def test_what_no_memory_can_be_is_refused(
    script: ModuleType, config: Any, flags: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        script.main(replace(config, **flags))
    assert not config.output.exists()


def test_every_way_to_run_learns_the_same(script: ModuleType, config: Any) -> None:
    found = []
    ways = ({}, {"checkpointing": "blocks"}, {"offload": "idle"}, {"offload": "stream"}, {"attention": "sliced"})
    for i, flags in enumerate(ways):
        script.main(replace(config, samples=0, device="cpu", output=config.output / str(i), **flags))
        found.append(Concept.load(config.output / str(i) / "frida.safetensors").vectors)
    assert all(torch.equal(vectors, found[0]) for vectors in found[:4])
    assert torch.allclose(found[4], found[0], rtol=0, atol=1e-3)       # a tenth of a step: Adam divides by rounding
