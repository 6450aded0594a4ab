"""Models of classes: what ∅ is, what is refused, the files of guided-diffusion and ours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import models
from models import ClassModel, ModelError
from models.class_file import _published_classifier
from models.class_model import ClassTokenizer
from models.class_names import ClassNames
from models.class_shapes import certain
from models.classifier import Classifier, ClassifierConfig
from models.files import metadata, open_tensors
from models.presets import ADM, ADM_CLASSIFIERS, ADM_UPSAMPLERS, ClassPreset
from models.unet import UNet, UNetConfig
from models.weights import on_meta
from tests.models.test_adm import manifest, shapes, tiny
from tests.tiny import tiny_classes

PETS = ClassNames(("dog", "cat", "3"))


class TestTokenizer:
    def test_names_numbers_and_the_empty_prompt(self) -> None:
        tokens = ClassTokenizer(PETS).encode(["cat", "0", 0, 2, "", "3"])
        assert tokens.ids.tolist() == [[1], [0], [0], [2], [3], [2]]      # the class called 3 goes before the number
        assert tokens.mask.tolist() == [[True], [True], [True], [True], [False], [True]]

    @pytest.mark.parametrize("wrong", ["4", "owl", -1, 3, "-1", "", "²"])
    def test_a_class_that_there_is_not(self, wrong: str | int) -> None:
        with pytest.raises(ModelError, match="there are 3: dog, cat, 3"):
            PETS.index(wrong)

    def test_a_thousand_classes_are_not_listed(self) -> None:
        with pytest.raises(ModelError, match="no class 'dog'; there are 1000: 0 to 999"):
            ClassNames.numbered(1000).index("dog")

    def test_names_are_each_of_its_own(self) -> None:
        with pytest.raises(ModelError, match="'dog', 'dog'"):
            ClassNames(("dog", "dog"))

    def test_learned_words_are_refused(self) -> None:
        with pytest.raises(ModelError, match="reads no words"):
            ClassTokenizer(PETS).encode(["dog"], {"<x>": 1})


class TestModel:
    def test_the_null_label_adds_no_vector(self) -> None:
        """∅ is what the network says when it is told no class; a class is its row of the table, added to the time."""
        model, x, t = tiny_classes(), torch.rand(2, 3, 16, 16), torch.tensor([7, 700])
        both = model.predict(x, t, model.encode_text(model.tokenizer.encode(["cat", ""])))
        network = model.unet
        # float32 sums of one batch or of two, in other orders
        alone = network(x[1:], t[1:])
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
        of_cat = network(x[:1], t[:1], pooled=network.label_emb.weight[1:2])
        torch.testing.assert_close(both[:1], of_cat, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(x[:1], t[:1]), of_cat, atol=1e-2)

    def test_an_unconditional_model_takes_the_empty_prompt_only(self) -> None:
        model = tiny_classes(classes=())
        assert model.encode_text(model.tokenizer.encode(["", ""])) == (None, None)
        with pytest.raises(ModelError, match="knows no classes, 'dog' neither"):
            model.tokenizer.encode(["dog"])

    def test_what_is_drawn_by_default_has_no_more_steps_than_its_process(self) -> None:
        """250, as in guided-diffusion's README, and only a model that draws by itself guides itself."""
        model = tiny_classes()
        assert (model.sampling.steps, model.sampling.scale) == ("250", 2)
        assert replace(model, schedule={"name": "linear", "steps": 10}).sampling.steps == "10"
        assert tiny_classes(factor=4).sampling.scale == 1

    def test_without_the_null_label_there_is_nothing_to_guide_away_from(self) -> None:
        model = replace(tiny_classes(), null=False)
        assert model.sampling.scale == 1
        with pytest.raises(ModelError, match=r"never trained without a class.*draw at scale 1.*guidance\.classifier"):
            model.encode_text(model.tokenizer.encode(["dog", ""]))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"classes": ClassNames(("dog",))}, "classes and their names differ, 3 and 1"),
            ({"factor": 4}, "what stands in them differ, 3 and 6"),
            ({"upsampler": tiny_classes(factor=4, size=16)}, "differ, 16 and 64"),
            ({"upsampler": tiny_classes()}, "the upsampler of a base model is one of its kind that enlarges"),
            (vars(tiny_classes(factor=2)) | {"upsampler": tiny_classes(factor=2, size=64)}, "that enlarges"),
        ],
    )
    def test_parts_that_do_not_fit(self, change: dict, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            replace(tiny_classes(), **change)


    def test_answers_of_a_channel_count_that_is_no_image_s(self) -> None:
        model = tiny_classes()
        with pytest.raises(ModelError, match="answers 4 channels: neither 3, nor 6 with a variance"):
            replace(model, unet=UNet(replace(model.unet.config, out_channels=4)))

    def test_neither_classes_nor_the_null_label(self) -> None:
        with pytest.raises(ModelError, match="neither classes nor the null label"):
            replace(tiny_classes(classes=()), null=False)
        assert not tiny_classes(classes=()).guides_itself

    def test_an_upsampler_moves_along(self) -> None:
        model = replace(tiny_classes(), upsampler=tiny_classes(factor=4))
        assert model.to("meta") is model
        networks = (model.unet, model.upsampler.unet)
        assert all(parameter.is_meta for network in networks for parameter in network.parameters())


class TestShapes:
    @pytest.mark.parametrize("name", ADM | ADM_UPSAMPLERS)
    def test_the_published_models_are_recognised(self, name: str) -> None:
        """From key lists of the public files where there are any; the upsamplers' follow from their flags."""
        preset = (ADM | ADM_UPSAMPLERS)[name]
        size, *rest = name.split("-")
        file = "_".join([f"adm_{size}x{size}_diffusion", *rest])
        found = certain(manifest(file) if name in ADM else shapes(on_meta(lambda: UNet(preset.unet))), name)
        same = [key for key, of in (ADM | ADM_UPSAMPLERS).items() if found == _told(of, found)]
        assert same == [name]

    @pytest.mark.parametrize("name", ADM_CLASSIFIERS)
    def test_the_published_classifiers_are_recognised(self, name: str) -> None:
        """By their blocks and their width, of which another has one in common with them."""
        found = manifest(f"adm_{name}x{name}_classifier")
        assert _published_classifier(found, Path("x.pt")) == ADM_CLASSIFIERS[name]
        first = "input_blocks.0.0.weight"
        with pytest.raises(ModelError, match=r"^x\.pt is none of guided-diffusion's published classifiers"):
            _published_classifier(found | {first: (2 * found[first][0], *found[first][1:])}, Path("x.pt"))

    @pytest.mark.parametrize("updown", [False, True])
    @pytest.mark.parametrize("levels", [(1,), (1, 1), (1, 2, 2), (0.5, 1, 1, 2)])
    @pytest.mark.parametrize("blocks", [1, 2, 3])
    def test_everything_but_order_and_heads_is_read_off(self, updown: bool, levels: tuple, blocks: int) -> None:
        attends = (2,) if len(levels) > 1 else ()
        config = UNetConfig(
            6, 3, 64, levels, blocks, attends, 2, None, 0, attention="self", scale_shift=updown,
            resblock_updown=updown and len(levels) > 1, num_classes=5,
        )  # fmt: skip
        found = certain(shapes(on_meta(lambda: UNet(config))), "it")
        assert found == {key: getattr(config, key) for key in found}
        assert len(found) == 10


    @pytest.mark.parametrize(
        ("without", "stages"),
        [(("output_blocks.3.1.",), 6), (("output_blocks.3.1.", "output_blocks.5."), 5), (("output_blocks.1.1.",), 6)],
    )
    def test_levels_of_unlike_many_blocks_are_no_such_network(self, without: tuple[str, ...], stages: int) -> None:
        """Of three levels of two: what doubles at the end of a level, and the last stage."""
        unet = on_meta(lambda: UNet(UNetConfig(3, 3, 32, (1, 1, 1), 1, (), 2, None, 0, attention="self")))
        found = {name: shape for name, shape in shapes(unet).items() if not name.startswith(without)}
        with pytest.raises(ModelError, match=f"it: its {stages} output blocks are not levels of equally many"):
            certain(found, "it")


def _told(preset: ClassPreset, found: dict) -> dict:
    return {key: getattr(preset.unet, key) for key in found}


def bare(model: ClassModel, path: Path) -> Path:
    """A file as guided-diffusion writes it: nothing but tensors."""
    torch.save(model.unet.state_dict(), path)
    return path


SAID = {"attention": "self", "head_channels": 16, "resolution": 16, "schedule": "linear"}


class TestFiles:
    @pytest.mark.parametrize("classes", [("dog", "cat", "owl"), ()])
    def test_ours_come_back(self, tmp_path: Path, classes: tuple[str, ...]) -> None:
        model = tiny_classes(classes=classes)
        models.save(model, tmp_path / "x.safetensors")
        again = models.load(tmp_path / "x.safetensors", device="cpu")
        for field in ("classes", "schedule", "resolution", "null", "factor", "prediction"):
            assert getattr(again, field) == getattr(model, field)
        assert again.unet.config == model.unet.config
        ours, theirs = model.unet.state_dict(), again.unet.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_a_public_file_of_an_unknown_size_asks_for_what_it_does_not_tell(self, tmp_path: Path) -> None:
        path = bare(tiny_classes(), tmp_path / "x.pt")
        with pytest.raises(ModelError, match=r"attention, 'self' .*num_heads, .*resolution, .*schedule, ") as caught:
            models.load(path)
        assert "factor" not in str(caught.value)
        with pytest.raises(ModelError, match=r"with resolution, [^;]*; schedule, [^;]*$"):
            models.load(path, config={"attention": "self", "num_heads": 2})
        model = models.load(path, config=SAID, device="cpu")
        assert (model.resolution, model.schedule, model.null) == (16, {"name": "linear"}, False)
        assert (model.unet.config.attention, model.unet.config.head_channels) == ("self", 16)
        assert torch.equal(model.unet.label_emb.weight, tiny_classes().unet.label_emb.weight)

    def test_a_public_file_without_classes_has_met_nothing_else(self, tmp_path: Path) -> None:
        model = models.load(bare(tiny_classes(classes=()), tmp_path / "x.pt"), config=SAID, device="cpu")
        assert model.null
        assert model.encode_text(model.tokenizer.encode([""])) == (None, None)

    def test_dtypes_that_are_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        models.save(tiny_classes(), path, dtype=torch.bfloat16)
        assert {t.dtype for t in open_tensors(path).values()} == {torch.bfloat16}
        assert models.load(path, "float64", "cpu").dtype == torch.float64
        path = tmp_path / "y.safetensors"
        models.class_file.write_classifier(named_classifier(), path, torch.bfloat16)
        assert {t.dtype for t in open_tensors(path).values()} == {torch.bfloat16}
        with pytest.raises(ModelError, match=r"which draws nothing: it is loaded by models\.load_classifier"):
            models.load(path, device="cpu")
        network = models.load_classifier(path, "float64", "cpu")
        assert {p.dtype for p in network.parameters()} == {torch.float64}

    @pytest.mark.parametrize(
        ("key", "part", "change"),
        [
            ("oneword.classes", "unet", {"channel_mult": []}),
            ("oneword.classes", "unet", {"num_res_blocks": "2"}),
            ("oneword.classes", "unet", {"out_channels": 3.5}),
            ("oneword.classifier", "descent", {"channel_mult": []}),
            ("oneword.classifier", "descent", {"num_res_blocks": "2"}),
        ],
    )
    def test_a_description_that_makes_no_network(self, tmp_path: Path, key: str, part: str, change: dict) -> None:
        path = tmp_path / "x.safetensors"
        if key == "oneword.classes":
            models.save(tiny_classes(), path)
        else:
            models.class_file.write_classifier(named_classifier(), path, None)
        said = json.loads(metadata(path)[key])
        said[part] |= change
        save_file(open_tensors(path), tmp_path / "y.safetensors", {key: json.dumps(said)})
        with pytest.raises(ModelError, match=f"y.safetensors does not describe a network of {key}"):
            (models.load if key == "oneword.classes" else models.load_classifier)(tmp_path / "y.safetensors")

    def test_an_upsampler_s_factor_is_asked_for_too(self, tmp_path: Path) -> None:
        path = bare(tiny_classes(factor=4), tmp_path / "x.pt")
        with pytest.raises(ModelError, match="with factor, how many times"):
            models.load(path, config=SAID)
        with pytest.raises(ModelError, match="factor is 0, not a whole number"):
            models.load(path, config=SAID | {"factor": 0})
        assert models.load(path, config=SAID | {"factor": 4}, device="cpu").factor == 4

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"model_channels": 32}, "config takes .* not model_channels"),
            ({"attention": "joint"}, "attention is 'joint', not 'self'"),
            ({"resolution": "16"}, "resolution is '16', not a whole number"),
            ({"resolution": 0}, "resolution is 0, not a whole number"),
            ({"schedule": "bad"}, "no schedule 'bad'"),
            ({"schedule": 5}, "schedule is 5, not 'linear'"),
            ({"num_heads": 2}, "not both"),
            ({"head_channels": "16"}, "head_channels is '16', not a whole number"),
            ({"head_channels": None, "num_heads": 2.0}, "num_heads is 2.0, not a whole number"),
        ],
    )
    def test_what_cannot_be_said(self, tmp_path: Path, more: dict, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            models.load(bare(tiny_classes(), tmp_path / "x.pt"), config=SAID | more)

    def test_what_is_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"config is \{name: value\} for .*, not \['self'\]"):
            models.load(bare(tiny_classes(), tmp_path / "x.pt"), config=["self"])
        torch.save(named_classifier().state_dict(), tmp_path / "y.pt")
        with pytest.raises(ModelError, match="is a ClassifierConfig, not {'image_size': 16}"):
            models.load_classifier(tmp_path / "y.pt", config={"image_size": 16})

    def test_what_is_published_is_not_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_classes()
        preset = ClassPreset(model.unet.config, {"name": "linear", "steps": 10}, 16)
        monkeypatch.setitem(ADM, "tiny", preset)
        again = models.load(bare(model, tmp_path / "x.pt"), device="cpu")
        assert (str(again.classes), again.null, again.schedule["steps"]) == ("0 to 2", False, 10)
        again.schedule["steps"] = 20                                    # its own: the next one is as published
        assert models.load(tmp_path / "x.pt", device="cpu").schedule["steps"] == 10
        assert models.load(tmp_path / "x.pt", device="cpu", config=SAID | {"resolution": 8}).resolution == 8
        with pytest.raises(ModelError, match=r"out\.2\.bias \(6,\) is missing"):
            models.load(_without(model, tmp_path / "y.pt", "out.2.bias"))

    def test_options_of_others_are_refused(self, tmp_path: Path) -> None:
        models.save(tiny_classes(), tmp_path / "x.safetensors")
        for option in ({"prediction": "epsilon"}, {"variant": "fp16"}):
            with pytest.raises(ModelError, match="has no use for"):
                models.load(tmp_path / "x.safetensors", **option)
        with pytest.raises(ModelError, match="describes itself: leave config out"):
            models.load(tmp_path / "x.safetensors", config=SAID)
        with pytest.raises(ModelError, match="has no use for config"):
            models.load("glide", config=SAID)

    def test_a_classifier_comes_back_with_its_names(self, tmp_path: Path) -> None:
        network = named_classifier()
        models.class_file.write_classifier(network, tmp_path / "x.safetensors", None)
        again = models.load_classifier(tmp_path / "x.safetensors", device="cpu")
        assert (again.names, again.image_size, again.config) == (network.names, 16, network.config)
        ours, theirs = network.state_dict(), again.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
        with pytest.raises(ModelError, match="describes itself: leave config out"):
            models.load_classifier(tmp_path / "x.safetensors", config=ClassifierConfig(network.config, 16))

    def test_a_bare_classifier_needs_its_numbers(self, tmp_path: Path) -> None:
        network = named_classifier()
        torch.save(network.state_dict(), tmp_path / "x.pt")
        with pytest.raises(ModelError, match=r"none of guided-diffusion's published classifiers.*config=Class"):
            models.load_classifier(tmp_path / "x.pt")
        config = ClassifierConfig(network.config, 16)
        again = models.load_classifier(tmp_path / "x.pt", device="cpu", config=config)
        assert torch.equal(again.out[2].c_proj.weight, network.out[2].c_proj.weight)

    @pytest.mark.parametrize("write", [torch.save, save_file])
    def test_one_in_the_other_s_place(self, tmp_path: Path, write: Callable) -> None:
        suffix = {torch.save: "pt", save_file: "safetensors"}[write]
        drawer, reader = tmp_path / f"model.{suffix}", tmp_path / f"classifier.{suffix}"
        write(tiny_classes().unet.state_dict(), drawer)
        write(tiny().state_dict(), reader)
        with pytest.raises(ModelError, match=r"is a classifier of guided-diffusion, which draws.*load_classifier"):
            models.load(reader)
        with pytest.raises(ModelError, match=r"is a UNet of guided-diffusion, and a classifier .*by models\.load"):
            models.load_classifier(drawer)

    def test_a_classifier_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no file .*nothing\.pt; the classifiers known by name are: .*adm-64"):
            models.load_classifier(tmp_path / "nothing.pt")

    def test_a_description_of_wrong_kinds(self, tmp_path: Path) -> None:
        model = tiny_classes()
        models.save(model, tmp_path / "x.safetensors")
        said = json.loads(metadata(tmp_path / "x.safetensors")["oneword.classes"])
        changes = {
            "null is 1": {"null": 1}, "names differ, 3 and 1": {"classes": ["dog"]},
            "has a name of its own: 1, 2, 3": {"classes": [1, 2, 3]},
            "its description: no schedule 'bad'": {"schedule": {"name": "bad"}},
            "resolution is 0": {"resolution": 0}, "factor is True": {"factor": True},
        }  # fmt: skip
        for words, change in changes.items():
            described = {"oneword.classes": json.dumps(said | change)}
            save_file(model.unet.state_dict(), tmp_path / "y.safetensors", described)
            with pytest.raises(ModelError, match=words):
                models.load(tmp_path / "y.safetensors")


def named_classifier() -> Classifier:
    network = tiny()
    return Classifier(ClassifierConfig(network.config, 16), ClassNames(tuple("abcde")))


def _without(model: ClassModel, path: Path, name: str) -> Path:
    torch.save({key: value for key, value in model.unet.state_dict().items() if key != name}, path)
    return path


def test_a_class_that_is_in_no_list() -> None:
    """The class 12 was the classes 1 and 2."""
    with pytest.raises(ModelError, match="classes are a list of names or numbers: put '12' in brackets"):
        tiny_classes().tokenizer.encode("12")
