# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""What is computed from features and scores: each figure with its number of samples and its warning."""

from typing import NamedTuple

import numpy as np
import torch
from cleanfid.fid import kernel_distance
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric


FEW = 10_000  # with fewer images a Fréchet distance is clearly too high, and for some models more than for others
KID_SUBSET = 1_000  # images in each of clean-fid's random subsets
SPLITS = 10  # of the Inception score
FULL_INCEPTION_SCORE = 50_000  # images that its authors ask for (Salimans et al. 2016, arXiv 1606.03498)
FEW_SCORES = 1_000  # with fewer the standard error of a mean score is said
# Of CMMD, in the code of its authors.
BANDWIDTH, CMMD_SCALE = 10.0, 1000.0
BLOCK = 512  # rows of a kernel matrix that are in memory at a time
BIASED = 0.05  # a share of the CMMD that its bias may be without a warning


class Statistics(NamedTuple):
    """The statistics of a set of images that the figures are computed from."""

    count: int  # of images; 0 if unknown
    size: list[int]  # width and height; empty if unknown
    mean: np.ndarray  # float64 (D,)
    covariance: np.ndarray  # float64 (D, D)
    features: np.ndarray | None  # float32 (N, D) of some of the images; published statistics may come without
    logits: np.ndarray | None  # float32 (N, classes)
    source: str
    foreign: bool = False  # whether another program saved them, which may have resized the images otherwise


class Figure(NamedTuple):
    """A measured value, `None` if there is none, and what to keep in mind."""

    value: float | None
    samples: int
    reference_samples: int | None = None  # `None`: no reference, or one of unknown size
    warning: str | None = None


# ------------------------------------------------------------------------------------------------------- the distances


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Fréchet distance between two Gaussians of means (D,) and covariances (D, D), in float64.

    It needs the trace of the matrix root of A · B. That is the sum of the square roots of the eigenvalues of
    root(A) · B · root(A), which is symmetric.
    """
    a, b = (torch.from_numpy(np.asarray(matrix, np.float64)) for matrix in (covariance_a, covariance_b))
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    shift = float(np.square(np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)).sum())
    return max(0.0, shift + (a.trace() + b.trace() - 2 * cross).item())


def kernel_inception_distance(features: np.ndarray, reference_features: np.ndarray, seed: int) -> float:
    """clean-fid's KID between features (N, D) and (M, D); the seed chooses its random subsets."""
    state = np.random.get_state()  # clean-fid uses the global generator
    np.random.seed(seed)
    distance = kernel_distance(features.astype(np.float64), reference_features.astype(np.float64))
    np.random.set_state(state)
    return distance


def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean over all pairs of exp(−|a − b|² / 2σ²) − 1, with σ = 10, in float64.

    Kernels between embeddings of length 1 are close to 1, and CMMD is a small difference of their means. The 1, which
    cancels there, is left out, so that the rounding of float32 products is small beside it.

    Args:
        a: Embeddings, float32 (N, D).
        b: Embeddings, float32 (M, D).
    """
    total, squares = 0.0, b.square().sum(1)
    for block in a.split(BLOCK):
        distances = block.square().sum(1, keepdim=True) + squares - 2 * block @ b.T
        total += torch.expm1(distances / (-2 * BANDWIDTH**2)).sum(dtype=torch.float64).item()
    return total / (len(a) * len(b))


def clip_mmd(embeddings: np.ndarray, reference_embeddings: np.ndarray, device: torch.device) -> tuple[float, float]:
    """The CLIP maximum mean discrepancy between embeddings (N, D) and (M, D) (Jayasumana et al., arXiv 2401.09603).

    Its authors' estimator is the biased one, Equation 5 of Gretton et al. 2012: the mean over all pairs, an image with
    itself among them. A block of rows of the kernel matrix is in memory at a time.

    Returns:
        1000 times the squared discrepancy, and by how much the pairs of an image with itself raise it on average.
    """
    a, b = (torch.from_numpy(part).float().to(device) for part in (embeddings, reference_embeddings))
    within_a, within_b = mean_kernel(a, a), mean_kernel(b, b)
    # The kernel of an image with itself is 1, and adds 0 to these means; without those pairs they are N/(N − 1) times
    # as large.
    bias = -within_a / (len(a) - 1) - within_b / (len(b) - 1)
    distance = within_a + within_b - 2 * mean_kernel(a, b)
    return CMMD_SCALE * distance, CMMD_SCALE * bias


# --------------------------------------------------------------------------------------------------------- the figures


def below(limit: int, *counts: int | None) -> bool:
    """Whether one of the sets, of those of known size, has fewer than `limit` images."""
    return any(count is not None and count < limit for count in counts)


def measure_frechet(statistics: Statistics, reference: Statistics) -> Figure:
    """The Fréchet distance, or none where the covariance is singular: the number of images would be measured then."""
    # Means and covariances that other programs saved come without the number of images.
    known = reference.count or None
    counts, dimensions = (statistics.count, known), len(statistics.mean)
    if below(dimensions + 1, *counts):
        return Figure(None, *counts, f"not measured: too few images for a covariance of {dimensions:,} features")
    value = frechet_distance(statistics.mean, statistics.covariance, reference.mean, reference.covariance)
    warnings = [f"fewer than {FEW:,} images make it too high"] * below(FEW, *counts)
    # Without the antialiasing of clean-fid's resizing a distance is whole points another one.
    warnings += ["the reference's statistics are of another program, which may resize otherwise"] * reference.foreign
    return Figure(value, *counts, "; ".join(warnings) or None)


def measure_kernel(statistics: Statistics, reference: Statistics, seed: int) -> Figure:
    """KID, or none where the reference comes without features."""
    if reference.features is None:
        return without_features(statistics)
    counts = len(statistics.features), len(reference.features)
    warning = f"fewer than {KID_SUBSET:,} images, the size of its subsets, make it noisy"
    value = kernel_inception_distance(statistics.features, reference.features, seed)
    return Figure(value, *counts, warning if below(KID_SUBSET, *counts) else None)


def measure_clip_mmd(statistics: Statistics, reference: Statistics, device: torch.device) -> Figure:
    """CMMD, with a warning where its bias is a large part of it."""
    if reference.features is None:
        return without_features(statistics)
    counts = len(statistics.features), len(reference.features)
    value, bias = clip_mmd(statistics.features, reference.features, device)
    warning = f"so few images raise it by about {bias:.2g}" if bias > BIASED * value else None
    return Figure(value, *counts, warning)


def measure_manifolds(statistics: Statistics, reference: Statistics) -> dict[str, Figure]:
    """Precision and recall with 3 neighbours, by torch-fidelity."""
    names = ("precision", "recall")
    if reference.features is None:
        return dict.fromkeys(names, without_features(statistics))
    counts = len(statistics.features), len(reference.features)
    if min(counts) <= 3:
        return dict.fromkeys(names, Figure(None, *counts, "not measured: 3 neighbours need 4 images or more"))
    # Around the reference's mean: squares of features far from zero would leave float32 few digits for distances.
    pair = (torch.from_numpy(own.features - reference.mean).float() for own in (statistics, reference))
    values = prc_features_to_metric(*pair, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    warning = f"fewer than {FEW:,} images: compare only with sets as large" if below(FEW, *counts) else None
    return {name: Figure(values[name], *counts, warning) for name in names}


def without_features(statistics: Statistics) -> Figure:
    """No figure, because the reference's statistics are a mean and a covariance alone."""
    return Figure(None, statistics.count, None, "not measured: the reference's statistics come without features")


def measure_inception_score(statistics: Statistics, seed: int) -> Figure:
    """The Inception score over 10 splits, by torch-fidelity; none where the extractor gives no logits."""
    count = statistics.count
    if statistics.logits is None:
        return Figure(None, count, warning="not measured: the extractor returns no logits")
    if count < SPLITS:
        return Figure(None, count, warning=f"not measured: {SPLITS} splits need as many images")
    # torch-fidelity multiplies each probability by its logarithm, so 0 gives NaN. e⁻¹⁰⁰ does not change the score.
    logits = torch.from_numpy(statistics.logits).double().log_softmax(1).clamp(min=-100)
    value = isc_features_to_metric(logits, splits=SPLITS, rng_seed=seed)["inception_score_mean"]
    few = below(FULL_INCEPTION_SCORE, count)
    return Figure(value, count, warning=f"fewer than {FULL_INCEPTION_SCORE:,} images make it too low" if few else None)


def average_scores(scores: np.ndarray) -> Figure:
    """The mean of the scores, float64 (N,), of single images."""
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("inf")
    few = below(FEW_SCORES, len(scores))
    warning = f"fewer than {FEW_SCORES:,} images: standard error {error:.2g}" if few else None
    return Figure(float(scores.mean()), len(scores), warning=warning)
