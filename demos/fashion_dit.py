# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small DiT of Fashion-MNIST pixels, trained from scratch and distilled to a quarter of its depth on two CPU cores.

    python demos/fashion_dit.py --output_dir demo-dit

All models are trained by `train_lift_dit.py`. The teacher is class-conditional and has 8 blocks. The students keep the
2 blocks of largest influence and are distilled with --kd_loss none (also with --task_loss rms), mse and place at equal
budget: the same steps, batches, noise and initial weights. The scripts of eval/ generate samples with all models,
class by class, with guidance and from the same noise, measure them, and write the report.

The distances are taken in 32 features of a small classifier, which is trained here on the same images; the reference
are images of the test set. They are not Inception FIDs; do not compare them with published figures. The row "real" has
other images of the test set: no model can be expected to do better.

Open demo-dit/index.html, or read demo-dit/results.md. Each model is a folder that loads with
`DiTPipeline.from_pretrained("demo-dit/place-0")`. You can stop the demo at any time: the same command continues it.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

import demo
import fashion
import small_models


SCRIPT = "train_lift_dit.py"
METHODS = ("none", "none_rms", "mse", "place")
IMAGES = 20_000  # of the 60,000 training images of Fashion-MNIST
REFERENCE, REAL = 500, 100  # test images of each class
SIDE = 28
DEPTH = 2

# num_embeds_ada_norm stays at its default, 1000, for ten classes: DiTPipeline always uses 1000 as the null class.
TEACHER = {
    "sample_size": SIDE,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 8,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    defaults = {"teacher_steps": 1800, "student_steps": 900, "samples": 500, "inference_steps": 25}
    parser = demo.make_parser(__doc__, "demo-dit", **defaults)
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance; 1 is none")
    return demo.parse(parser, input_args)


def write_articles(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images, uint8 (N, 28, 28), as <folder>/<class>/<number>.png, unless the folder exists."""
    if folder.exists():
        return
    demo.say("images by class")
    temporary = folder.with_name(f".{folder.name}")
    for name in fashion.CLASSES:
        (temporary / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(images, labels)):
        Image.fromarray(pixels).save(temporary / fashion.CLASSES[label] / f"{number:05d}.png")
    temporary.rename(folder)


def run(args: argparse.Namespace) -> None:
    """Make the data, train the teacher and the students, measure them."""
    folder = args.output_dir
    source = fashion.find_fashion_mnist(demo.ROOT / ".data")
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    write_articles(folder / "images", images, labels)
    demo.say("classifier for the distances")
    classifier = small_models.train_classifier(folder / "classifier.pt", images, labels)
    images, labels = fashion.read_fashion_mnist(source, "t10k")
    # In alphabetical order, as the training script numbers the folders.
    order = fashion.in_turn([fashion.CLASSES[label] for label in labels], sorted(fashion.CLASSES), REFERENCE + REAL)
    reference, real = np.split(order, [REFERENCE * len(fashion.CLASSES)])
    demo.save_images(folder / "reference", images[reference])
    demo.save_images(folder / "real", images[real])

    demo.write(folder / "teacher.json", json.dumps({"config": TEACHER}, indent=2))
    common = ["--vae", "none", "--no-random_flip", "--learning_rate", 1e-3, "--adam_beta2", 0.99]
    common += ["--guidance_scale", args.guidance_scale]
    # With velocity prediction garments are recognisable after fewer training steps than with noise prediction.
    scratch = ["--kd_loss", "none", "--student", folder / "teacher.json", "--prediction_type", "v_prediction"]
    train = partial(demo.train, args, SCRIPT)
    runs = {"teacher": train("teacher", args.teacher_steps, [*scratch, *common])}
    flags = ["--student_depth", DEPTH, *common]
    runs |= demo.train_students(args, train, "", METHODS, runs["teacher"], flags)

    facts = {
        "students": f"{DEPTH} of the teacher's {TEACHER['num_layers']} blocks, by `--student_depth {DEPTH}`; "
        f"{args.seeds} seed(s); {demo.NAMES}",
        "parameters": "97 k in each block belong to its table of 1,000 labels, of which ten are used",
        "real": f"{REAL} test images of each class; the classifier recognises "
        f"{small_models.accuracy(classifier, images[real], labels[real]):.1%} of them",
    }
    demo.measure(
        args,
        "A DiT of garments, distilled",
        runs,
        [folder / "real"],
        folder / "reference",
        facts,
        sampling_flags=("--sampler", "ddim", "--guidance_scale", args.guidance_scale),
        report_flags=("--columns", len(fashion.CLASSES), "--group_size", 16),
    )


if __name__ == "__main__":
    demo.main(parse_args(), run)
