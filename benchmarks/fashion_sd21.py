# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small Stable Diffusion of garments, from nothing, and its students by `train_lift_sd21.py`, on two CPU cores.

    python benchmarks/fashion_sd21.py --output_dir demo-sd21

In turn, all on 10,000 captioned images of Fashion-MNIST (32 pixels; Debian's package, fetched if it is not installed):

1. a small autoencoder (latents of 4 x 8 x 8) and a small CLIP, whose text encoder the pipeline takes;
2. the teacher: a random U-Net in Stable Diffusion's layout, trained by the script itself with --kd_loss none
   --student whole --student_init random, on cached latents;
3. the students bk_tiny and bk_extreme, each distilled with --kd_loss none, mse, lift and place at equal budget (steps,
   batches, noise, initial weights from the teacher);
4. samples of every model by prompt, from the same noise, figures and the report, all by the scripts of eval/.

The distances are taken in 32 features of a small classifier trained here on the same images, to images of the test
set. They are no Inception FID and compare with no published figure. Other images of the test set ("real"), and these
after the autoencoder ("decoded"), give their floor. The CLIP score is by the small CLIP.

Open demo-sd21/index.html, or read demo-sd21/results.md. Each model is a folder that loads with
`StableDiffusionPipeline.from_pretrained("demo-sd21/bk_tiny-place")`. Stop it whenever you like: the same command goes
on from there. With more time, in a new folder:

    python benchmarks/fashion_sd21.py --output_dir demo-sd21-long --teacher_steps 10000 --student_steps 5000
"""

import argparse
from pathlib import Path

import numpy as np

import demo
import fashion
import small_models


SCRIPT = "train_lift_sd21.py"
METHODS = ("none", "mse", "lift", "place")
STUDENTS = ("bk_tiny", "bk_extreme")
IMAGES = 10_000  # of the 60,000 that Fashion-MNIST has to train on
REFERENCE, REAL = 100, 50  # test images of each prompt; the rarest has 159
TOKENS = 24


def parse_args(
    input_args: list[str] | None = None, description: str = __doc__, output_dir: str = "demo-sd21"
) -> argparse.Namespace:
    defaults = {"teacher_steps": 1500, "student_steps": 300, "samples": 400, "inference_steps": 20}
    parser = demo.make_parser(description, output_dir, **defaults)
    parser.add_argument("--autoencoder_steps", type=int, default=800, help="steps of the autoencoder")
    parser.add_argument("--clip_steps", type=int, default=400, help="of the CLIP")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance")
    return demo.parse(parser, input_args, most_samples=50_000)


def make_parts(args: argparse.Namespace) -> tuple:
    """The trained autoencoder, CLIP's folder and its tokenizer; and in `--output_dir` what the trainings need.

    These are the captioned `images`, the test images `reference` and `real`, `decoded`, `prompts.txt` and
    `classifier.pt`.

    Returns:
        The three, and the share of `real` that the classifier knows.
    """
    folder = args.output_dir
    source = fashion.find_fashion_mnist(demo.ROOT / ".data")
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    if not (folder / "images" / "metadata.jsonl").exists():  # written last
        demo.say("the images with their captions")
        fashion.write_captioned(folder / "images", images, labels)
    demo.write(folder / "prompts.txt", "\n".join(fashion.PROMPTS) + "\n")

    captions, padded = [fashion.caption(*pair) for pair in zip(labels, images)], fashion.pad(images)
    tokenizer = small_models.make_tokenizer(sorted({word for text in captions for word in text.split()}), TOKENS)
    demo.say("autoencoder, CLIP and the classifier in whose features images are compared, unless they are there")
    vae = small_models.train_autoencoder(folder / "parts" / "vae", padded, args.autoencoder_steps)
    clip = small_models.train_clip(folder / "parts" / "clip", padded, captions, tokenizer, args.clip_steps)
    classifier = small_models.train_classifier(folder / "classifier.pt", padded, labels)

    images, labels = fashion.read_fashion_mnist(source, "t10k")
    captions = [fashion.caption(*pair) for pair in zip(labels, images)]
    order = fashion.in_turn(captions, fashion.PROMPTS, REFERENCE + REAL)
    reference, real = np.split(fashion.pad(images)[order], [REFERENCE * len(fashion.PROMPTS)])
    demo.save_images(folder / "reference", reference)
    demo.save_images(folder / "real", real)
    demo.save_images(folder / "decoded", small_models.reconstruct(vae, real))
    return vae, clip, tokenizer, small_models.accuracy(classifier, real, labels[order][-len(real) :])


def train(args: argparse.Namespace, script: str, run: str, steps: int, flags: list) -> Path:
    """Of a latent text-to-image model."""
    latent = ["--cache_latents", "--encoding_batch_size", 64, "--learning_rate", 1e-3]
    latent += ["--guidance_scale", args.guidance_scale, "--validation_prompts", *fashion.PROMPTS[::5]]
    return demo.train(args, script, run, steps, [*flags, *latent])


def measure(args: argparse.Namespace, title: str, runs: dict[str, Path], known: float, drawing: tuple) -> None:
    """Of latent text-to-image models; `known` is the share of real images that the classifier knows."""
    real = [args.output_dir / name for name in ("real", "decoded")]
    facts = {
        "students": "`--kd_loss none`, `mse`, `lift` and `place`, which the names end with, one seed",
        "real": f"{REAL} test images of each prompt, {known:.1%} of which the classifier knows; decoded: the same, "
        "after the autoencoder",
    }
    prompts = ("--prompt_file", args.output_dir / "prompts.txt", "--guidance_scale", args.guidance_scale)
    demo.measure(
        args,
        title,
        runs,
        real,
        args.output_dir / "reference",
        facts,
        drawing=(*prompts, *drawing),
        scoring=("--clip_model", args.output_dir / "parts" / "clip"),
        reporting=("--columns", len(fashion.CLASSES)),
    )


def run(args: argparse.Namespace) -> None:
    from transformers import CLIPTextModel

    vae, clip, tokenizer, known = make_parts(args)
    text_encoder = CLIPTextModel.from_pretrained(clip)
    start = small_models.save_sd_pipeline(args.output_dir / "start", vae, text_encoder, tokenizer)
    scratch = ["--kd_loss", "none", "--student", "whole", "--student_init", "random"]
    scratch += ["--pretrained_teacher_model", start]
    runs = {"teacher": train(args, SCRIPT, "teacher", args.teacher_steps, scratch)}
    for student in STUDENTS:
        for method in METHODS:
            flags = ["--pretrained_teacher_model", runs["teacher"], "--student", student, "--kd_loss", method]
            name = f"{student}-{method}"
            runs[name] = train(args, SCRIPT, name, args.student_steps, flags)
    measure(args, "A small Stable Diffusion of garments, distilled", runs, known, drawing=("--sampler", "ddim"))


if __name__ == "__main__":
    demo.main(parse_args(), run)
