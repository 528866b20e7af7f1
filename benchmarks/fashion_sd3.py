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

As benchmarks/fashion_sd21.py, on the same captioned images of Fashion-MNIST, with the same autoencoder, and measured
in the same way; but the teacher is an MMDiT of six joint blocks, trained by flow matching, and the students keep a
third of them (`--student third`), distilled with --kd_loss none, mse, lift and place at equal budget.

Open demo-sd3/index.html, or read demo-sd3/results.md. Each model is a folder that loads with
`StableDiffusion3Pipeline.from_pretrained("demo-sd3/third-place", text_encoder_3=None, tokenizer_3=None)`. Stop it
whenever you like: the same command goes on from there.
"""

import argparse

import demo
import fashion_sd21
import small_models
from fashion_sd21 import METHODS


SCRIPT = "train_lift_sd3.py"
STUDENT = "third"
# In place of the absent T5, the pipeline feeds so many zeros; few make small models quick.
LENGTH = ("--max_sequence_length", 8)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return fashion_sd21.parse_args(input_args, __doc__, "demo-sd3")


def run(args: argparse.Namespace) -> None:
    from transformers import CLIPTextModelWithProjection

    vae, clip, tokenizer, known = fashion_sd21.make_parts(args)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(clip)
    start = small_models.save_sd3_pipeline(args.output_dir / "start", vae, text_encoder, tokenizer)
    common = [*LENGTH, "--weighting_scheme", "none"]
    scratch = ["--kd_loss", "none", "--student", "whole", "--student_init", "random"]
    scratch += ["--pretrained_teacher_model", start, *common]
    runs = {"teacher": fashion_sd21.train(args, SCRIPT, "teacher", args.teacher_steps, scratch)}
    for method in METHODS:
        flags = ["--pretrained_teacher_model", runs["teacher"], "--student", STUDENT, "--kd_loss", method, *common]
        name = f"{STUDENT}-{method}"
        runs[name] = fashion_sd21.train(args, SCRIPT, name, args.student_steps, flags)
    title = "A small Stable Diffusion 3 of garments, distilled"
    fashion_sd21.measure(args, title, runs, known, drawing=("--sampler", "euler", *LENGTH))


if __name__ == "__main__":
    demo.main(parse_args(), run)
