# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What `--dry_run` estimates for the students of published teachers: the memory and the hours in the docs.

    python benchmarks/dry_runs.py              # prints a table, and writes benchmarks/results/dry-runs.json

Nothing is trained or measured. The teachers are configs without weights (full_models.py), but for the pixel one.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from full_models import CELEBA, SD3_MEDIUM, SD35_LARGE, save_ddpm, save_dit, save_sd3, save_sd21, save_sdxl
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]

UNETS = "pruned_30", "pruned_50", "extreme"
BLOCKS = "bk_base", "bk_small", "bk_tiny", "bk_extreme"
WIDTHS = "width_256", "width_224", "width_192", "width_160", "width_128"
XL = "ssd_1b", "vega", "koala_1b", "koala_700m", "extreme", "width_80"
AS_PRINTED = (  # the commands of README.md's table of targets, but for the pixel U-Net's, which is among the others
    ("sd21", "sd21", "bk_tiny"),
    ("sdxl", "sdxl", "koala_700m"),
    ("dit", "dit", "d14"),
    ("sd3", "sd3-medium", "half"),
)
HALF = "--mixed_precision fp16 --cache_latents"
SD3 = "--resolution 512 --train_batch_size 4 --mixed_precision bf16 --gradient_checkpointing"


def list_runs() -> list[tuple[str, str, str]]:
    """Script, teacher and flags of each estimate."""
    runs = [(script, teacher, f"--student {student}") for script, teacher, student in AS_PRINTED]
    for student in UNETS:
        runs += [("unet", "celeba", f"--student {student}{more}") for more in ("", " --gradient_checkpointing")]
    for student in (*BLOCKS, *WIDTHS):
        flags = f"--student {student} {HALF} --use_ema"
        for more in (
            "--use_8bit_adam --gradient_checkpointing",
            "--use_8bit_adam",
            "--gradient_checkpointing --lora_rank 16",
        ):
            runs.append(("sd21", "sd21", f"{flags} {more}"))
    for student in XL:
        flags = f"--student {student} {HALF} --use_ema --gradient_checkpointing"
        for more in ("--use_8bit_adam", "--use_8bit_adam --cache_teacher 4 --lambda_kd_feat 0", "--lora_rank 16"):
            runs.append(("sdxl", "sdxl", f"{flags} {more}"))
    for student in ("d19", "d14", "d7", "d4"):
        flags = f"--student {student} {HALF} --use_8bit_adam --use_ema"
        runs += [("dit", "dit", f"{flags}{more}") for more in (" --gradient_checkpointing", "")]
    for student in ("half", "third", "sixth"):
        runs.append(("sd3", "sd3-medium", f"--student {student} {SD3} --use_8bit_adam"))
    for lora in ("--lora_rank 64", "--lora_rank 64 --share_backbone"):
        for teacher in ("sd3-medium", "sd3.5-large"):
            runs.append(("sd3", teacher, f"--student half {SD3} --use_8bit_adam {lora}"))
    return runs


def save_teachers(folder: Path) -> dict[str, Path]:
    """Write the teachers into a folder; returns their folders by name."""
    return {
        "celeba": save_ddpm(folder / "celeba", **CELEBA),
        "sd21": save_sd21(folder / "sd21"),
        "sdxl": save_sdxl(folder / "sdxl"),
        "dit": save_dit(folder / "dit"),
        "sd3-medium": save_sd3(folder / "sd3-medium", SD3_MEDIUM),
        "sd3.5-large": save_sd3(folder / "sd3.5-large", SD35_LARGE),
    }


def estimate(script: str, teacher: Path, flags: str) -> dict:
    """One dry run's figures."""
    command = [f"train_lift_{script}.py", "--pretrained_teacher_model", str(teacher), *shlex.split(flags), "--dry_run"]
    text = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout

    def number(pattern: str) -> float:
        return float(re.search(pattern, text)[1].replace(",", ""))

    hours = re.findall(r"^  (.+?), at .* TFLOP/s +([\d.,]+) h$", text, re.M)
    found = {
        "parameters": int(number(r"student: ([\d,]+) parameters")),
        "GMACs": round(number(r"student: [\d,]+ parameters, ([\d,]+) MACs") / 1e9, 1),
        "MiB": number(r"\n  sum +([\d.,]+) MiB"),
        "GiB": round(number(r"\n  sum +([\d.,]+) MiB") / 1024, 1),
        "FLOPs": number(r" are ([\d.e+]+) FLOPs"),
        "hours": {card: float(time.replace(",", "")) for card, time in hours},
    }
    beforehand = [float(size.replace(",", "")) for size in re.findall(r"^beforehand, .*: ([\d.,]+) MiB", text, re.M)]
    if beforehand:
        found["GiB beforehand"] = round(max(beforehand) / 1024, 1)
    return found


def main(args: argparse.Namespace) -> None:
    """Run all, print a table, write the JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teachers = save_teachers(Path(folder))
        for script, teacher, flags in tqdm(list_runs(), desc="dry runs"):
            rows.append({"script": script, "teacher": teacher, "flags": flags})
            rows[-1] |= estimate(script, teachers[teacher], flags)
    print("| run | parameters | GMACs | memory | " + " | ".join(rows[0]["hours"]) + " |")
    print("|---|--:|--:|--:|" + "--:|" * len(rows[0]["hours"]))
    for row in rows:
        hours = " | ".join(f"{time:,.0f} h" for time in row["hours"].values())
        name = f"{row['teacher']}: `{row['flags']}`"
        print(f"| {name} | {row['parameters'] / 1e6:,.1f}M | {row['GMACs']} | {row['GiB']} GiB | {hours} |")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "results" / "dry-runs.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
