# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small DiT of Fashion-MNIST pixels, trained and distilled to a quarter of its depth with `train_lift_dit.py`.

    python benchmarks/fashion_dit.py --output_dir runs/fashion-dit

Trains a class-conditional teacher of 8 blocks, then students of the 2 blocks of largest influence with --kd_loss none,
mse and place at equal budget (steps, batches, noise, initial weights), and samples all of them with guidance by
`DiTPipeline`, per class and from the same noise. The scores come from a small classifier trained here on the same
articles: the share of samples that it gives the class asked for, and the Fréchet distance of its features to those of
articles that nobody trained on. It is no Inception FID and compares with no published figure.

Read results.md in that folder, then look at samples.png, curves.png and influence.png beside it. Stop it whenever you
like: the same command goes on from the last checkpoint. It takes 25 minutes on one core.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fashion
import lift_utils
from extreme_compression import BATCH, frechet_distance, keep_settings, say, smooth, training_seconds, write
from lift_utils import fail
from loss import describe_device


SCRIPT = Path(lift_utils.__file__).with_name("train_lift_dit.py")
METHODS = ("none", "mse", "place")
IMAGES = 20_000  # of the 60,000 that Fashion-MNIST has to train on
SIDE = 28
DEPTH = 2
FEATURES = 32  # few, so that a covariance from some hundred samples is well conditioned
SAMPLING_BATCH = 100

# num_embeds_ada_norm stays at 1000, although there are ten classes: DiTPipeline takes class 1000 for the null class.
TEACHER = {
    "sample_size": SIDE,
    "patch_size": 4,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 8,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
}


# ------------------------------------------------------------------------------------------------------- the arguments


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lift_utils.HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/fashion-dit"), help="where everything goes")
    parser.add_argument("--teacher_steps", type=int, default=1800, help="optimizer steps of the teacher")
    parser.add_argument("--student_steps", type=int, default=900, help="of each student")
    parser.add_argument("--samples", type=int, default=50, help="images of each class drawn from each model")
    parser.add_argument("--inference_steps", type=int, default=25, help="DDIM steps per image")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="classifier-free guidance")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args(input_args)
    for name in ("teacher_steps", "student_steps", "samples", "inference_steps", "threads"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)} is too small; pass at least 1")
    return args


# ------------------------------------------------------------------------------------------------------------ the data


def write_articles(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """The images as <folder>/<class>/<number>.png."""
    if (folder / "done").exists():
        return
    say("writing the articles as images")
    for name in fashion.CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, label) in enumerate(zip(images, labels)):
        Image.fromarray(pixels).save(folder / fashion.CLASSES[label] / f"{number:05d}.png")
    (folder / "done").touch()


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
            torch.nn.Linear(32 * (SIDE // 4) ** 2, FEATURES),
        )
        self.head = torch.nn.Linear(FEATURES, len(fashion.CLASSES))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return self.head(F.relu(features)), features


def as_inputs(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.copy()).unsqueeze(1).float() / 127.5 - 1


def train_classifier(images: np.ndarray, labels: np.ndarray) -> Classifier:
    say("training the classifier whose features the distance is measured in")
    torch.manual_seed(0)
    classifier, inputs, targets = Classifier(), as_inputs(images), torch.from_numpy(labels.astype(np.int64))
    steps = 3 * len(inputs) // 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,))
        F.cross_entropy(classifier(inputs[batch])[0], targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return classifier.eval()


# -------------------------------------------------------------------------------------------------------- the training


def train(args: argparse.Namespace, run: str, steps: int, flags: list) -> Path:
    """Launch train_lift_dit.py as a user does, unless the run is finished; one that was stopped goes on."""
    folder = args.output_dir.resolve() / run
    if (folder / "done").exists():
        return folder
    say(f"{run}: {steps} steps")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_cpu_threads_per_process"]
    command += [args.threads, "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", SCRIPT, "--output_dir", folder, "--vae", "none", *flags]
    command += ["--train_data_dir", args.output_dir.resolve() / "images", "--no-random_flip"]
    command += ["--cache_dir", args.output_dir.resolve() / "cache", "--dataloader_num_workers", 0]
    command += ["--max_train_steps", steps, "--train_batch_size", BATCH, "--gradient_accumulation_steps", 1]
    command += ["--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", max(1, steps // 20)]
    command += ["--ema_decay", 0.99, "--adam_beta2", 0.99, "--guidance_scale", args.guidance_scale]
    command += ["--checkpointing_steps", 100, "--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    command += ["--num_inference_steps", args.inference_steps, "--report_to", "none"]
    if subprocess.run([str(part) for part in command]).returncode != 0:
        fail(f"the training of {folder} did not finish; its messages are above, the same command goes on with it")
    (folder / "done").touch()
    return folder


# ------------------------------------------------------------------------------------------- the samples and the score


def draw_samples(args: argparse.Namespace, model: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images of a finished run, uint8 (N, SIDE, SIDE), and the classes asked for, which take turns.

    Every model gets the same noise.
    """
    from diffusers import DiTPipeline

    labels = np.tile(np.arange(len(fashion.CLASSES)), args.samples)
    path = model / "drawn_samples.npy"
    if path.exists():
        return np.load(path), labels
    say(f"sampling {model.name}: {len(labels)} images, {args.inference_steps} DDIM steps")
    pipeline = DiTPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    numbers = pipeline.get_label_ids(fashion.CLASSES)  # the folder's classes are in the order of the alphabet
    images = []
    for first in range(0, len(labels), SAMPLING_BATCH):
        batch = pipeline(
            [numbers[label] for label in labels[first : first + SAMPLING_BATCH]],
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(first),
            num_inference_steps=args.inference_steps,
        )
        images += [np.array(image) for image in batch.images]
    temporary = path.with_name(".drawn_samples.npy")
    np.save(temporary, np.stack(images))
    temporary.replace(path)
    return np.load(path), labels


@torch.no_grad()
def score(classifier: Classifier, images: np.ndarray, labels: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Fréchet distance to the real images, and the share that the classifier gives the class asked for."""
    logits, features = classifier(as_inputs(images))
    return {
        "frechet": frechet_distance(features, classifier(as_inputs(real))[1]),
        "right_class": (logits.argmax(-1) == torch.from_numpy(labels.astype(np.int64))).float().mean().item(),
    }


def describe_run(model: Path) -> dict[str, float]:
    """What a finished run's own files say of it."""
    from diffusers import DiTTransformer2DModel

    rows = lift_utils.read_metrics(model / "metrics.jsonl")
    transformer = DiTTransformer2DModel.from_pretrained(model / "transformer")
    return {
        "blocks": transformer.config.num_layers,
        "parameters": transformer.num_parameters(),
        "task": statistics.mean(row["task"] for row in rows[-max(1, len(rows) // 5) :]),
        "steps": rows[-1]["step"],
        "seconds": training_seconds(rows),
    }


# ---------------------------------------------------------------------------------------------------------- the report


def make_table(results: dict[str, dict]) -> str:
    """A Markdown table, a line per model."""
    lines = [
        "| model | blocks | parameters | loss on the data | Fréchet distance | right class | steps | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    styles = {"blocks": "d", "parameters": ",", "task": ".4f", "frechet": ".1f", "right_class": ".1%", "steps": "d"}
    for name, result in results.items():
        cells = [
            f"{result[key]:{style}}" if key in result else "" for key, style in {**styles, "seconds": ".0f"}.items()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_report(args: argparse.Namespace, results: dict, kept: list[str]) -> str:
    """results.json and results.md; returns the table."""
    table = make_table(results)
    facts = {
        "machine": f"{describe_device(torch.device('cpu'))}, {args.threads} thread(s), beside other work",
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "budget": f"teacher {args.teacher_steps} steps, students {args.student_steps} steps, of {BATCH} images; "
        "one seed",
        "students": f"blocks {', '.join(kept)} of the teacher's {TEACHER['num_layers']}, by --student_depth {DEPTH}",
        "parameters": "of which the tables of 1,000 labels, ten of them in use, are 97 k in each block",
        "samples": f"{args.samples} per class and model, {args.inference_steps} DDIM steps, guidance "
        f"{args.guidance_scale}, the same noise for all",
        "distance": f"Fréchet distance in {FEATURES} features of a small classifier to as many articles of the test "
        "set; no Inception FID",
        "right class": "share of the samples to which that classifier gives the class asked for; guidance draws "
        "typical articles, so it can be above that of real ones",
        "loss on the data": "mean squared error of the predicted velocity over the last fifth of the training",
        "seconds": "training alone; the wall time depends on what else the machine did",
    }
    write(args.output_dir / "results.json", json.dumps({"facts": facts, "results": results}, indent=2))
    notes = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in ("samples", "curves", "influence"))
    write(args.output_dir / "results.md", f"# A DiT of Fashion-MNIST, distilled\n\n{table}\n\n{notes}\n\n{pictures}\n")
    return table


def draw_pictures(args: argparse.Namespace, images: dict[str, np.ndarray], folders: dict[str, Path]) -> None:
    """Two samples of each class from every model, a column per class; the curves; the teacher's blocks."""
    count, rows = len(fashion.CLASSES), []
    for name, stack in images.items():
        for turn in range(2):
            row = [Image.fromarray(image) for image in stack[turn * count : (turn + 1) * count]]
            rows.append(("" if turn else name, row))
    lift_utils.labelled_grid(rows, scale=3, columns=fashion.CLASSES).save(args.output_dir / "samples.png")
    runs = {method: smooth(folders[method] / "metrics.jsonl") for method in METHODS}
    keys = ["loss", "task", "vb", "kd", "coarse", "fine", "weight"]
    lift_utils.plot_curves(runs, keys, args.output_dir / "curves.png")
    shutil.copy(folders["place"] / "influence.png", args.output_dir)


# ------------------------------------------------------------------------------------------------------------- the run


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    keep_settings(args)
    source = fashion.find_fashion_mnist(Path(lift_utils.__file__).with_name(".data"))
    images, labels = (part[:IMAGES] for part in fashion.read_fashion_mnist(source, "train"))
    write_articles(args.output_dir / "images", images, labels)

    write(args.output_dir / "teacher.json", json.dumps({"config": TEACHER}, indent=2))
    # Of the velocity rather than the noise: articles come out whole after fewer steps.
    scratch = ["--kd_loss", "none", "--student", args.output_dir.resolve() / "teacher.json"]
    scratch += ["--prediction_type", "v_prediction"]
    folders = {"teacher": train(args, "teacher", args.teacher_steps, scratch)}
    for method in METHODS:
        flags = ["--pretrained_teacher_model", folders["teacher"], "--kd_loss", method, "--student_depth", DEPTH]
        folders[method] = train(args, method, args.student_steps, flags)

    classifier = train_classifier(images, labels)
    test_images, test_labels = fashion.read_fashion_mnist(source, "t10k")
    # The first half is compared with, the second half shows how far apart real articles are.
    by_class = [np.flatnonzero(test_labels == label)[: 2 * args.samples] for label in range(len(fashion.CLASSES))]
    in_turn = np.stack(by_class, axis=1)
    reference, floor = in_turn[: args.samples].ravel(), in_turn[args.samples :].ravel()
    real = test_images[reference]
    drawn = {"real, held out": test_images[floor]}
    results = {"real, held out": score(classifier, test_images[floor], test_labels[floor], real)}
    for run, folder in folders.items():
        name = run if run == "teacher" else f"--kd_loss {run}"
        drawn[name], wanted = draw_samples(args, folder)
        results[name] = describe_run(folder) | score(classifier, drawn[name], wanted, real)

    draw_pictures(args, drawn, folders)
    card = (folders["place"] / "README.md").read_text()
    kept = card.split("of the teacher's: ")[1].split(" of its")[0].split(", ")
    print(f"\n{write_report(args, results, kept)}\n")
    print("\n".join(str(args.output_dir / name) for name in ("results.md", "samples.png", "curves.png")))


if __name__ == "__main__":
    main(parse_args())
