# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small Stable Diffusion XL of garments, trained from scratch and distilled by `train_lift_sdxl.py` on two cores.

    python demos/fashion_sdxl.py --output_dir demo-sdxl

The captioned images, the autoencoder and the way to measure are those of demos/fashion_sd21.py. The teacher is a
U-Net in Stable Diffusion XL's layout, with transformers of six blocks in its inner level. It takes the embeddings of
the CLIP twice, as those of two text encoders. The students koala_700m and extreme are distilled with --kd_loss none
(also with --task_loss rms), mse, lift and place at equal budget.

Open demo-sdxl/index.html, or read demo-sdxl/results.md. Each model is a folder that loads with
`StableDiffusionXLPipeline.from_pretrained("demo-sdxl/extreme-place-0")`. You can stop the demo at any time: the same
command continues it.
"""

import argparse

import demo
import fashion_sd21
import small_models


SCRIPT = "train_lift_sdxl.py"
STUDENTS = ("koala_700m", "extreme")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return fashion_sd21.parse_args(input_args, __doc__, "demo-sdxl")


def run(args: argparse.Namespace) -> None:
    """Make the data and the parts, train the teacher and the students, measure them."""
    vae, clip, tokenizer, accuracy = fashion_sd21.make_parts(args)
    start = small_models.save_sdxl_pipeline(args.output_dir / "start", vae, clip, tokenizer)
    runs = fashion_sd21.distil(args, SCRIPT, start, STUDENTS)
    title = "A small Stable Diffusion XL of garments, distilled"
    fashion_sd21.measure(args, title, runs, accuracy, ("--sampler", "ddim"))


if __name__ == "__main__":
    demo.main(parse_args(), run)
