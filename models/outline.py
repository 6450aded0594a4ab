"""A model's sizes without its weights: networks on the meta device, from configurations alone.

Nothing is downloaded, and of a file only the names and shapes are read.
"""

from pathlib import Path

from models.class_hub import FILES
from models.errors import ModelError
from models.files import SUFFIXES, as_path, open_tensors
from models.folder import outline_folder
from models.glide import GlideModel
from models.glide_file import cascade_files, of_preset, outline_glide
from models.glide_hub import CASCADES
from models.glide_tokenizer import GlideTokenizer
from models.hub import cached, is_id
from models.kinds import CLASSIFIER, GUIDED_DIFFUSION, kind_of
from models.kinds import GLIDE as GLIDE_KIND
from models.latent import LatentModel
from models.loading import EMBEDDED
from models.presets import GLIDE, PRESETS, outline_preset
from models.single_file import outline_file

# Names of published models on the hub -> their preset. SD 2.x left its first organisation in November 2025.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1.5", "runwayml/stable-diffusion-v1-5": "sd1.5",
    "CompVis/stable-diffusion-v1-4": "sd1.4",
    **{f"{owner}/stable-diffusion-2{minor}": f"sd2.{minor[1:] or 0}"
       for owner in ("sd2-community", "stabilityai") for minor in ("", "-1")},
    **{f"{owner}/stable-diffusion-2{minor}-base": f"sd2.{minor[1:] or 0}-base"
       for owner in ("sd2-community", "stabilityai") for minor in ("", "-1")},
}  # fmt: skip

OF_CLASSES = {"emoji-classes", *FILES}      # models of classes that have a name


def outline(source: str | Path, prediction: str | None = None) -> LatentModel | GlideModel:
    """The networks that `models.load` would load, on the meta device, frozen.

    source, prediction: as in `models.load`; a hub id need not have been downloaded if it is a published model's. A
    name of `presets.PRESETS`, "sd1.5" for example, will do, too. Without an upsampler. Raises ModelError as
    `models.load`, for a file of a model of classes, and for a hub id that nothing is known of here.
    """
    if source in OF_CLASSES:
        raise _reads_no_text(source, GUIDED_DIFFUSION)
    if source in EMBEDDED:
        model = outline(EMBEDDED[source], prediction)
        model.source = source
        return model
    if source in CASCADES:
        preset = GLIDE[CASCADES[source][0]]
        return of_preset(preset, GlideTokenizer.gpt2(preset.text.length), source)
    if source in PRESETS:
        return outline_preset(PRESETS[source])
    path = as_path(source)
    if path.is_dir():
        files = cascade_files(path)
        return outline_glide(files[0]) if files else outline_folder(path, prediction)
    if path.is_file() or path.suffix in SUFFIXES:
        kind = kind_of(open_tensors(path))
        if kind in (CLASSIFIER, GUIDED_DIFFUSION):
            raise _reads_no_text(path, kind)
        return outline_glide(path) if kind == GLIDE_KIND else outline_file(path, prediction)
    return _on_the_hub(str(source), prediction)


def _on_the_hub(repository: str, prediction: str | None) -> LatentModel:
    folder = cached(repository) if is_id(repository) else None
    if folder is not None:
        return outline_folder(folder, prediction)
    if repository in PUBLISHED:
        return outline_preset(PRESETS[PUBLISHED[repository]])
    known = [name for name in (*EMBEDDED, *CASCADES, *PUBLISHED) if name not in OF_CLASSES]
    raise ModelError(
        f"nothing is known here of the sizes of {repository}: there is no such file or folder, it has not been "
        f"downloaded, and it is none of {', '.join(known)}"
    )


def _reads_no_text(source: str | Path, kind: str) -> ModelError:
    return ModelError(f"{source} is {kind}: it reads no text, and so no word can be taught to it")
