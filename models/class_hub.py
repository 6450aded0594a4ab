"""OpenAI's guided-diffusion files by their names, fetched once, and the embedded classifiers.

A file counts as fetched only when all of its bytes have come, and is only used if every tensor has the name and shape
of the network that it should be; what is refused is named, to be removed.
"""

from pathlib import Path

import torch

from models.class_file import read_class_model, read_classifier
from models.class_model import ClassModel
from models.classifier import Classifier, ClassifierConfig
from models.devices import choose_device
from models.errors import ModelError
from models.fetching import cache, fetch, to_be_removed
from models.files import as_path
from models.presets import ADM, ADM_CLASSIFIERS, ADM_UPSAMPLERS
from models.weights import choose_dtype

ADDRESS = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021"
FILES = {
    "adm-64": "64x64_diffusion", "adm-128": "128x128_diffusion", "adm-256": "256x256_diffusion",
    "adm-256-uncond": "256x256_diffusion_uncond", "adm-512": "512x512_diffusion",
    "adm-64-256": "64_256_upsampler", "adm-128-512": "128_512_upsampler",
}  # fmt: skip
CLASSIFIERS = {f"adm-{size}": f"{size}x{size}_classifier" for size in ADM_CLASSIFIERS}
DATA = Path(__file__).parent / "data" / "emoji_classes"
EMBEDDED = {"emoji-classes": DATA / "classifier.safetensors", "emoji-classes-judge": DATA / "judge.safetensors"}


def load_published(name: str, dtype: torch.dtype | str | None, device: torch.device) -> ClassModel:
    """A model of `FILES`; arguments as in `models.load`.

    Raises ModelError if its file is neither in the cache nor can be fetched, or is not what it should be.
    """
    preset = (ADM | ADM_UPSAMPLERS)[name.removeprefix("adm-")]
    path = _fetched(FILES[name])
    with to_be_removed(path):
        model = read_class_model(path, dtype, device, preset=preset)
    model.source = name
    return model


def load_classifier(
    source: str | Path, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None,
    *, config: ClassifierConfig | None = None,
) -> Classifier:  # fmt: skip
    """A classifier of noisy images, frozen, for `guidance.classifier`.

    source: "emoji-classes", which reads noise, or "emoji-classes-judge", which reads clean images: they come with the
    project; "adm-64", "adm-128", "adm-256" or "adm-512", fetched once from OpenAI; or a file of guided-diffusion or of
    train_classifier.py. dtype, device: as in `models.load`. config: its numbers, for a file in guided-diffusion's form
    of sizes that were not published, whose tensors do not tell them all.

    Raises ModelError for what is not there or does not fit.
    """
    device = choose_device(device)
    choose_dtype(dtype, torch.float32, device)          # refused before anything is fetched
    if source not in CLASSIFIERS:
        if not (path := EMBEDDED.get(source, as_path(source))).is_file():
            known = ", ".join((*EMBEDDED, *CLASSIFIERS))
            raise ModelError(f"there is no file {source}; the classifiers known by name are: {known}")
        return read_classifier(path, dtype, device, config)
    path, config = _fetched(CLASSIFIERS[source]), ADM_CLASSIFIERS[source.removeprefix("adm-")]
    with to_be_removed(path):
        return read_classifier(path, dtype, device, config)


def _fetched(file: str) -> Path:
    return fetch(f"{ADDRESS}/{file}.pt", cache("guided-diffusion") / f"{file}.pt")
