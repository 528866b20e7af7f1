# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""A small set-up in which losses are compared: garments of 16 or 32 pixels, teachers of 0.1M to 18M parameters.

All runs are those of train_lift_unet.py, by its own flags. A run's samples are compared with photographs that no model
has seen, in the features of a classifier of the garments.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from PIL import Image
from tqdm import tqdm

import train_lift_unet


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demos"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.checkpoints import list_checkpoints, step_of
from common.errors import fail
from common.metrics import read_metrics
from common.teachers import min_snr_weights

from device import describe_device
from fashion import find_fashion_mnist, read_fashion_mnist
from figures import frechet_distance, kernel_inception_distance
from fork_server import make_fork_server, start_run
from generate import denoise, plain_unet
from lift_utils import FeatureModel, make_kd_loss
from small_models import train_classifier


ROOT = Path(__file__).resolve().parents[1]
TEACHER = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
# Of the teachers, whose sizes differ by four.
WIDTHS = {"sixteenth": 1 / 4, "quarter": 1 / 2, "teacher": 1, "fourfold": 2, "sixteenfold": 4}
SAMPLE_BATCH, SAMPLING_STEPS, CURVE_SAMPLES = 500, (5, 10, 50), 1000
# Where the error to the teacher is measured, and on how many images.
TIMESTEPS, PROBES = (0, 20, 50, 100, 200, 400, 600, 800, 900, 950, 999), 256


class Scale(NamedTuple):
    """How large the set-up is, and where it runs."""

    side: int  # pixels of the images
    images: int  # to train on
    teacher_steps: int
    jobs: int  # runs side by side
    device: str
    clip_sample: bool  # of DDIM: as Diffusers does by default, by which all stored runs are measured, or as published


SCALES = {"cpu": Scale(16, 20_000, 4000, 2, "cpu", True), "gpu": Scale(32, 60_000, 10_000, 8, "cuda", False)}


class TimeUp(Exception):
    """The slice of time is over; what was going on has saved what is done."""


class Run(NamedTuple):
    """A training of train_lift_unet.py."""

    experiment: str
    name: str  # what the table calls it
    seed: int
    flags: dict[str, Any]  # without dashes
    samples: int = 5000  # that are drawn to measure it
    teacher: str = "teacher"  # of WIDTHS

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.+-]+", "_", f"{self.experiment}--{self.name}-{self.seed}")

    @property
    def key(self) -> str:
        """Its place among finished runs: all that shapes its figures. Runs of two experiments may have the same."""
        return json.dumps([flags_of(self), self.samples, self.teacher], sort_keys=True, default=str)


def run_of(line: dict[str, Any]) -> Run:
    """The run that a stored line is of."""
    return Run(**{name: line[name] for name in Run._fields})


def set_environment(device: str) -> None:
    """What all runs need in their environment, before the first one is started."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)


def flag_of(name: str, value: Any) -> list[str]:
    """A flag as words of a command line; `True` and `False` are switches."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def flags_of(run: Run) -> dict[str, Any]:
    """A run's flags, those that most runs have in common among them."""
    flags = {"student": 0.125, "student_init": "random", "train_batch_size": 64, "max_train_steps": 2000}
    flags |= {"learning_rate": 8e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 100, "ema_decay": 0.99}
    flags |= {"lambda_kd_feat": 0, "seed": run.seed, **run.flags}
    if "checkpointing_steps" in flags:  # their models are measured
        flags["checkpoints_total_limit"] = 99
    return flags


def teachers_of(scale: Scale) -> str:
    """What the lines of a scale's teachers have in place of their experiment."""
    return f"teachers of {scale.side} pixels"


def teacher_config(name: str, scale: Scale) -> dict[str, Any]:
    """The config of a teacher of WIDTHS."""
    widths = [int(WIDTHS[name] * width) for width in TEACHER["block_out_channels"]]
    return {**TEACHER, "sample_size": scale.side, "block_out_channels": widths}


def fit_images(images: np.ndarray, side: int) -> np.ndarray:
    """Grey images, uint8 (N, 28, 28), at fewer pixels a side, or in a black frame at more."""
    frame = side - images.shape[1]
    if frame > 0:
        return np.pad(images, ((0, 0), *[(frame // 2, frame - frame // 2)] * 2))
    return np.stack([np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in images])


class Study:
    """The data, the teacher and the classifier in a folder, made where they are missing, and runs on them.

    Args:
        folder: Of everything that is made.
        lines: A file of one JSON line for each finished run.
        jobs: Runs side by side, with a thread each.
        scale: One of [`SCALES`].
        minutes: After these everything is stopped, with [`TimeUp`]; `None` is never.
    """

    def __init__(self, folder: Path, lines: Path, jobs: int, scale: Scale, minutes: float | None = None):
        self.folder, self.lines, self.jobs, self.scale = folder.resolve(), lines, jobs, scale
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.writing = threading.Lock()
        # Starting a process looks for others that have ended: two threads must not read one's exit code at a time.
        self.processes = threading.Lock()

    def finished(self) -> dict[str, dict[str, Any]]:
        """The stored lines of finished runs by their keys."""
        if not self.lines.exists():
            return {}
        lines = [json.loads(line) for line in self.lines.read_text().splitlines()]
        return {run_of(line).key: line for line in lines}

    def folder_of(self, run: Run) -> Path:
        """The folder of a run of its own name: what another experiment has run lies in that one's."""
        return self.folder / "runs" / run.folder

    def prepare(self, teachers: set[str]) -> None:
        """Write the images, and train the classifier and the teachers, unless they are there."""
        source = find_fashion_mnist(ROOT / ".data")
        images, labels = read_fashion_mnist(source, "train")
        images = fit_images(images, self.scale.side)
        if not (self.folder / "images").exists():
            temporary = self.folder / ".images"
            temporary.mkdir(exist_ok=True)
            for index, image in enumerate(tqdm(images[: self.scale.images], desc="Writing images")):
                Image.fromarray(image).save(temporary / f"{index:05d}.png")
            temporary.rename(self.folder / "images")
        train_classifier(self.folder / "classifier.pt", images, labels)
        unseen, _ = read_fashion_mnist(source, "t10k")
        unseen = fit_images(unseen, self.scale.side)
        np.save(self.folder / "unseen.npy", unseen)
        self.write_bounds(images, unseen)
        for name in sorted(teachers):
            self.train_teacher(name)

    @property
    def bounds(self) -> Path:
        """A JSON file of the distances between which those of students mean something."""
        return self.lines.with_name(f"bounds-{self.scale.side}.json")

    def write_bounds(self, images: np.ndarray, unseen: np.ndarray) -> None:
        """Measure 5,000 real images, uint8 (N, side, side), and as many of white noise, unless they are measured."""
        if self.bounds.exists():
            return
        classifier = torch.jit.load(str(self.folder / "classifier.pt")).eval()
        noise = np.random.default_rng(0).normal(127.5, 127.5, (5000, *unseen.shape[1:]))
        sets = {"unseen": unseen, "real images": images[:5000], "white noise": noise.clip(0, 255).round()}
        with torch.no_grad():
            inputs = {name: torch.from_numpy(pixels).float().unsqueeze(1) for name, pixels in sets.items()}
            features = {name: classifier(pixels)[0].numpy() for name, pixels in inputs.items()}
        moments = {name: moments_of(found) for name, found in features.items()}
        reference = moments.pop("unseen")
        distances = {name: frechet_distance(*found, *reference) for name, found in moments.items()}
        self.bounds.write_text(json.dumps(distances) + "\n")

    def train_teacher(self, name: str) -> None:
        """Train a teacher of WIDTHS from scratch, unless it is there, and measure it, unless it has a line."""
        recipe = self.folder / f"{name}.json"
        recipe.write_text(json.dumps({"config": teacher_config(name, self.scale)}))
        flags = {"kd_loss": "none", "max_train_steps": self.scale.teacher_steps, "lr_warmup_steps": 200}
        flags |= {"learning_rate": 1e-3 if WIDTHS[name] > 1 else 2e-3, "ema_decay": 0.999}
        run = Run(teachers_of(self.scale), name, 0, flags, teacher=name)
        flags = {**flags_of(run), "student": recipe}
        self.train(self.folder / name, flags)
        if run.key not in self.finished():
            self.run(run, self.folder / name, flags)

    def train(self, output_dir: Path, flags: dict[str, Any]) -> list[str]:
        """Run train_lift_unet.py to its end, or go on with it; a run that fails ends this program with its log.

        Returns:
            Its command line.
        """
        flags = {
            "output_dir": output_dir,
            "train_data_dir": self.folder / "images",
            "cache_dir": self.folder / "cache",
            "dataloader_num_workers": 0,
            "report_to": "none",
            "logging_steps": 100,
            "checkpoints_total_limit": 1,
            "resume_from_checkpoint": "latest",
            "num_validation_images": 10,
            **flags,
        }
        words = [word for name, value in flags.items() for word in flag_of(name, value)]
        if (output_dir / "model_index.json").exists():
            return words
        output_dir.mkdir(parents=True, exist_ok=True)
        log = output_dir / "log.txt"
        code = self.complete(partial(start_run, self.context, "train_lift_unet", words, log, self.folder))
        if code:
            fail(f"{output_dir} ended with exit code {code}: {log.read_text()[-2000:]}")
        return words

    def complete(self, start: Callable[[], BaseProcess]) -> int:
        """Start a process, and wait for its end; returns its exit code.

        When the time is up, it is asked to end, and [`TimeUp`] is raised. A training then saves what is done.
        """
        with self.processes:
            process = start()
        ended = []
        while not ended and (self.deadline is None or time.monotonic() < self.deadline):  # a signal may set it
            ended = wait([process.sentinel], 0.2)
        ended = ended or wait([process.sentinel], 0)
        if not ended:
            process.terminate()
            wait([process.sentinel])
        with self.processes:
            process.join()
        if not ended:
            raise TimeUp
        return process.exitcode

    def run_all(self, runs: list[Run]) -> bool:
        """Train and measure what is not finished, `jobs` side by side; returns whether anything was left.

        Raises [`TimeUp`].
        """
        done = self.finished()
        left = [run for run in runs if run.key not in done]
        if not left:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.scale.device == "cpu":
            self.context = make_fork_server(("train_lift_unet", "datasets.packaged_modules.imagefolder.imagefolder"))
        else:  # a process that has touched the GPU cannot be forked
            self.context = multiprocessing.get_context("spawn")
        self.prepare({run.teacher for run in left})
        bar = tqdm(total=len(left), desc="Runs")

        def finish(run: Run) -> None:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                raise TimeUp
            flags = {"pretrained_teacher_model": self.folder / run.teacher, **flags_of(run)}
            figures = self.run(run, self.folder_of(run), flags)
            with self.writing:
                bar.update()
                bar.write(f"{run.folder}: {figures['fd_50']:.1f}")

        with ThreadPoolExecutor(self.jobs) as pool, self.stopped_by_signals():
            jobs = [pool.submit(finish, run) for run in left]
            try:
                for job in as_completed(jobs):  # the first that fails says so, whatever else is going on
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return True

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """For Ctrl+C, SIGTERM and a closed terminal the time is up: no training is left behind."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.deadline = 0.0

        kinds = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        before = {kind: signal.signal(kind, stop) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def run(self, run: Run, folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
        """Train a model in a folder, measure it, and add its line; returns its figures. Raises [`TimeUp`]."""
        words = self.train(folder, flags)
        figures = folder / "figures.json"
        if not figures.exists():
            options = folder, self.folder / run.teacher, self.folder, run.samples, words, figures
            options += self.scale.device, self.scale.clip_sample

            def start_measuring() -> BaseProcess:
                process = self.context.Process(target=measure, args=options)
                process.start()
                return process

            code = self.complete(start_measuring)
            if code:
                fail(f"{folder} could not be measured: exit code {code}")
        line = self.describe(run, folder, json.loads(figures.read_text()))
        with self.writing, self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line["figures"]

    def describe(self, run: Run, folder: Path, figures: dict[str, Any]) -> dict[str, Any]:
        """The line of a finished run."""
        rows = read_metrics(folder / "metrics.jsonl")
        last, device = rows[-1], describe_device(torch.device(self.scale.device))
        return {
            **run._asdict(),
            "commit": commit(),
            "machine": f"{device}, a thread per run, torch {torch.__version__}",
            "last": {name: last[name] for name in ("step", "loss", "task", "kd", "kd_mse", "feat") if name in last},
            "images_per_second": float(np.median([row["images_per_second"] for row in rows[1:]])),
            "figures": figures,
        }


def commit() -> str:
    """The commit that the code is of."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------------------ the figures


def moments_of(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features (N, D), as `frechet_distance` takes them."""
    return features.mean(0), np.cov(features, rowvar=False)


@torch.no_grad()
def measure(
    folder: Path,
    teacher: Path,
    study: Path,
    samples: int,
    words: list[str],
    figures: Path,
    device: str = "cpu",
    clip_sample: bool = True,
) -> None:
    """Distances of a run's samples to unseen images, and its errors to the teacher by timestep, as a JSON file.

    "fd_N" and "kid_N" are the Fréchet and the kernel distance of samples by N steps of DDIM, "curve" has fd_10 of each
    checkpoint by its training step; "errors" has the mean square difference of the predictions, "shifts" that of their
    means over an image, and "gradients" the share of the loss's gradient, for each of [`TIMESTEPS`].

    Args:
        folder: Of the run.
        samples: How many are drawn; each point of the curve is of [`CURVE_SAMPLES`].
        words: The command line of the run.
        device: That the models run on.
        clip_sample: Of DDIM.
    """
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # its own default would round what the others do not
    classifier = torch.jit.load(str(study / "classifier.pt")).eval()
    unseen = torch.from_numpy(np.load(study / "unseen.npy")).float().unsqueeze(1)
    reference = classifier(unseen)[0].numpy()
    moments = moments_of(reference)
    pipeline = DDPMPipeline.from_pretrained(folder)
    sampler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=clip_sample)

    def distance(features: np.ndarray) -> float:
        return frechet_distance(*moments_of(features), *moments)

    def features_of(model: UNet2DModel, steps: int, count: int) -> np.ndarray:
        return classifier(sample(model.eval(), sampler, steps, count))[0].numpy()

    student = pipeline.unet.to(device).eval()
    result: dict[str, Any] = {"parameters": student.num_parameters(), "curve": {}}
    for steps in SAMPLING_STEPS:
        features = features_of(student, steps, samples)
        result[f"fd_{steps}"] = distance(features)
        result[f"kid_{steps}"] = kernel_inception_distance(features, reference, seed=0)
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints:
        if step_of(checkpoint) % interval_of(words) and checkpoint != checkpoints[-1]:
            continue  # a slice of time ended there
        model = UNet2DModel.from_pretrained(checkpoint / "unet_ema").to(device)
        result["curve"][str(step_of(checkpoint))] = distance(features_of(model, 10, CURVE_SAMPLES))
    original = UNet2DModel.from_pretrained(teacher, subfolder="unet").to(device).eval()
    probes = unseen[:PROBES].to(device)
    result |= compare(student, original, probes)
    result["gradients"] = share_gradients(student, original, probes, words)
    figures.write_text(json.dumps(result))


def interval_of(words: list[str]) -> int:
    """The steps between the checkpoints of a run, by its command line; 1 where it does not say."""
    flag = "--checkpointing_steps"
    return int(words[words.index(flag) + 1]) if flag in words else 1


@torch.no_grad()
def sample(model: UNet2DModel, scheduler: SchedulerMixin, steps: int, count: int) -> torch.Tensor:
    """Samples, float32 (count, 1, side, side), whole numbers in [0, 255], from the same noise for all models.

    They are on the CPU.
    """
    batches = []
    for start in range(0, count, SAMPLE_BATCH):
        seeds = range(start, min(start + SAMPLE_BATCH, count))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (1, 1, *[model.config.sample_size] * 2)
        batches.append(denoise(plain_unet(model), scheduler, shape, generators, steps, model.device).cpu())
    return ((torch.cat(batches) / 2 + 0.5).clamp(0, 1) * 255).round()


def compare(student: UNet2DModel, teacher: UNet2DModel, images: torch.Tensor) -> dict[str, list[float]]:
    """The student's errors to the teacher on noisy images, float32 (N, 1, side, side) in [0, 255], by timestep."""
    schedule, errors = DDPMScheduler(), {"errors": [], "shifts": []}
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    for timestep in TIMESTEPS:
        timesteps = torch.full((len(images),), timestep, device=images.device)
        noisy = schedule.add_noise(images / 127.5 - 1, noise, timesteps)
        difference = student(noisy, timesteps).sample - teacher(noisy, timesteps).sample
        errors["errors"].append(difference.square().mean().item())
        errors["shifts"].append(difference.mean((1, 2, 3)).square().mean().item())
    return errors


def share_gradients(student: UNet2DModel, teacher: UNet2DModel, images: torch.Tensor, words: list[str]) -> list[float]:
    """How the gradient of a run's loss in the prediction is shared among [`TIMESTEPS`]: of its square, the sum is 1.

    Args:
        images: Float32 (N, 1, side, side) in [0, 255]; one batch with each timestep as often as the others.
        words: The command line of the run.
    """
    args = train_lift_unet.parse_args(words)
    schedule = DDPMScheduler()
    timesteps = torch.tensor(TIMESTEPS, device=images.device).repeat(len(images) // len(TIMESTEPS))
    images = images[: len(timesteps)]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    inputs = {"sample": schedule.add_noise(images / 127.5 - 1, noise, timesteps), "timestep": timesteps}
    prediction = student(**inputs).sample.requires_grad_()
    with torch.enable_grad():
        loss, _ = train_lift_unet.compute_losses(
            lambda **inputs: (prediction, []),
            FeatureModel(teacher, []),
            {},
            1.0,
            lambda batch: (inputs, noise),
            make_kd_loss(args.kd_loss, args.group_size, args.group_by, args.coarse_norm, args.kd_weighting),
            (args.lambda_task, args.lambda_kd_output, 0),
            args.reduction,
            args.task_loss,
            min_snr_weights(schedule, args.snr_gamma, images.device),
        )
        gradient = torch.autograd.grad(loss, prediction)[0]
    squares = gradient.flatten(1).square().sum(1).view(-1, len(TIMESTEPS)).sum(0)
    return (squares / squares.sum()).tolist()
