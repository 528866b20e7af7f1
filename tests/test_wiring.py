"""What each script's `main` hands to its steps: the flags' values, the teacher's own, and new noise every time."""

import importlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from lift_utils import lift_place_loss


# No value is its flag's default.
LAMBDAS = {"lambda_task": 0.3, "lambda_kd_output": 0.7, "lambda_kd_feat": 0.2}
CAPTIONS = {"random_flip": True, "caption_dropout": 0.25}
LEVELS = {"weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 0.7}
DRAWS = {
    "unet": {"random_flip": False, "antithetic_timesteps": False},
    "sd21": CAPTIONS,
    "dit": {"random_flip": False, "label_dropout": 0.25},
    "sd3": {**CAPTIONS, **LEVELS},
    "sdxl": CAPTIONS,
}
PROMPT = ("--validation_prompts", "a dark bag")
REST = {
    "unet": ("--student", 0.5, "--coarse_norm", "l2"),
    "sd21": ("--student", "bk_small", "--coarse_norm", "l2", *PROMPT),
    "dit": ("--keep_blocks", "1,3", "--coarse_norm", "l1"),
    "sd3": ("--student", "half", "--coarse_norm", "l2", "--max_sequence_length", 8, *PROMPT),
    "sdxl": ("--student", "extreme", "--coarse_norm", "l2", *PROMPT),
}
SHORT = (
    *("--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 2, "--report_to", "none"),
    *("--dataloader_num_workers", 0, "--group_by", "position", "--group_size", 8, "--kd_weighting", "cosine"),
)


def as_flags(values: dict) -> list:
    """`{"random_flip": False, "mode_scale": 0.7}` as `--no-random_flip --mode_scale 0.7`."""
    words = []
    for name, value in values.items():
        words.append(f"--no-{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            words.append(value)
    return words


@pytest.fixture(scope="module")
def seen() -> dict[str, list[SimpleNamespace]]:
    return {}


@pytest.fixture
def steps(script, seen, run, teachers, images, captioned, articles, tmp_path, monkeypatch) -> list[SimpleNamespace]:
    """What the script's `compute_losses` got and logged in two steps of two micro-steps, of a run made once.

    The teacher's noise schedule has 600 steps. No samples are drawn, and no pipeline is saved.
    """
    if script in seen:
        return seen[script]
    module = importlib.import_module(f"train_lift_{script}")
    compute_losses, found = module.compute_losses, []

    def spied(student, teacher, batch, progress, **values):
        draws, order = values["inputs_of"].keywords["draw"](2, torch.device("cpu")), []
        models = {"student": student, "teacher": teacher}
        hooks = [
            model.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, model in models.items()
        ]
        loss, logs = compute_losses(student, teacher, batch, progress, **values)
        for hook in hooks:
            hook.remove()
        found.append(SimpleNamespace(draws=draws, order=order, logs=logs, **values))
        return loss, logs

    monkeypatch.setattr(module, "compute_losses", spied)
    for name in ("log_validation", "save_pipeline"):
        monkeypatch.setattr(module, name, lambda *arguments, **options: None)
    teacher = shutil.copytree(teachers[script], tmp_path / "teacher")
    config = teacher / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 600}))
    data = {"unet": images, "dit": articles}.get(script, captioned)
    where = ("--pretrained_teacher_model", teacher, "--train_data_dir", data, "--output_dir", tmp_path / "student")
    weights = {"kd_alpha": 0.7, "lambda_kd_feat": 0.2} if script == "dit" else LAMBDAS
    run(f"train_lift_{script}", *where, *SHORT, *REST[script], *as_flags(DRAWS[script] | weights))
    return seen.setdefault(script, found)


@pytest.mark.parametrize("script", DRAWS, scope="module")
def test_every_micro_step_draws_anew(steps):
    """By whatever place in the run it differs: step, micro-step, or both."""
    assert len(steps) == 4
    for name in ("noise", "shares" if "shares" in steps[0].draws else "timesteps"):
        assert len({tuple(step.draws[name].flatten().tolist()) for step in steps}) == 4


@pytest.mark.parametrize("script", DRAWS, scope="module")
def test_the_teacher_predicts_before_the_student_holds_activations(steps):
    assert [step.order for step in steps] == [["teacher", "student"]] * 4


@pytest.mark.parametrize("script", DRAWS, scope="module")
def test_draws_obey_the_flags_and_the_schedule(script, steps):
    given = steps[0].inputs_of.keywords["draw"].keywords
    shape = (1, 16, 16) if script == "unet" else (4, 8, 8)
    length = {} if script == "sd3" else {"steps": 600}  # whose draws are shares of a schedule of any length
    assert given == {"shape": shape, **length, **DRAWS[script]}
    if script == "sd3":
        assert steps[0].weighting_scheme == LEVELS["weighting_scheme"]  # of the loss, too


@pytest.mark.parametrize("script", DRAWS, scope="module")
def test_the_output_term_obeys_the_flags(script, steps):
    predictions = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    norm = "l1" if script == "dit" else "l2"
    weight = (1 - math.cos(math.pi / 4)) / 2  # a quarter of the run is done
    expected = lift_place_loss(*predictions, group_size=8, norm=norm, weighting=weight, group_by="position").loss
    torch.testing.assert_close(steps[0].kd_loss(*predictions, 0.25)[0], expected)


@pytest.mark.parametrize("script", ["unet", "sd21", "sd3", "sdxl"], scope="module")  # for dit, see test_dit.py
def test_the_loss_is_the_terms_by_the_flags(steps):
    for logs in (step.logs for step in steps):
        assert min(logs[name].item() for name in ("task", "kd", "feat")) > 0
        torch.testing.assert_close(logs["loss"], 0.3 * logs["task"] + 0.7 * logs["kd"] + 0.2 * logs["feat"])


@pytest.mark.parametrize("script", ["sd21", "sd3", "sdxl"], scope="module")
def test_no_caption_is_what_the_pipeline_takes_for_it(script, steps, teachers):
    pipeline = DiffusionPipeline.from_pretrained(teachers[script])
    further = {"sd21": ("cpu", 1, True), "sd3": (None, None), "sdxl": ()}[script]
    length = {"max_sequence_length": 8} if script == "sd3" else {}
    with torch.no_grad():
        expected = pipeline.encode_prompt("a dark bag", *further, **length)[1::2]  # without the prompt's own
    given = steps[0].inputs_of.keywords["no_text"]
    given = [given] if script == "sd21" else given.values() if script == "sdxl" else given
    torch.testing.assert_close([*given], [rows[0] for rows in expected], rtol=0, atol=1e-6)
