# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""The published comparison of pixel models, by one command: students of a published teacher, and their FID.

    python benchmarks/published.py --teacher celeba-64-ddpm --data celeba-64/train --output_dir published-celeba
    python benchmarks/published.py --teacher cifar10-ddpm-ema --data cifar10/train --output_dir published \
        --student pruned_30 --sampler ddim_quad

It launches the project's own scripts and prints their commands: each student is trained by the published recipe, in
float32, which is the defaults of train_lift_unet.py but for the criterion of pruning, and draws 50,000 images by 100
steps of DDIM, whose timesteps are spaced quadratically for CIFAR-10. The table with FID and KID to the data is
results.md. Stopped, the same command goes on. Flags after -- go to the trainings:

    python benchmarks/published.py --teacher teacher --data images --output_dir published -- --mixed_precision bf16

What no flag can give: the published CIFAR-10 teacher has the averaged weights of DDPM's authors, while
google/ddpm-cifar10-32 has those of the last step, and a FID several points higher. CelebA must be cropped as the
teacher's images were: the scripts take the centre of what is in the folder.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import fail


ROOT = Path(__file__).resolve().parents[1]
# With the published term of features, but for the controls: no teacher, a robust loss, and features alone.
LOSSES = {
    "none": ("--kd_loss", "none"),
    "none-rms": ("--kd_loss", "none", "--task_loss", "rms"),
    "fitnet": ("--kd_loss", "mse", "--lambda_kd_output", "0", "--lambda_kd_feat", "1"),
    "mse": ("--kd_loss", "mse"),
    "rms": ("--kd_loss", "rms"),
    "lift": ("--kd_loss", "lift"),
    "place": ("--kd_loss", "place"),
}
# As published, of students of 70, 50, 30 and 10 % of the channels; that of 1.6 % of the weights has 500,000, too.
STEPS = {"pruned_30": 100_000, "pruned_50": 200_000, "pruned_70": 240_000, "pruned_90": 500_000}


def run(*command: object) -> None:
    """Run a command of this project, having printed it."""
    words = [str(word) for word in command]
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    code = subprocess.run([sys.executable, *words]).returncode
    if code:
        script = next(word for word in words if word.endswith(".py"))
        fail(f"{script} ended with exit code {code}: its messages are above; mend that, and pass the same flags again")


def launch(script: str, *flags: object) -> None:
    """`accelerate launch`, by the user's own accelerate config."""
    run("-m", "accelerate.commands.launch", ROOT / script, *flags)


def train(args: argparse.Namespace, loss: str, seed: int) -> Path:
    """A student by one loss, unless it is there; returns its folder."""
    folder = args.output_dir / "students" / f"{loss}-{seed}"
    if not (folder / "model_index.json").exists():
        source = "--train_data_dir" if Path(args.data).exists() else "--dataset_name"
        flags = ("--pretrained_teacher_model", args.teacher, source, args.data, "--student", args.student)
        steps = args.max_train_steps or STEPS.get(args.student, 500_000)
        flags += ("--output_dir", folder, "--seed", seed, "--max_train_steps", steps)
        flags += ("--image_column", args.image_column, "--resume_from_checkpoint", "latest")
        flags += ("--student_init", "diffusion", "--mixed_precision", "no")
        launch("train_lift_unet.py", *flags, *LOSSES[loss], *args.flags)
    return folder


def generate(args: argparse.Namespace, model: str | Path, name: str) -> Path:
    """Draw a model's images by the protocol, those that are not there; returns their folder."""
    folder = args.output_dir / "images" / name
    flags = ("--model", model, "--output_dir", folder, "--num_images", args.num_images)
    flags += ("--batch_size", args.batch_size, "--sampler", args.sampler, "--num_inference_steps", 100)
    launch("eval/generate.py", *flags)
    return folder


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or `input_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id of a DDPM pipeline")
    parser.add_argument("--data", required=True, help="folder of its images, or a dataset on the Hub")
    parser.add_argument("--image_column", default="image", help="its column with the images (default: image)")
    parser.add_argument("--output_dir", type=Path, required=True, help="of students, images and results.md")
    parser.add_argument("--student", default="extreme", help="as in train_lift_unet.py (default: extreme, 1.6 %%)")
    steps = "default: as published for the student, 500000 for one that is not"
    parser.add_argument("--max_train_steps", type=int, help=f"of each student ({steps})")
    parser.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES), help="default: all")
    parser.add_argument("--seeds", type=int, default=1, help="students by each loss (default: 1, as published)")
    parser.add_argument("--num_images", type=int, default=50_000, help="of each model (default: 50000, as published)")
    parser.add_argument("--sampler", default="ddim", choices=("ddim", "ddim_quad"), help="(default: ddim)")
    parser.add_argument("--batch_size", type=int, default=250, help="images drawn at once (default: 250)")
    parser.add_argument("--features", help="a TorchScript file in place of Inception, as in eval/evaluate.py")
    parser.add_argument("flags", nargs="*", help="after --: further flags of the trainings")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Train, draw and measure what is not there yet."""
    images = [generate(args, args.teacher, "teacher")]
    for seed in range(args.seeds):
        for loss in args.losses:
            images.append(generate(args, train(args, loss, seed), f"{loss}-{seed}"))
    features = ("--features", args.features) if args.features else ()
    # Real images as the models know them: photographs of other shapes would be squeezed into squares.
    side = Image.open(next(images[0].glob("*.png"))).width
    data = ("--reference", args.data, "--reference_resolution", side, "--image_column", args.image_column)
    where = (*data, "--metrics", "fid", "kid", "--output", args.output_dir / "results", "--num_workers", 4)
    run(ROOT / "eval/evaluate.py", "--images", *images, *where, *features)


if __name__ == "__main__":
    main(parse_args())
