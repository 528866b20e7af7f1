# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The networks that turn images into features, and images with their prompts into scores.

Inception is clean-fid's. DINOv2, and the CLIP models of CMMD, of the CLIP score and of PickScore, are read by
transformers, from a folder or from the Hub.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoints import hash_file
from common.errors import fail, first_line
from common.loading import read_weights

import cleanfid.downloads_helper
import numpy as np
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import make_resizer
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from result_tables import INCEPTION_NAME


INCEPTION = "inception-2015-12-05.pt"  # the file that clean-fid loads
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the one that its authors' example loads beside it
# Models of transformers by the flags that name them: the class, and the `model_type` of its configs.
MODELS = {
    "dinov2_model": (Dinov2Model, "dinov2"),
    **dict.fromkeys(("cmmd_model", "clip_model", "pickscore_model"), (CLIPModel, "clip")),
}
INCEPTION_SIDE = 299  # pixels
DINOV2_SIDE = 224  # in dgm-eval

# What makes an image ready for a network: RGB -> (3, height, width).
Prepare = Callable[[Image.Image], torch.Tensor]


class Extractor(NamedTuple):
    """A network that turns images into features."""

    name: str  # shown in reports
    digest: str  # SHA-256 of its file or of its weights
    size: int | None  # the side of its images; `None`: they keep theirs
    resizing: str  # by which protocol; statistics of another one are not used
    prepare: Prepare  # gives float32 or uint8 in [0, 255]; workers get it, so it can be pickled
    # float32 (N, 3, H, W) in [0, 255], whether logits are asked for -> features (N, D), logits (N, classes)
    run: Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor | None]]


class Scorer(NamedTuple):
    """A CLIP model that scores images by their prompts."""

    name: str  # shown in reports
    digest: str  # SHA-256 of its weights
    prepare: Prepare
    # pixels (N, 3, H, W) of `prepare`, N prompts -> scores, float32 (N,)
    run: Callable[[torch.Tensor, list[str]], torch.Tensor]


# --------------------------------------------------------------------------------------------- how images are prepared


def keep_size(image: Image.Image) -> torch.Tensor:
    """The image as it is, uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_clean(image: Image.Image, side: int) -> torch.Tensor:
    """Both sides resized as by clean-fid, in floating point, float32 (3, side, side)."""
    resize = make_resizer("PIL", False, "bicubic", (side, side))  # made here: it cannot be sent to worker processes
    return torch.from_numpy(resize(np.array(image))).permute(2, 0, 1)


def squeeze(image: Image.Image, side: int) -> torch.Tensor:
    """Both sides resized as by dgm-eval, which does not keep their ratio: bicubic in 8 bits, uint8 (3, side, side)."""
    return keep_size(image.resize((side, side), Image.Resampling.BICUBIC))


def crop_square(image: Image.Image, side: int) -> torch.Tensor:
    """The largest square at the centre, resized as by CMMD's code: bicubic in 8 bits, uint8 (3, side, side)."""
    short = min(image.size)
    left, top = ((length - short) // 2 for length in image.size)
    return squeeze(image.crop((left, top, left + short, top + short)), side)


def process(image: Image.Image, processor: CLIPImageProcessor) -> torch.Tensor:
    """What transformers makes of an image for its model, float32 (3, side, side)."""
    return processor(images=image, return_tensors="pt").pixel_values[0]


def normalise(images: torch.Tensor, mean: list[float], deviation: list[float]) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 255], as a network wants them that was trained with this mean and deviation."""
    mean, deviation = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (mean, deviation))
    return (images / 255 - mean) / deviation


# ------------------------------------------------------------------------------- Inception, or the file of --features


def load_torchscript_features(path: Path, side: int | None, device: torch.device) -> Extractor:
    """Load the TorchScript file of `--features`, whose images are resized to `side`, or keep their size.

    Ends the process unless it gives features (N, D).
    """
    model = load_torchscript("--features", path, device)

    def run(images: torch.Tensor, with_logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        try:
            output = model(images)
        except RuntimeError as error:
            problem = f"does not accept images of shape {tuple(images.shape[1:])}"
            fail(f"--features {path} {problem}: {str(error).strip().splitlines()[-1]}; pass --features_size")
        features, logits = output if isinstance(output, tuple) else (output, None)
        for tensor in (features, logits):
            if tensor is not None and (tensor.ndim != 2 or len(tensor) != len(images)):
                shape = tuple(tensor.shape)
                fail(f"--features {path} returns {shape} for {len(images)} images; return (N, D)")
        return features, logits if with_logits else None

    name = f"{path.name} at {side} px" if side else path.name
    prepare = partial(resize_clean, side=side) if side else keep_size
    return Extractor(name, hash_file(path), side, "clean", prepare, run)


def load_inception(path: Path | None, device: torch.device) -> Extractor:
    """Load the Inception of clean-fid, for features and for logits. The file is downloaded once."""
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    path = path / INCEPTION if path.is_dir() else path
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # clean-fid does not notice half a file
                shutil.move(cleanfid.downloads_helper.check_download_inception(folder), path)
        except OSError as error:
            url = cleanfid.downloads_helper.inception_url
            fail(f"--inception {path} is missing and not downloaded ({error}); put {url} there, or pass --features")
    base = load_torchscript("--inception", path, device)
    if path.name != INCEPTION:
        fail(f"--inception {path} must have the name {INCEPTION}, which clean-fid loads; rename it")
    features = InceptionV3W(str(path.parent), download=False).to(device).eval()

    def run(images: torch.Tensor, with_logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The network returns probabilities, by another pass. Their logarithms serve as logits: softmax turns them
        # back. The last layer has no bias, as in the published Inception score.
        return features(images), base(images, no_output_bias=True).log() if with_logits else None

    prepare = partial(resize_clean, side=INCEPTION_SIDE)
    return Extractor(INCEPTION_NAME, hash_file(path), INCEPTION_SIDE, "clean", prepare, run)


def load_torchscript(flag: str, path: Path, device: torch.device) -> torch.jit.ScriptModule:
    """Load a TorchScript file. Ends the process with the flag's name if that fails."""
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        fail(f"{flag} {path} does not load: {first_line(error)}; pass a file of torch.jit.save")


# ------------------------------------------------------------------------------------ DINOv2 and CLIP, by transformers


def check_kind(name: str, source: str) -> None:
    """End the process with the flag's name unless the config, which is read alone, is of that flag's kind of model.

    transformers would fill another kind of model with random weights, and only warn.

    Args:
        name: A flag of [`MODELS`].
        source: Its value, a folder or a Hub id.
    """
    model_class, kind = MODELS[name]
    remedy = f"pass a folder or Hub id of a {model_class.__name__}"
    try:
        given = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"--{name} {source} does not load: {first_line(error)}; {remedy}")
    if given != kind:
        fail(f"--{name} {source} is a model of type {given}; {remedy}")


def load_model(name: str, source: str, device: torch.device) -> Any:
    """Load a model of transformers, in float32. Ends the process with the flag's name unless it is complete.

    Args:
        name: A flag of [`MODELS`].
        source: Its value, a folder or a Hub id.
        device: Gets the model.
    """
    check_kind(name, source)
    model_class, _ = MODELS[name]
    remedy = f"pass a folder or Hub id of a {model_class.__name__}"
    try:
        model, report = read_weights(model_class.from_pretrained, source, output_loading_info=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        fail(f"--{name} {source} does not load: {first_line(error)}; {remedy}")
    if report["missing_keys"]:
        fail(f"--{name} {source} lacks the weights {min(report['missing_keys'])} and maybe more; {remedy}")
    return model.float().to(device).eval()


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of the names and values of a model's weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_dinov2(source: str, device: torch.device) -> Extractor:
    """Load a DINOv2 as dgm-eval uses it (Stein et al. 2023, arXiv 2306.04675): the normalised class token, (N, D)."""
    model = load_model("dinov2_model", source, device)
    digest = hash_weights(model)
    resize_positions(model, DINOV2_SIDE // model.config.patch_size)

    def run(images: torch.Tensor, with_logits: bool) -> tuple[torch.Tensor, None]:
        pixels = normalise(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return model(pixel_values=pixels).pooler_output, None

    prepare = partial(squeeze, side=DINOV2_SIDE)
    return Extractor(f"DINOv2 ({source})", digest, DINOV2_SIDE, "dgm-eval", prepare, run)


def resize_positions(model: Dinov2Model, side: int) -> None:
    """Fit the position embeddings to `side` x `side` patches, as the code does that DINOv2's authors published.

    It gives `interpolate` a scale for 0.1 patches more than there are, which moves the points where it samples.
    transformers gives it the size itself. The features differ, so published distances ask for the authors' way.
    """
    positions = model.embeddings.position_embeddings.data
    given = round((positions.shape[1] - 1) ** 0.5)
    if given == side:
        return
    grid = positions[:, 1:].unflatten(1, (given, given)).permute(0, 3, 1, 2)
    scale = (side + 0.1) / given
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
    model.embeddings.position_embeddings = torch.nn.Parameter(torch.cat([positions[:, :1], patches], dim=1))


def load_clip_images(source: str, device: torch.device) -> Extractor:
    """Load a CLIP as CMMD uses it (Jayasumana et al., arXiv 2401.09603): image embeddings of length 1, (N, D)."""
    model = load_model("cmmd_model", source, device)
    side = model.config.vision_config.image_size

    def run(images: torch.Tensor, with_logits: bool) -> tuple[torch.Tensor, None]:
        pixels = normalise(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        return torch.nn.functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output), None

    return Extractor(f"CLIP ({source})", hash_weights(model), side, "cmmd", partial(crop_square, side=side), run)


def load_processors(name: str, source: str, processor_source: str) -> tuple[CLIPTokenizer, CLIPImageProcessor]:
    """Load what makes a prompt and an image ready for [`load_scorer`], which see."""
    try:
        return CLIPTokenizer.from_pretrained(processor_source), CLIPImageProcessor.from_pretrained(processor_source)
    except (OSError, ValueError, TypeError) as error:
        remedy = "pass a folder or Hub id with the tokenizer and the image processor"
        fail(f"--{name} {source}: {processor_source} does not load: {first_line(error)}; {remedy}")


def load_scorer(name: str, source: str, processor_source: str, device: torch.device) -> Scorer:
    """Load a CLIP for scores of images by their prompts: the cosine of the two embeddings.

    Args:
        name: "clip_model", or "pickscore_model", where the cosine is multiplied by the model's own scale (PickScore,
            arXiv 2305.01569).
        source: Its value, a folder or a Hub id.
        processor_source: Folder or Hub id of the tokenizer and the image processor.
        device: Gets the model.
    """
    model = load_model(name, source, device)
    tokenizer, processor = load_processors(name, source, processor_source)
    limit = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    scaled = name == "pickscore_model"
    scale = model.logit_scale.exp() if scaled else 1.0

    def run(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        image_embeddings = model.get_image_features(pixel_values=pixels).pooler_output
        text_embeddings = model.get_text_features(**tokens).pooler_output
        return scale * torch.cosine_similarity(image_embeddings, text_embeddings)

    title = f"{'PickScore' if scaled else 'CLIP'} ({source})"
    return Scorer(title, hash_weights(model), partial(process, processor=processor), run)
