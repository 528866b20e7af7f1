# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small Stable Diffusion 3 of garments, trained from scratch and distilled by `train_lift_sd3.py` on two cores.

    python demos/fashion_sd3.py --output_dir demo-sd3

The captioned images, the autoencoder and the way to measure are those of demos/fashion_sd21.py. The teacher is an
MMDiT of six joint blocks, trained by flow matching. The students keep a third of the blocks (`--student third`) and
are distilled with --kd_loss none (also with --task_loss rms), mse, lift and place at equal budget.

Open demo-sd3/index.html, or read demo-sd3/results.md. Each model is a folder that loads with
`StableDiffusion3Pipeline.from_pretrained("demo-sd3/third-place-0", text_encoder_3=None, tokenizer_3=None)`. You can
stop the demo at any time: the same command continues it.
"""

import argparse

import demo
import fashion_sd21
import small_models


SCRIPT = "train_lift_sd3.py"
STUDENTS = ("third",)
# There is no T5; the pipeline passes this many zeros in its place. Few of them make a small model fast.
LENGTH = ("--max_sequence_length", 8)


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return fashion_sd21.parse_args(input_args, __doc__, "demo-sd3")


def run(args: argparse.Namespace) -> None:
    """Make the data and the parts, train the teacher and the students, measure them."""
    from transformers import CLIPTextModelWithProjection

    vae, clip, tokenizer, accuracy = fashion_sd21.make_parts(args)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(clip)
    start = small_models.save_sd3_pipeline(args.output_dir / "start", vae, text_encoder, tokenizer)
    runs = fashion_sd21.distil(args, SCRIPT, start, STUDENTS, (*LENGTH, "--weighting_scheme", "none"))
    title = "A small Stable Diffusion 3 of garments, distilled"
    fashion_sd21.measure(args, title, runs, accuracy, ("--sampler", "euler", *LENGTH))


if __name__ == "__main__":
    demo.main(parse_args(), run)
