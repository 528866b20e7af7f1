# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How does an image file become pixels, upright, of the size and on the side that a step asks for?"""

import io
from typing import Any

import torch
from diffusers.training_utils import find_nearest_bucket
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional


TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))  # that make an EXIF orientation upright


def open_image(record: dict[str, Any], mode: str) -> Image.Image:
    """A PIL image of the mode, upright, from an undecoded record of `datasets`.

    16-bit images keep their range. What is transparent is white, as on a page.

    Raises:
        ValueError: Its pixels are floating-point numbers, which do not say what is white.
    """
    image = Image.open(io.BytesIO(record["bytes"]) if record["bytes"] else record["path"])
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:  # ImageOps.exif_transpose writes all tags anew as well, and fails at one that is malformed
        image = image.transpose(turn)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # convert() would clip these at 255
        image = image.convert("F").point(lambda value: value / 257)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def choose_size(height: int, width: int, size: int | list[tuple[int, int]]) -> tuple[int, int]:
    """Height and width to which an image of this height and width is brought; see [`load_pixels`]."""
    return (size, size) if isinstance(size, int) else size[find_nearest_bucket(height, width, size)]


def load_pixels(records: list[dict[str, Any]], mode: str, size: int | list[tuple[int, int]]) -> list[torch.Tensor]:
    """Decode undecoded records, resize them to cover their size and crop the centre: uint8 tensors (channels, H, W).

    Args:
        size: The side of a square, or buckets (H, W), of which each image takes the nearest by aspect ratio.
    """
    images = [open_image(record, mode) for record in records]
    return [functional.pil_to_tensor(fit_image(image, size)) for image in images]


def fit_image(
    image: Image.Image, size: int | list[tuple[int, int]], filter: InterpolationMode = InterpolationMode.LANCZOS
) -> Image.Image:
    """An image resized to cover its size, the centre cropped; the size is that of [`load_pixels`]."""
    chosen = choose_size(image.height, image.width, size)
    covering = covering_size(image.height, image.width, chosen)
    return functional.center_crop(functional.resize(image, covering, filter), chosen)


def covering_size(height: int, width: int, chosen: tuple[int, int]) -> tuple[int, int]:
    """Height and width to which an image is resized before it is cropped to the chosen ones."""
    if width * chosen[0] > height * chosen[1]:  # wider than these: the height is fitted
        return chosen[0], int(chosen[0] * width / height)
    return int(chosen[1] * height / width), chosen[1]


def flip_views(images: torch.Tensor, both: bool) -> list[torch.Tensor]:
    """The images (B, C, H, W), and where `both` their horizontal flips: what a cache encodes for `--random_flip`."""
    return [images, images.flip(-1)] if both else [images]


def random_flips(count: int, enabled: bool, device: torch.device) -> torch.Tensor:
    """Which of a batch's images are flipped, bool (B,). The draw is made either way: later draws do not shift."""
    flips = torch.rand(count, device=device) < 0.5
    return flips if enabled else torch.zeros_like(flips)


def flip_rows(images: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W), flipped horizontally where `flips` (B,) says so."""
    return torch.where(flips[:, None, None, None], images.flip(-1), images)
