# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small Stable Diffusion 3 of garments, from nothing, and its students by `train_lift_sd3.py`, on two CPU cores.

    python benchmarks/fashion_sd3.py --output_dir demo-sd3

As benchmarks/fashion_sd21.py, on the same captioned images of Fashion-MNIST, with the same autoencoder, and scored in
the same way; but the teacher is an MMDiT of six joint blocks, trained by flow matching, and the students keep a third
of them (`--student third`), distilled with --kd_loss none, mse, lift and place at equal budget.

Read demo-sd3/results.md, then look at samples.png and curves.png beside it. Each model is a folder that loads with
`StableDiffusion3Pipeline.from_pretrained("demo-sd3/third-place", text_encoder_3=None, tokenizer_3=None)`. Stop it
whenever you like: the same command goes on from there.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fashion
import fashion_sd21
import lift_utils
from extreme_compression import keep_settings
from fashion_sd21 import METHODS


SCRIPT = Path(lift_utils.__file__).with_name("train_lift_sd3.py")
STUDENT = "third"
# In place of the absent T5, the pipeline feeds so many zeros; few make small models quick.
ZEROS = 8
FLAGS = ["--max_sequence_length", ZEROS, "--weighting_scheme", "none"]


def run(args: argparse.Namespace) -> None:
    keep_settings(args)
    data, test = fashion_sd21.read_data(args)
    parts = fashion_sd21.make_parts(args, *data, projection=True)
    start = fashion.save_sd3_pipeline(args.output_dir / "start", *parts)
    scratch = ["--kd_loss", "none", "--student", "whole", "--student_init", "random", *FLAGS]
    scratch += ["--pretrained_teacher_model", start]
    folders = {"teacher": fashion_sd21.train(args, SCRIPT, "teacher", args.teacher_steps, scratch)}
    for method in METHODS:
        flags = ["--pretrained_teacher_model", folders["teacher"], "--student", STUDENT, "--kd_loss", method, *FLAGS]
        name = f"{STUDENT}-{method}"
        folders[name] = fashion_sd21.train(args, SCRIPT, name, args.student_steps, flags)
    title = "A small Stable Diffusion 3 of garments, distilled"
    fashion_sd21.report(args, title, folders, data, test, max_sequence_length=ZEROS)


if __name__ == "__main__":
    fashion_sd21.main(fashion_sd21.parse_args(description=__doc__, output_dir="demo-sd3"), run)
