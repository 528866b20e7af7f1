# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Fashion-MNIST (Xiao et al., 2017): find it, read it, write it as folders of images with captions."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import fail


CLASSES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TONES = ("bright", "dark")
# Every tone of every class, ordered so that any ten in a row have all ten classes.
PROMPTS = [
    f"a photo of a {TONES[(number + turn) % 2]} {name}" for turn in range(2) for number, name in enumerate(CLASSES)
]
DEBIAN = "dataset-fashion-mnist"  # the Debian package, 30 MB
INSTALLED = Path("/usr/share/datasets/fashion-mnist")


# ------------------------------------------------------------------------------------------------------------ the data


def find_fashion_mnist(cache: Path) -> Path:
    """The folder of the four gzipped files, from Debian's package.

    The package is used where it is installed. Otherwise it is downloaded and unpacked into `cache`, which needs no
    root. Ends the process if that fails.
    """
    unpacked = cache / INSTALLED.relative_to("/")
    for folder in (INSTALLED, unpacked):
        if (folder / "t10k-labels-idx1-ubyte.gz").exists():
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", DEBIAN], cwd=cache, check=True, capture_output=True)
        package = next(cache.glob(f"{DEBIAN}_*.deb"))
        subprocess.run(["dpkg", "-x", package, cache], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        fail(
            f"Fashion-MNIST is missing and apt-get cannot download it ({error}); install Debian's {DEBIAN}, or put "
            f"the four .gz files of github.com/zalandoresearch/fashion-mnist into {unpacked}"
        )
    return unpacked


def read_fashion_mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, 28, 28), and labels, uint8 (N,), of the split "train" or "t10k", from the IDX files."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{split}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    return read("images-idx3", 16).reshape(-1, 28, 28), read("labels-idx1", 8)


def caption(label: int, image: np.ndarray) -> str:
    """A caption that names the class and says whether the image, uint8 (28, 28), is dark or bright."""
    tone = TONES[0] if image[image > 32].mean() > 150 else TONES[1]
    return f"a photo of a {tone} {CLASSES[label]}"


def pad(images: np.ndarray) -> np.ndarray:
    """Centre images, uint8 (N, 28, 28), on black: uint8 (N, 32, 32)."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def write_captioned(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Write a folder of RGB PNGs of 32 pixels with captions in metadata.jsonl; returns it.

    Args:
        folder: Is made if it is missing.
        images: Grey, uint8 (N, 28, 28). They are centred on black.
        labels: (N,), from 0 to 9.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, label) in enumerate(zip(images, labels)):
        Image.fromarray(pad(pixels[None])[0]).convert("RGB").save(folder / f"{index:05d}.png")
        lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": caption(label, pixels)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def in_turn(names: list[str], order: list[str], count: int) -> np.ndarray:
    """Choose `count` images of each name so that the names follow each other as in `order`, again and again.

    Args:
        names: The name of each image.
        order: The names to choose, each once.
        count: Images of each name.

    Returns:
        Indices of images, (count * len(order),).
    """
    names_array = np.array(names)
    return np.stack([np.flatnonzero(names_array == name)[:count] for name in order], axis=1).ravel()
