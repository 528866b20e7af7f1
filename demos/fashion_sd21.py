# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small Stable Diffusion of garments, trained from scratch and distilled by `train_lift_sd21.py` on two cores.

    python demos/fashion_sd21.py --output_dir demo-sd21

The data are 10,000 captioned images of Fashion-MNIST at 32 pixels, from Debian's package, which is downloaded if it is
not installed. The demo makes, one after the other:

1. a small autoencoder (latents of 16 x 8 x 8) and a small CLIP, whose text encoder the pipeline uses;
2. the teacher: a U-Net in Stable Diffusion's layout, trained from random weights by the script itself with --kd_loss
   none --student whole --student_init random, on cached latents;
3. the students bk_tiny and bk_extreme, each distilled with --kd_loss none (also with --task_loss rms), mse, lift and
   place at equal budget: the same steps, batches, noise and initial weights from the teacher;
4. samples of every model by prompt, from the same noise, their distances to real images, and the report, all by the
   scripts of eval/.

The distances are taken in 32 features of a small classifier, which is trained here on the same images; the reference
are images of the test set. They are not Inception FIDs; do not compare them with published figures. The rows "real"
(other images of the test set) and "decoded" (the same after the autoencoder) show what is the best that can be
expected. The CLIP score is computed with the small CLIP.

Open demo-sd21/index.html, or read demo-sd21/results.md. Each model is a folder that loads with
`StableDiffusionPipeline.from_pretrained("demo-sd21/bk_tiny-place-0")`. You can stop the demo at any time: the same
command continues it. With more time, in a new folder:

    python demos/fashion_sd21.py --output_dir demo-sd21-long --teacher_steps 10000 --student_steps 5000
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

import demo
import fashion
import small_models


SCRIPT = "train_lift_sd21.py"
METHODS = ("none", "none_rms", "mse", "lift", "place")
STUDENTS = ("bk_tiny", "bk_extreme")
METRICS = ("fid", "kid", "inception_score", "precision", "recall", "clip_score")
IMAGES = 10_000  # of the 60,000 training images of Fashion-MNIST
REFERENCE, REAL = 100, 50  # test images of each prompt, which has at least 159
TOKENS = 24


def parse_args(
    input_args: list[str] | None = None, description: str = __doc__, output_dir: str = "demo-sd21"
) -> argparse.Namespace:
    """The flags of this demo, and of the other two with captions, by another description and default folder."""
    defaults = {"teacher_steps": 1500, "student_steps": 300, "samples": 400, "inference_steps": 20}
    parser = demo.make_parser(description, output_dir, **defaults)
    parser.add_argument("--autoencoder_steps", type=int, default=5000, help="training steps of the autoencoder")
    parser.add_argument("--clip_steps", type=int, default=400, help="training steps of the CLIP")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance; 1 is none")
    return demo.parse(parser, input_args)


def make_parts(args: argparse.Namespace) -> tuple:
    """Write the data to `--output_dir`, and train the parts of a pipeline that are not distilled.

    The data are the captioned `images`, the test images `reference`, `real` and `decoded`, `prompts.txt` and
    `classifier.pt`.

    Returns:
        The autoencoder, CLIP's folder, its tokenizer, and the classifier's accuracy on `real`.
    """
    folder = args.output_dir
    source = fashion.find_fashion_mnist(demo.ROOT / ".data")
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    if not (folder / "images" / "metadata.jsonl").exists():  # written last
        demo.say("images with captions")
        fashion.write_captioned(folder / "images", images, labels)
    demo.write(folder / "prompts.txt", "\n".join(fashion.PROMPTS) + "\n")

    captions, padded = [fashion.caption(*pair) for pair in zip(labels, images)], fashion.pad(images)
    tokenizer = small_models.make_tokenizer(sorted({word for text in captions for word in text.split()}), TOKENS)
    demo.say("autoencoder, CLIP, and the classifier for the distances")
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
    """[`demo.train`] with the flags that all latent text-to-image models here share."""
    latent = ["--cache_latents", "--encoding_batch_size", 64, "--learning_rate", 1e-3]
    latent += ["--guidance_scale", args.guidance_scale, "--validation_prompts", *fashion.PROMPTS[::5]]
    return demo.train(args, script, run, steps, [*flags, *latent])


def measure(
    args: argparse.Namespace, title: str, runs: dict[str, Path], accuracy: float, sampling_flags: tuple
) -> None:
    """[`demo.measure`] for latent text-to-image models; `accuracy` is the classifier's on real images."""
    real = [args.output_dir / name for name in ("real", "decoded")]
    facts = {
        "students": f"{args.seeds} seed(s); {demo.NAMES}",
        "real": f"{REAL} test images of each prompt; the classifier recognises {accuracy:.1%} of them",
        "decoded": "the same images after the autoencoder",
    }
    prompts = ("--prompt_file", args.output_dir / "prompts.txt", "--guidance_scale", args.guidance_scale)
    demo.measure(
        args,
        title,
        runs,
        real,
        args.output_dir / "reference",
        facts,
        sampling_flags=(*prompts, *sampling_flags),
        evaluate_flags=("--metrics", *METRICS, "--clip_model", args.output_dir / "parts" / "clip"),
        report_flags=("--columns", len(fashion.CLASSES)),
    )


def distil(
    args: argparse.Namespace, script: str, start: Path, students: tuple[str, ...], flags: tuple = ()
) -> dict[str, Path]:
    """Train the teacher and each student by each loss and seed; returns the models' folders by name.

    Args:
        start: The pipeline whose denoiser is trained from scratch to be the teacher.
        flags: Of all trainings.
    """
    scratch = ["--kd_loss", "none", "--student", "whole", "--student_init", "random"]
    scratch += ["--pretrained_teacher_model", start, *flags]
    runs = {"teacher": train(args, script, "teacher", args.teacher_steps, scratch)}
    for student in students:
        words = ["--student", student, *flags]
        runs |= demo.train_students(args, partial(train, args, script), f"{student}-", METHODS, runs["teacher"], words)
    return runs


def run(args: argparse.Namespace) -> None:
    """Make the data and the parts, train the teacher and the students, measure them."""
    from transformers import CLIPTextModel

    vae, clip, tokenizer, accuracy = make_parts(args)
    text_encoder = CLIPTextModel.from_pretrained(clip)
    start = small_models.save_sd_pipeline(args.output_dir / "start", vae, text_encoder, tokenizer)
    runs = distil(args, SCRIPT, start, STUDENTS)
    measure(args, "A small Stable Diffusion of garments, distilled", runs, accuracy, ("--sampler", "ddim"))


if __name__ == "__main__":
    demo.main(parse_args(), run)
