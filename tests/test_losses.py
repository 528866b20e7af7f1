"""The controls beside LIFT and PLACE: the root mean square, min-SNR weights, features alone, no teacher."""

import importlib
import json
import math
import re

from common.teachers import min_snr_weights

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from lift_utils import lift_place_loss, make_kd_loss, prediction_error


SHORT = (
    *("--train_batch_size", 4, "--gradient_accumulation_steps", 1, "--max_train_steps", 2, "--logging_steps", 1),
    *("--num_inference_steps", 1, "--report_to", "none", "--dataloader_num_workers", 0),
)


def test_the_root_is_each_samples_own():
    prediction, target = torch.zeros(3, 2, 2, 2), torch.zeros(3, 2, 2, 2)
    target[1], target[2] = 3.0, -4.0
    assert prediction_error(prediction, target).item() == pytest.approx((9 + 16) / 3)
    assert prediction_error(prediction, target, "rms").item() == pytest.approx((3 + 4) / 3, abs=1e-4)
    weights = torch.tensor([5.0, 1.0, 0.5])
    assert prediction_error(prediction, target, "mse", weights).item() == pytest.approx((9 + 8) / 3)
    assert prediction_error(prediction, target, "rms", weights).item() == pytest.approx((3 + 2) / 3, abs=1e-3)


def test_the_roots_gradient_is_as_long_for_small_errors():
    """That is what it changes: a sample counts by its direction, however near it is."""
    prediction = torch.zeros(2, 1, 4, 4, requires_grad=True)
    target = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 0.01)])
    lengths = {}
    for kind in ("mse", "rms"):
        (gradient,) = torch.autograd.grad(make_kd_loss(kind)(prediction, target, 0.0)[0], prediction)
        lengths[kind] = gradient.flatten(1).norm(dim=1)
    assert lengths["mse"][0] == pytest.approx(100 * lengths["mse"][1].item(), rel=1e-4)
    assert lengths["rms"][0] == pytest.approx(lengths["rms"][1].item(), rel=1e-2)


def test_half_precision_is_compared_in_float32():
    prediction, target = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16), torch.zeros(1, 1, 2, 2)
    assert prediction_error(prediction, target).item() == 90_000  # float16 ends at 65,504


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_papers(prediction_type):
    """min(SNR, γ) by what weight the loss on x_0 has in that on the prediction (Hang et al., 2023, section 3.4)."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    kept = scheduler.alphas_cumprod.double()
    snr = kept / (1 - kept)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    weights = min_snr_weights(scheduler, 5.0, torch.device("cpu"))
    torch.testing.assert_close(weights.double(), snr.clamp(max=5.0) / divisor, rtol=1e-4, atol=0)
    assert min_snr_weights(scheduler, None, torch.device("cpu")) is None


def test_no_signal_has_a_finite_weight():
    for prediction_type, last in (("epsilon", 1.0), ("v_prediction", 0.0)):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        weights = min_snr_weights(scheduler, 5.0, torch.device("cpu"))
        assert torch.isfinite(weights).all() and weights[-1].item() == pytest.approx(last, abs=1e-3)


def test_groups_take_no_weights():
    predictions = torch.randn(2, 2, 1, 8, 8)
    for kind in ("place", "lift"):
        with pytest.raises(ValueError, match="has no weights of samples; use mse or rms"):
            make_kd_loss(kind)(*predictions, 0.0, torch.ones(2))


def test_schedules_weigh_the_coarse_and_the_fine_term():
    """A quarter of the run is done."""
    weights = {"constant": (1, 1), "linear": (1, 0.25), "cosine": (1, (1 - math.cos(math.pi / 4)) / 2)}
    weights |= {"coarse_only": (1, 0), "fine_only": (0, 1)}
    predictions = torch.randn(2, 2, 4, 8, 8)
    parts = lift_place_loss(*predictions)
    for weighting, (coarse, fine) in weights.items():
        loss, _ = make_kd_loss("place", weighting=weighting)(*predictions, 0.25)
        torch.testing.assert_close(loss, coarse * parts.coarse + fine * parts.fine)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def distil(run, teacher, images, tmp_path):
    """`distil(*flags)` trains the pixel script for two steps; returns its first row, and the student's weights."""

    def start(*flags, output_dir: str = "student"):
        folder = tmp_path / output_dir
        source = ("--pretrained_teacher_model", teacher, "--train_data_dir", images, "--student", 0.5)
        where = ("--output_dir", folder, "--cache_dir", tmp_path / "cache", "--num_validation_images", 2)
        run("train_lift_unet", *source, *where, *SHORT, *flags)
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        return row, load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")

    return start


def test_a_run_by_the_root_logs_both(distil):
    plain, _ = distil("--kd_loss", "mse", "--lambda_kd_feat", 0)
    row, _ = distil("--kd_loss", "rms", "--task_loss", "rms", "--lambda_kd_feat", 0, output_dir="rms")
    assert row["kd_mse"] == pytest.approx(plain["kd_mse"])  # of the same student on the same batch
    assert row["kd"] == pytest.approx(256 * row["kd_mse"] ** 0.5, rel=0.3)  # the samples' errors are alike
    assert row["task"] == pytest.approx(plain["task"] ** 0.5 * 16, rel=0.3)
    assert row["loss"] == pytest.approx(row["task"] + row["kd"])


def test_weights_are_on_both_terms(distil):
    plain, _ = distil("--kd_loss", "mse", "--lambda_kd_feat", 0)
    huge, _ = distil("--kd_loss", "mse", "--lambda_kd_feat", 0, "--snr_gamma", 1e9, output_dir="huge")
    row, _ = distil("--kd_loss", "mse", "--lambda_kd_feat", 0, "--snr_gamma", 0.5, output_dir="weighted")
    assert huge["task"] == pytest.approx(plain["task"]) and huge["kd"] == pytest.approx(plain["kd"])  # ε: all are 1
    assert row["task"] < 0.95 * plain["task"] and row["kd"] < 0.95 * plain["kd"]
    assert row["kd_mse"] == pytest.approx(plain["kd_mse"])


def test_features_alone(distil):
    """A weight of 0 for the output: the student learns the features, and the error to the teacher is logged."""
    flags = ("--kd_loss", "mse", "--lambda_kd_output", 0, "--lambda_task", 0, "--lambda_kd_feat", 1)
    row, weights = distil(*flags)
    assert row["loss"] == pytest.approx(row["feat"]) and row["kd_mse"] > 0
    _, start = distil(*flags, "--learning_rate", 0, output_dir="start")
    changed = {name for name in weights if not torch.equal(weights[name], start[name])}
    assert "conv_in.weight" in changed and "conv_out.weight" not in changed  # which no feature depends on


@pytest.mark.parametrize("script", ["sd21", "dit", "sd3", "sdxl"])
def test_the_other_scripts_take_them(run, teachers, captioned, articles, tmp_path, monkeypatch, script):
    """The weights of min-SNR are the flag's, and are on both terms: weights of 0 leave nothing of them."""
    module = importlib.import_module(f"train_lift_{script}")
    compute_losses = module.compute_losses

    def spied(*arguments, inputs_of, **values):
        assert values["task_loss"] == "rms"
        if script != "sd3":
            given, scheduler = values["snr_weights"], inputs_of.keywords["scheduler"]
            assert torch.equal(given.cpu(), min_snr_weights(scheduler, 5.0, torch.device("cpu")))
            _, logs = compute_losses(*arguments, inputs_of, **{**values, "snr_weights": torch.zeros_like(given)})
            assert logs["task"] == logs["kd"] == 0
        return compute_losses(*arguments, inputs_of, **values)

    monkeypatch.setattr(module, "compute_losses", spied)
    data, *flags = {
        "sd21": (captioned, "--student", "bk_small", "--validation_prompts", "a bag", "--snr_gamma", 5),
        "dit": (articles, "--keep_blocks", "1,3", "--snr_gamma", 5),
        "sd3": (captioned, "--student", "half", "--no_t5", "--validation_prompts", "a bag"),
        "sdxl": (captioned, "--student", "extreme", "--validation_prompts", "a bag", "--snr_gamma", 5),
    }[script]
    source = ("--pretrained_teacher_model", teachers[script], "--train_data_dir", data, "--lambda_kd_feat", 0)
    where = ("--output_dir", tmp_path / "student", "--cache_dir", tmp_path / "cache")
    run(f"train_lift_{script}", *source, *where, *SHORT, *flags, "--kd_loss", "rms", "--task_loss", "rms")
    row = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kd_mse"] > 0 and row["kd"] == pytest.approx(row["kd_mse"] ** 0.5, rel=0.5)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "root mean squared error of each image to the teacher's output; rms on the data" in card
    assert ("min-SNR-5 weights" in card) == (script != "sd3")


@pytest.mark.parametrize("kind", ["place", "lift"])
def test_weights_with_groups_are_refused(distil, kind):
    says = f"error: --snr_gamma 5.0 is not for --kd_loss {kind}; pass mse, rms or none, or drop it"
    with pytest.raises(SystemExit, match=f"^{re.escape(says)}$"):
        distil("--kd_loss", kind, "--snr_gamma", 5)
