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

1. a small autoencoder (latents of 4 x 8 x 8) and a small CLIP text encoder, by benchmarks/fashion.py;
2. the teacher: a random U-Net in Stable Diffusion's layout, trained by the script itself with --kd_loss none
   --student whole --student_init random, on cached latents;
3. the students bk_tiny and bk_extreme, each distilled with --kd_loss none, mse, lift and place at equal budget (steps,
   batches, noise, initial weights from the teacher);
4. samples of every model by prompt, all from the same noise.

The scores come from a small classifier trained here on the same images: the share of samples to which it gives the
class that the prompt names, and the Fréchet distance of 32 of its features to those of images of the test set. It is
no Inception FID and compares with no published figure; other images of the test set give its floor.

Read demo-sd21/results.md, then look at samples.png, curves.png and autoencoder.png beside it. Each model is a folder
that loads with `StableDiffusionPipeline.from_pretrained("demo-sd21/bk_tiny-place")`. Stop it whenever you like: the
same command goes on from there. With more time, in a new folder:

    python benchmarks/fashion_sd21.py --output_dir demo-sd21-long --teacher_steps 10000 --student_steps 5000
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


# Before torch is loaded: as in extreme_compression.py, which tells why.
os.environ |= {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "3000"}

import numpy as np
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import extreme_compression
import fashion
import lift_utils
from extreme_compression import BATCH, frechet_distance, keep_settings, say, smooth, write
from lift_utils import fail
from loss import describe_device


SCRIPT = Path(lift_utils.__file__).with_name("train_lift_sd21.py")
METHODS = ("none", "mse", "lift", "place")
STUDENTS = ("bk_tiny", "bk_extreme")
IMAGES = 10_000  # of the 60,000 that Fashion-MNIST has to train on
TOKENS = 24
SAMPLING_BATCH = 100
PROMPTS = [f"a photo of a {tone} {name}" for tone in ("bright", "dark") for name in fashion.CLASSES]


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(
    input_args: list[str] | None = None, description: str = __doc__, output_dir: str = "demo-sd21"
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=lift_utils.HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="where everything goes")
    parser.add_argument("--autoencoder_steps", type=int, default=800, help="steps of the autoencoder")
    parser.add_argument("--text_steps", type=int, default=400, help="of the text encoder")
    parser.add_argument("--teacher_steps", type=int, default=1500, help="optimizer steps of the teacher")
    parser.add_argument("--student_steps", type=int, default=300, help="of each student")
    parser.add_argument("--samples", type=int, default=400, help="images drawn from each model, prompts in turn")
    parser.add_argument("--inference_steps", type=int, default=20, help="DDIM steps per image")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(input_args)
    for name in ("autoencoder_steps", "text_steps", "teacher_steps", "student_steps", "inference_steps", "threads"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is too small; pass at least 1")
    fewest = 2 * fashion.FEATURES
    if not fewest <= args.samples <= 1000:
        fail(f"--samples {args.samples} does not do for {fashion.FEATURES} features; pass {fewest} to 1000")
    return args


# ----------------------------------------------------------------------------------------------------- the first parts


def make_parts(args: argparse.Namespace, images: np.ndarray, labels: np.ndarray, projection: bool = False) -> tuple:
    """The trained autoencoder, the trained text encoder and its tokenizer.

    Args:
        images: As in Fashion-MNIST, uint8 (N, 28, 28).
        projection: Whether the text encoder projects its pooled embedding, as Stable Diffusion 3's do.
    """
    parts = args.output_dir / "parts"
    captions = [fashion.caption(label, image) for label, image in zip(labels, images)]
    tokenizer = fashion.make_tokenizer(sorted({word for text in captions for word in text.split()}), TOKENS)
    padded = fashion.pad(images)
    say("the autoencoder, unless it is there")
    vae = fashion.train_autoencoder(parts / "vae", padded, args.autoencoder_steps)
    say("the text encoder, unless it is there")
    text_encoder = fashion.train_text_encoder(
        parts / "text", padded, captions, tokenizer, args.text_steps, projection=projection
    )
    return vae, text_encoder, tokenizer


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    if (folder / "metadata.jsonl").exists():  # written last
        return
    say("writing the images with their captions")
    fashion.write_captioned(folder, images, labels)


# -------------------------------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, script: Path, run: str, steps: int, flags: list) -> Path:
    """Launch a training script as a user does, unless the run is finished; one that was stopped goes on."""
    folder = args.output_dir.resolve() / run
    if (folder / "done").exists():
        return folder
    say(f"{run}: {steps} steps")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process"]
    command += [args.threads, "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", script, "--output_dir", folder, *flags, "--cache_latents"]
    command += ["--train_data_dir", args.output_dir.resolve() / "images", "--encoding_batch_size", 64]
    command += ["--cache_dir", args.output_dir.resolve() / "cache", "--dataloader_num_workers", 0]
    command += ["--max_train_steps", steps, "--train_batch_size", BATCH, "--gradient_accumulation_steps", 1]
    command += ["--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", max(1, steps // 20)]
    command += ["--ema_decay", 0.99, "--checkpointing_steps", 100, "--checkpoints_total_limit", 1]
    command += ["--resume_from_checkpoint", "latest", "--validation_prompts", *PROMPTS[::5]]
    command += ["--num_inference_steps", args.inference_steps, "--guidance_scale", args.guidance_scale]
    extreme_compression.end_training_into(folder, script)
    # In a session of its own, so that Ctrl-C reaches this process alone, which then lets the training save its step.
    process = subprocess.Popen([*map(str, command), "--report_to", "none"], start_new_session=True)
    try:
        if process.wait() != 0:
            fail(f"the training of {folder} ended with exit status {process.returncode}; its messages are above")
    except KeyboardInterrupt:
        say("stopping; the training saves its step")
        extreme_compression.end_training_into(folder, script)
        raise
    (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------------- the samples and the score


def draw_samples(args: argparse.Namespace, model: Path, options: dict) -> np.ndarray:
    """Grey images of a finished run, uint8 (N, 32, 32), the prompts in turn, from the noise that every model gets.

    Args:
        options: Further arguments of the pipeline's call.
    """
    path = model / "drawn_samples.npy"
    if path.exists():
        return np.load(path)
    from diffusers import DiffusionPipeline

    say(f"sampling {model.name}: {args.samples} images, {args.inference_steps} steps")
    index = json.loads((model / "model_index.json").read_text())
    absent = [name for name, kind in index.items() if isinstance(kind, list) and kind[1] is None]
    pipeline = DiffusionPipeline.from_pretrained(model, **dict.fromkeys(absent))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, args.samples, SAMPLING_BATCH):
        wanted = range(first, min(args.samples, first + SAMPLING_BATCH))
        batch = pipeline(
            [PROMPTS[number % len(PROMPTS)] for number in wanted],
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(first),
            num_inference_steps=args.inference_steps,
            **options,
        )
        images += [np.array(image.convert("L")) for image in batch.images]
    temporary = path.with_name(".drawn_samples.npy")
    np.save(temporary, np.stack(images))
    temporary.replace(path)
    return np.load(path)


def score(classifier: fashion.Classifier, images: np.ndarray, labels: np.ndarray, real) -> dict[str, float]:
    """Fréchet distance to the features of real images, and the share of images given the right class."""
    classes, features = fashion.classify(classifier, images)
    right = (classes.numpy() == labels).mean().item()
    return {"frechet": frechet_distance(features, real), "right_class": right}


def describe_run(model: Path) -> dict[str, float]:
    """What a finished run's own files say of it."""
    from safetensors import safe_open

    rows = lift_utils.read_metrics(model / "metrics.jsonl")
    (weights,) = [path for part in ("unet", "transformer") for path in (model / part).glob("*.safetensors")]
    with safe_open(weights, "pt") as tensors:
        parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return {
        "parameters": parameters,
        "task": statistics.mean(row["task"] for row in rows[-max(1, len(rows) // 5) :]),
        "steps": rows[-1]["step"],
        "seconds": extreme_compression.training_seconds(rows),
    }


# ---------------------------------------------------------------------------------------------------------- the report


def make_table(results: dict[str, dict]) -> str:
    """A Markdown table, a line per model."""
    lines = [
        "| model | parameters | loss on the data | right class | Fréchet distance | steps | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    styles = {"parameters": ",", "task": ".4f", "right_class": ".1%", "frechet": ".1f", "steps": "d", "seconds": ".0f"}
    for name, result in results.items():
        cells = [f"{result[key]:{style}}" if key in result else "" for key, style in styles.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(args: argparse.Namespace, title: str, results: dict, accuracy: float) -> str:
    """results.json and results.md; returns the table."""
    table = make_table(results)
    facts = {
        "machine": f"{describe_device(torch.device('cpu'))}, {args.threads} thread(s)",
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "budget": f"teacher {args.teacher_steps} steps, students {args.student_steps} steps, of {BATCH} images; "
        "one seed",
        "samples": f"{args.samples} per model, {len(PROMPTS)} prompts in turn, {args.inference_steps} steps, "
        f"guidance {args.guidance_scale}, the same noise for all",
        "right class": "share of the samples to which a small classifier (right on "
        f"{accuracy:.1%} of the test set) gives the class that the prompt names",
        "distance": f"Fréchet distance in {fashion.FEATURES} features of that classifier to {len(PROMPTS) * 100:,} "
        "images of the test set; no Inception FID",
        "loss on the data": "mean squared error of the predicted velocity over the last fifth of the training",
        "seconds": "training alone; the wall time depends on what else the machine did",
    }
    write(args.output_dir / "results.json", json.dumps({"facts": facts, "results": results}, indent=2))
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    names = ("samples", "curves", "autoencoder")
    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in names)
    write(args.output_dir / "results.md", f"# {title}\n\n{table}\n\n{notes}\n\n{pictures}\n")
    return table


def draw_pictures(args: argparse.Namespace, images: dict[str, np.ndarray], folders: dict[str, Path]) -> None:
    """Samples, a row per model and a column per prompt, bright and dark in turns; the first student's curves."""
    shown = [number + len(fashion.CLASSES) * (number % 2) for number in range(len(fashion.CLASSES))]
    rows = [(name, [Image.fromarray(stack[number]) for number in shown]) for name, stack in images.items()]
    columns = [PROMPTS[number].removeprefix("a photo of a ") for number in shown]
    lift_utils.labelled_grid(rows, scale=3, columns=columns).save(args.output_dir / "samples.png")
    first = [name for name in folders if name != "teacher"][: len(METHODS)]
    runs = {name: smooth(folders[name] / "metrics.jsonl") for name in first}
    keys = ["loss", "task", "feat", "kd", "coarse", "fine", "weight"]
    lift_utils.plot_curves(runs, keys, args.output_dir / "curves.png")


def draw_autoencoder(args: argparse.Namespace, images: np.ndarray) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(args.output_dir / "start" / "vae").eval()
    rows = {"image": images, "decoded": fashion.reconstruct(vae, images)}
    grid = lift_utils.labelled_grid([(name, list(map(Image.fromarray, row))) for name, row in rows.items()], scale=2)
    grid.save(args.output_dir / "autoencoder.png")


def report(
    args: argparse.Namespace, title: str, folders: dict[str, Path], data: tuple, test: tuple, **options
) -> None:
    """Sample every model, score the samples, write and print the results.

    Args:
        folders: The teacher's run and the students'.
        data, test: Images, uint8 (N, 28, 28), and labels to train the classifier on, and to compare with.
        options: Further arguments of the pipeline's call.
    """
    (images, labels), (test_images, test_labels) = data, test
    test_images = fashion.pad(test_images)
    say("the classifier, unless it is there")
    classifier = fashion.train_classifier(args.output_dir / "classifier.safetensors", fashion.pad(images), labels)
    accuracy = (fashion.classify(classifier, test_images)[0].numpy() == test_labels).mean().item()
    # As the prompts have them, each tone of each class as often. The rarest has 159 images in the test set.
    named = np.array([fashion.caption(*pair) for pair in zip(test_labels, test_images)])
    in_turn = np.stack([np.flatnonzero(named == prompt)[:150] for prompt in PROMPTS], axis=1)
    real = fashion.classify(classifier, test_images[in_turn[:100].ravel()])[1]
    held_out = in_turn[100:].ravel()[: args.samples]
    wanted = np.resize(np.arange(len(fashion.CLASSES)), args.samples)
    drawn = {"real, held out": test_images[held_out]}
    results = {"real, held out": score(classifier, test_images[held_out], test_labels[held_out], real)}
    for name, folder in folders.items():
        drawn[name] = draw_samples(args, folder, options)
        results[name] = describe_run(folder) | score(classifier, drawn[name], wanted, real)

    draw_autoencoder(args, test_images[:12])
    draw_pictures(args, drawn, folders)
    table = write_report(args, title, results, accuracy)
    say("done")
    print(f"\n{table}\n\nThe Fréchet distance is between features of a small classifier: it is no Inception FID.")
    names = ("results.md", "samples.png", "curves.png", "autoencoder.png")
    print("\n".join(str(args.output_dir / name) for name in names))


# ------------------------------------------------------------------------------------------------------------- the run


def read_data(args: argparse.Namespace) -> tuple[tuple, tuple]:
    """Images, uint8 (N, 28, 28), and labels to train on, also as an image folder with captions, and to test with."""
    source = fashion.find_fashion_mnist(Path(lift_utils.__file__).with_name(".data"))
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    write_images(args.output_dir / "images", images, labels)
    return (images, labels), fashion.read_fashion_mnist(source, "t10k")


def run(args: argparse.Namespace) -> None:
    keep_settings(args)
    data, test = read_data(args)
    start = fashion.save_sd_pipeline(args.output_dir / "start", *make_parts(args, *data))
    scratch = ["--kd_loss", "none", "--student", "whole", "--student_init", "random"]
    scratch += ["--pretrained_teacher_model", start]
    folders = {"teacher": train(args, SCRIPT, "teacher", args.teacher_steps, scratch)}
    for student in STUDENTS:
        for method in METHODS:
            flags = ["--pretrained_teacher_model", folders["teacher"], "--student", student, "--kd_loss", method]
            name = f"{student}-{method}"
            folders[name] = train(args, SCRIPT, name, args.student_steps, flags)
    report(args, "A small Stable Diffusion of garments, distilled", folders, data, test)


def main(args: argparse.Namespace, run=run) -> None:
    """Set up, and let Ctrl-C or SIGTERM stop the run so that it can go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        run(args)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main(parse_args())
