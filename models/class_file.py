"""Files of models of classes and of classifiers: guided-diffusion's, and ours in the same names.

The published files say nothing but their tensors, and their sizes tell which one it is. What is trained here is written
as .safetensors with its numbers and the names of its classes in the metadata, and read back from there.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.class_model import ClassModel
from models.class_names import ClassNames
from models.class_shapes import certain, completed
from models.classifier import Classifier, ClassifierConfig
from models.configs import require_schedule
from models.described import described, require, unet_config, write_described
from models.errors import ModelError
from models.files import Weights
from models.kinds import CLASSIFIER, GUIDED_DIFFUSION, kind_of
from models.presets import ADM, ADM_CLASSIFIERS, ADM_UPSAMPLERS, ClassPreset
from models.renaming import Layout
from models.shapes import Shapes
from models.unet import UNet, UNetConfig
from models.weights import Part, fill, gather, on_meta

MODEL_KEY, CLASSIFIER_KEY = "oneword.classes", "oneword.classifier"
Form = tuple[ClassPreset, ClassNames, bool]      # numbers, names of the classes, whether it met ∅ in training


def read_class_model(
    path: Path, dtype: torch.dtype | str | None, device: torch.device, config: Mapping[str, Any] | None = None,
    preset: ClassPreset | None = None,
) -> ClassModel:  # fmt: skip
    """Load a file; arguments as in `models.load`. preset: what the file has to be, if that is known.

    Raises ModelError for all that does not fit.
    """
    weights = Weights((path,))
    shapes = weights.shapes()
    if (kind := kind_of(shapes)) != GUIDED_DIFFUSION:
        raise ModelError(f"{path} is {kind}, and {GUIDED_DIFFUSION} is needed")
    if preset:
        model = _outline(_published(preset), path)
    else:
        model = described(path, MODEL_KEY, lambda said: _outline(_understood(said), path))
    if model and config:
        raise ModelError(f"{path} is a file that describes itself: leave config out")
    model = model or _outline(_recognised(shapes, config, str(path)), path)
    fill([Part(model.unet, Layout())], weights, dtype, device)
    return model


def write_class_model(model: ClassModel, path: Path, dtype: torch.dtype | None) -> None:
    """Write a model, without its upsampler, as .safetensors; another of this kind at `path` is replaced.

    Raises ModelError for a path that is taken by anything else.
    """
    said = {
        "unet": asdict(model.unet.config), "schedule": model.schedule, "resolution": model.resolution,
        "factor": model.factor, "null": model.null, "classes": model.classes.names,
    }  # fmt: skip
    write_described(path, MODEL_KEY, said, gather(Part(model.unet, Layout()), dtype))


def read_classifier(
    path: Path, dtype: torch.dtype | str | None, device: torch.device, config: ClassifierConfig | None = None
) -> Classifier:
    """Load a file; arguments as in `models.load_classifier`. Raises ModelError for all that does not fit."""
    weights = Weights((path,))
    shapes = weights.shapes()
    if (kind := kind_of(shapes)) != CLASSIFIER:
        raise ModelError(f"{path} is {kind}, and {CLASSIFIER} is needed: what draws is loaded by models.load")
    if config is not None and not isinstance(config, ClassifierConfig):
        raise ModelError(f"the config of a classifier is a ClassifierConfig, not {config!r}")
    network = described(path, CLASSIFIER_KEY, _understood_classifier)
    if network and config:
        raise ModelError(f"{path} is a file that describes itself: leave config out")
    network = network or on_meta(lambda: Classifier(config or _published_classifier(shapes, path)))
    fill([Part(network, Layout())], weights, dtype, device)
    return network


def write_classifier(network: Classifier, path: Path, dtype: torch.dtype | None) -> None:
    """Write a classifier as .safetensors; another at `path` is replaced. Raises ModelError as `write_described`."""
    said = {"descent": asdict(network.config), "image_size": network.image_size, "classes": network.names.names}
    write_described(path, CLASSIFIER_KEY, said, gather(Part(network, Layout()), dtype))


def _outline(form: Form, path: Path) -> ClassModel:
    """A model on the meta device."""
    preset, classes, null = form
    return ClassModel(
        unet=on_meta(lambda: UNet(preset.unet)), classes=classes, schedule=dict(preset.schedule),
        resolution=preset.resolution, source=str(path), null=null, factor=preset.factor,
    )  # fmt: skip


def _published(preset: ClassPreset) -> Form:
    classes = ClassNames.numbered(preset.unet.num_classes or 0)
    return preset, classes, not len(classes)


def _recognised(shapes: dict[str, tuple[int, ...]], config: Mapping[str, Any] | None, where: str) -> Form:
    """A file without a description: one of the published, or another, of which the caller says the rest."""
    found = certain(shapes, where)
    for preset in (ADM | ADM_UPSAMPLERS).values():
        if not config and found == {key: getattr(preset.unet, key) for key in found}:
            return _published(preset)
    said = completed(found, config, where)
    heads = {key: said[key] for key in ("attention", "num_heads", "head_channels")}
    require_schedule(said["schedule"].get("name"), where)
    unet = UNetConfig(**found, **heads)
    return _published(ClassPreset(unet, said["schedule"], said["resolution"], said["factor"]))


def _published_classifier(shapes: dict[str, tuple[int, ...]], path: Path) -> ClassifierConfig:
    """The published classifier with as many blocks and as wide; its tensors are compared when they are taken."""
    s = Shapes(shapes, "", str(path))
    found = s.count(r"input_blocks\.(\d+)\."), s.of("input_blocks.0.0.weight", 4)[0]
    for config in ADM_CLASSIFIERS.values():
        levels = config.descent.channels
        if found == ((config.descent.num_res_blocks + 1) * len(levels), levels[0]):
            return config
    raise ModelError(
        f"{path} is none of guided-diffusion's published classifiers, and its tensors do not tell all of it: give "
        f"config=ClassifierConfig(...)"
    )


def _understood(said: dict[str, Any]) -> Form:
    """The model that `write_class_model` described."""
    require(said, {"factor": int, "resolution": int, "null": bool, "schedule": dict, "classes": list})
    require_schedule(said["schedule"].get("name"), "its description")
    preset = ClassPreset(unet_config(said["unet"]), said["schedule"], said["resolution"], said["factor"])
    return preset, ClassNames(tuple(said["classes"])), said["null"]


def _understood_classifier(said: dict[str, Any]) -> Classifier:
    """The classifier that `write_classifier` described, on the meta device."""
    require(said, {"image_size": int, "classes": list})
    config, names = ClassifierConfig(unet_config(said["descent"]), said["image_size"]), tuple(said["classes"])
    return on_meta(lambda: Classifier(config, ClassNames(names)))
