"""Models of classes and their classifiers, trained at toy sizes from a folder of classes."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from inversion import InversionError
from models import ClassModel, ModelError
from models.class_names import ClassNames
from tests.scripts.test_train_networks import interrupted_at, same, script

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of 16x16 pixels a class: its colour, a little noisy."""
    folder = tmp_path_factory.mktemp("classes")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(12):
            noise = np.random.default_rng(i).normal(0, 20, (16, 16, 3))
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


def diffusion_config(data: Path, output: Path, **more: object) -> object:
    shape = {"model_channels": 32, "channel_mult": (1, 1), "head_channels": 16, "steps": 4, "batch_size": 2}
    flags = {"size": 8, "told": "classes", "dtype": "float32"} | shape | more
    return script("train_diffusion").Config(data=data, output=output, **flags)


def classifier_config(images: Path, output: Path, **more: object) -> object:
    flags = {"size": 16, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (2,), "steps": 4}
    flags |= {"head_channels": 16, "batch_size": 4, "dtype": "float32"}
    return script("train_classifier").Config(images=images, output=output, **flags | more)


def test_a_model_of_classes_is_trained_and_resumed_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_diffusion")
    module.main(diffusion_config(folder, tmp_path / "whole", held_out=folder))
    interrupted_at(module, 2, diffusion_config(folder, tmp_path / "halves", held_out=folder), monkeypatch)
    module.main(diffusion_config(folder, tmp_path / "halves", held_out=folder, resume=True))
    assert same(*(tmp_path / name / "model.safetensors" for name in ("whole", "halves")))
    model = models.load(tmp_path / "whole" / "model.safetensors")
    assert (model.classes.names, model.null, model.resolution) == (("blue", "red"), True, 8)
    features = model.encode_text(model.tokenizer.encode(["red", "blue", ""]))
    answer = model.predict(torch.ones(3, 3, 8, 8), torch.tensor([500] * 3), features)
    assert answer.shape[1] == 3
    assert (answer[0] - answer[1]).abs().max() > 0      # the last layer started at zero: it was trained


def test_a_class_s_vector_learns_and_the_null_label_has_none(tmp_path: Path) -> None:
    model = script("_untrained").class_model(diffusion_config(tmp_path, tmp_path), ["blue", "red", "blue"], 8)
    model.encode_text(model.tokenizer.encode(["red", ""])).pooled.sum().backward()
    assert model.unet.label_emb.weight.grad.tolist() == [[0.0] * 128, [1.0] * 128]


def test_muon_takes_matrices_but_no_tables_and_not_the_ends(tmp_path: Path) -> None:
    model = script("_untrained").class_model(diffusion_config(tmp_path, tmp_path), ["blue", "red"], 8)
    is_hidden = script("train_diffusion").is_hidden_matrix
    weights = {f"unet.{name}": weight for name, weight in model.unet.named_parameters() if weight.ndim >= 2}
    assert {name for name, weight in weights.items() if not is_hidden(name, weight)} == {
        "unet.input_blocks.0.0.weight", "unet.out.2.weight", "unet.label_emb.weight",
    }  # fmt: skip


def test_an_unconditional_model_is_trained_on_any_folder(folder: Path, tmp_path: Path) -> None:
    script("train_diffusion").main(diffusion_config(folder, tmp_path / "run", told="nothing"))
    model = models.load(tmp_path / "run" / "model.safetensors")
    assert (model.classes.names, model.null, model.guides_itself) == ((), True, False)
    assert model.unet.out[2].weight.abs().max() > 0


def test_classes_are_dropped_with_the_probability_that_was_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, encode = [], ClassModel.encode_text
    monkeypatch.setattr(ClassModel, "encode_text", lambda self, tokens: (seen.append(tokens), encode(self, tokens))[1])
    numbers = {"steps": 20, "batch_size": 20, "caption_dropout": 0.3}
    script("train_diffusion").main(diffusion_config(folder, tmp_path / "run", **numbers))
    dropped = torch.cat([tokens.ids for tokens in seen]).eq(2).float().mean().item()
    assert dropped == pytest.approx(0.3, abs=0.09)      # four standard errors of 400 draws, sqrt(0.21 / 400) = 0.023


def test_without_dropout_there_is_no_null_label(folder: Path, tmp_path: Path) -> None:
    script("train_diffusion").main(diffusion_config(folder, tmp_path / "run", caption_dropout=0.0, held_out=folder))
    assert not models.load(tmp_path / "run" / "model.safetensors").null


@pytest.mark.parametrize("name", ["train_diffusion", "train_classifier"])
def test_a_class_that_was_renamed_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every class had another's name."""
    data, module = Path(shutil.copytree(folder, tmp_path / "data")), script(name)
    config = diffusion_config if name == "train_diffusion" else classifier_config
    interrupted_at(module, 2, config(data, tmp_path / "run", save_every=1), monkeypatch)
    (data / "blue").rename(data / "zebra")
    with pytest.raises(ModelError, match="holds a training on other pictures, names, captions or latents"):
        module.main(config(data, tmp_path / "run", save_every=1, resume=True))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"size": None}, "needs the --size"), ({"vae": Path("runs/vae")}, "leave --vae"), ({"factor": 3}, "cannot be")],
)
def test_flags_that_do_not_go_with_classes(folder: Path, tmp_path: Path, more: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        script("train_diffusion").main(diffusion_config(folder, tmp_path / "run", **more))


def test_a_classifier_is_trained_and_resumed_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_classifier")
    module.main(classifier_config(folder, tmp_path / "whole"))
    interrupted_at(module, 2, classifier_config(folder, tmp_path / "halves"), monkeypatch)
    assert not (tmp_path / "halves" / "classifier.safetensors").exists()
    module.main(classifier_config(folder, tmp_path / "halves", resume=True))
    assert same(*(tmp_path / name / "classifier.safetensors" for name in ("whole", "halves")))
    network = models.load_classifier(tmp_path / "whole" / "classifier.safetensors")
    assert (network.names.names, network.image_size) == (("blue", "red"), 16)


def test_what_a_classifier_learned_is_told_by_level_of_noise(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two colours are told apart but where nothing is left of them; the table is of the weights that were written."""
    more = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "save_every": 20}
    script("train_classifier").main(classifier_config(folder, tmp_path / "run", **more))
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert [row["time"] for row in found["held out"]] == list(range(0, 1000, 100))
    assert [row["accuracy"] for row in found["learned"][:3]] == [1, 1, 1]
    assert [row["accuracy"] for row in found["held out"][:3]] == [1, 1, 1]
    assert found["learned"][9]["loss"] > found["learned"][0]["loss"]
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("time   learned  held out") :]
    assert table[1].split() == ["0", "100.0%", "100.0%"]
    assert "most frequent of the 2 classes is 50.0%" in table[11]


def test_only_what_knows_the_held_out_pictures_better_is_written(tmp_path: Path) -> None:
    """And of that the average, the training going on with its own weights."""
    module, file = script("train_classifier"), tmp_path / "x.safetensors"
    classes = script("_classes").Classes(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]), ClassNames(("a", "b")))
    network = module.untrained(classifier_config(tmp_path, tmp_path), classes)
    trainer = module.Trainer({"classifier": network}, 1e-3, 10, 1, 0.9)
    for mark, loss, expected in ((1.0, 0.7, 1.0), (2.0, 0.8, 1.0), (3.0, 0.6, 3.0)):
        for average in trainer.average:
            average.fill_(mark)
        module.export(network, trainer, file, torch.bfloat16, lambda loss=loss: [(0, 0.5, loss)])
        assert models.load_classifier(file).time_embed[0].bias[0] == expected
        assert trainer.best == min(trainer.best, loss)
        assert network.time_embed[0].bias.dtype == torch.bfloat16
        assert torch.equal(network.time_embed[0].bias, trainer.master[1].bfloat16())


def test_pictures_are_noised_as_the_schedule_says() -> None:
    module = script("train_classifier")
    seen: list[torch.Tensor] = []

    class Network(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.zeros(len(x), 2)

    schedule, t = module.Schedule("squaredcos_cap_v2"), torch.tensor([0, 500, 999])
    images = torch.full((3, 3, 64, 64), 0.5)
    module.logits_at(Network(1, 1), schedule, images, t, torch.Generator().manual_seed(0))
    alpha_bar = schedule.alpha_bar(t).float()
    # means and deviations of 12288 draws: standard errors of at most 0.009 and 0.0064; four of them
    torch.testing.assert_close(seen[0].mean(dim=(1, 2, 3)), 0.5 * alpha_bar.sqrt(), rtol=0, atol=0.036)
    torch.testing.assert_close(seen[0].std(dim=(1, 2, 3)), (1 - alpha_bar).sqrt(), rtol=0, atol=0.026)


def test_a_judge_reads_clean_pictures_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, times = script("train_classifier"), []
    logits_at = module.logits_at
    monkeypatch.setattr(module, "logits_at", lambda *given: (times.extend(given[3].tolist()), logits_at(*given))[1])
    module.main(classifier_config(folder, tmp_path / "run", noisiest=1))
    assert set(times) == {0}                                                  # in training, too
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert [row["time"] for row in found["held out"]] == [0]


class TestFolders:
    def read(self, folder: Path, **more: object) -> object:
        return script("_classes").read_classes(folder, 16, **more)

    def copy(self, folder: Path, to: Path) -> Path:
        for name in COLOURS:
            (to / name).mkdir(parents=True)
            for i in range(3):
                (to / name / f"{i}.png").write_bytes((folder / name / f"{i:02}.png").read_bytes())
        return to

    def test_a_subfolder_is_a_class(self, folder: Path) -> None:
        classes = self.read(folder)
        assert classes.names.names == ("blue", "red")
        assert Counter(classes.labels.tolist()) == {0: 12, 1: 12}
        of_blue = classes.images[classes.labels == 0].mean(dim=(0, 2, 3))
        assert of_blue[2] > 0.8 > of_blue[0]

    def test_a_folder_with_one_class(self, folder: Path, tmp_path: Path) -> None:
        copy = self.copy(folder, tmp_path / "x")
        for file in (copy / "red").iterdir():
            file.unlink()
        with pytest.raises(InversionError, match=r"x/red is empty"):
            self.read(copy)
        (copy / "red").rmdir()
        with pytest.raises(InversionError, match="holds 1 classes, blue: at least two"):
            script("train_classifier").main(classifier_config(copy, tmp_path / "run"))
        with pytest.raises(InversionError, match="at least two"):
            script("train_diffusion").main(diffusion_config(copy, tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_files_that_cannot_be_read(self, folder: Path, tmp_path: Path) -> None:
        copy = self.copy(folder, tmp_path / "x")
        (copy / "red" / "1.png").write_bytes((copy / "red" / "1.png").read_bytes()[:60])
        with pytest.raises(InversionError, match=r"red/1\.png is damaged"):
            self.read(copy)

    def test_what_is_no_picture_or_lies_in_no_class_is_named(self, folder: Path, tmp_path: Path) -> None:
        copy = self.copy(folder, tmp_path / "x")
        (copy / "red" / "notes.md").write_text("")
        (copy / "1.png").write_bytes((copy / "red" / "1.png").read_bytes())
        with pytest.warns(UserWarning, match="left out|no readable image") as caught:
            assert len(self.read(copy)) == 6
        said = " ".join(str(warning.message) for warning in caught)
        assert "1.png and whatever else lies beside the classes" in said
        assert "notes.md" in said

    def test_held_out_pictures_are_of_the_same_classes(self, folder: Path, tmp_path: Path) -> None:
        names = script("_classes").ClassNames(("red", "yellow"))
        with pytest.raises(InversionError, match="a class blue that is none of those to learn: red, yellow"):
            self.read(folder, names=names)
        more = script("_classes").ClassNames(("green", "blue", "red"))
        assert set(self.read(folder, names=more).labels.tolist()) == {1, 2}

    def test_every_tenth_picture_is_held_out(self, folder: Path) -> None:
        module = script("_classes")
        learned, held_out = module.every_tenth(self.read(folder))
        assert (len(learned), held_out.labels.tolist()) == (22, [0, 1])
        all_of = {tuple(image.flatten().tolist()) for part in (learned, held_out) for image in part.images}
        assert len(all_of) == 24

    def test_a_class_of_one_picture_has_none_to_hold_out(self, folder: Path, tmp_path: Path) -> None:
        copy = self.copy(folder, tmp_path / "x")
        for i in (1, 2):
            (copy / "red" / f"{i}.png").unlink()
        with pytest.raises(InversionError, match="the class red has one picture"):
            script("train_classifier").main(classifier_config(copy, tmp_path / "run"))


def test_variation_mirrors_moves_and_scales() -> None:
    varied, g = script("_classes").varied, torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 16, 16, generator=g)
    assert varied(images, 0.0, g) is images
    white = torch.ones(8, 3, 16, 16)                                          # its border is continued, not black
    torch.testing.assert_close(varied(white, 0.5, g), white, rtol=0, atol=1e-5)             # float32 interpolation
    still = varied(images, 1e-7, g)
    # interpolated in float32 at positions that are off by up to 16e-7 of a pixel
    same_way = [torch.allclose(a, b, atol=1e-4) for a, b in zip(still, images)]
    mirrored = [torch.allclose(a, b, atol=1e-4) for a, b in zip(still, images.flip(-1))]
    assert all(a != b for a, b in zip(same_way, mirrored))
    assert 16 < sum(mirrored) < 48                                            # four standard errors of 64 draws
    spot = torch.zeros(64, 1, 17, 17)
    spot[:, :, 8, 8] = 1
    moved = varied(spot, 0.25, g)
    where = moved.flatten(1).argmax(dim=1)
    shift = torch.stack([where // 17, where % 17]) - 8
    assert shift.abs().max() <= 3                                             # 0.25 of half a side is 2.1, and scaled
    assert len(set(map(tuple, shift.T.tolist()))) > 8


@pytest.mark.parametrize(
    ("flags", "said"), [({"vary": 1.0}, "--vary is"), ({"noisiest": 0}, "--noisiest is"), ({"steps": 0}, "--steps")]
)
def test_flags_of_a_classifier_that_make_no_sense(folder: Path, tmp_path: Path, flags: dict, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        script("train_classifier").main(classifier_config(folder, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
