# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small DiT of Fashion-MNIST pixels, trained and distilled to a quarter of its depth with `train_lift_dit.py`.

    python benchmarks/fashion_dit.py --output_dir demo-dit

Trains a class-conditional teacher of 8 blocks, then students of the 2 blocks of largest influence with --kd_loss none,
mse and place at equal budget (steps, batches, noise, initial weights). The scripts of eval/ draw samples of all models
with guidance, class by class and from the same noise, measure them and write the report.

The distances are taken in 32 features of a small classifier trained here on the same articles, to articles of the test
set. They are no Inception FID and compare with no published figure; other articles of the test set ("real") give their
floor.

Open demo-dit/index.html, or read demo-dit/results.md. Each model is a folder that loads with
`DiTPipeline.from_pretrained("demo-dit/place")`. Stop it whenever you like: the same command goes on from there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import demo
import fashion
import small_models


SCRIPT = "train_lift_dit.py"
METHODS = ("none", "mse", "place")
IMAGES = 20_000  # of the 60,000 that Fashion-MNIST has to train on
REFERENCE, REAL = 500, 100  # test images of each class
SIDE = 28
DEPTH = 2

# num_embeds_ada_norm stays at 1000, although there are ten classes: DiTPipeline takes class 1000 for the null class.
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
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance")
    return demo.parse(parser, input_args, most_samples=50_000)


def write_articles(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The images as <folder>/<class>/<number>.png."""
    if folder.exists():
        return
    demo.say("the articles as images")
    temporary = folder.with_name(f".{folder.name}")
    for name in fashion.CLASSES:
        (temporary / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(images, labels)):
        Image.fromarray(pixels).save(temporary / fashion.CLASSES[label] / f"{number:05d}.png")
    temporary.rename(folder)


def run(args: argparse.Namespace) -> None:
    folder = args.output_dir
    source = fashion.find_fashion_mnist(demo.ROOT / ".data")
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    write_articles(folder / "images", images, labels)
    demo.say("the classifier in whose features images are compared, unless it is there")
    classifier = small_models.train_classifier(folder / "classifier.pt", images, labels)
    images, labels = fashion.read_fashion_mnist(source, "t10k")
    # In the order of the alphabet, as the script numbers the folders.
    order = fashion.in_turn([fashion.CLASSES[label] for label in labels], sorted(fashion.CLASSES), REFERENCE + REAL)
    reference, real = np.split(order, [REFERENCE * len(fashion.CLASSES)])
    demo.save_images(folder / "reference", images[reference])
    demo.save_images(folder / "real", images[real])

    demo.write(folder / "teacher.json", json.dumps({"config": TEACHER}, indent=2))
    common = ["--vae", "none", "--no-random_flip", "--learning_rate", 1e-3, "--adam_beta2", 0.99]
    common += ["--guidance_scale", args.guidance_scale]
    # Of the velocity rather than the noise: articles come out whole after fewer steps.
    scratch = ["--kd_loss", "none", "--student", folder / "teacher.json", "--prediction_type", "v_prediction"]
    runs = {"teacher": demo.train(args, SCRIPT, "teacher", args.teacher_steps, [*scratch, *common])}
    for method in METHODS:
        flags = ["--pretrained_teacher_model", runs["teacher"], "--kd_loss", method, "--student_depth", DEPTH]
        runs[method] = demo.train(args, SCRIPT, method, args.student_steps, [*flags, *common])

    facts = {
        "students": f"{DEPTH} of the teacher's {TEACHER['num_layers']} blocks, by `--student_depth {DEPTH}`; "
        "`--kd_loss none`, `mse` and `place`, one seed",
        "parameters": "of which the tables of 1,000 labels, ten of them in use, are 97 k in each block",
        "real": f"{REAL} test images of each class, of which the classifier knows "
        f"{small_models.accuracy(classifier, images[real], labels[real]):.1%}",
    }
    drawing = ("--sampler", "ddim", "--guidance_scale", args.guidance_scale)
    reporting = ("--columns", len(fashion.CLASSES), "--group_size", 16)
    title = "A DiT of garments, distilled"
    demo.measure(args, title, runs, [folder / "real"], folder / "reference", facts, drawing, reporting=reporting)


if __name__ == "__main__":
    demo.main(parse_args(), run)
