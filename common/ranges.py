# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which numbers may a flag take?"""

import math
from typing import NamedTuple


class Range(NamedTuple):
    """What the number of a flag may be; infinity and NaN are in no range."""

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        low = f"more than {self.low}" if self.without_low else f"at least {self.low}"
        high = f" and less than {self.high}" if self.without_high else f" and at most {self.high}"
        return low + (high if math.isfinite(self.high) else "")


ANY, COUNT, NOT_NEGATIVE, POSITIVE = Range(-math.inf), Range(1), Range(0), Range(0, without_low=True)
SHARE, DECAY = Range(0, 1), Range(0, 1, without_high=True)
SIDE, STEPS = Range(1, 8192), Range(1, 1000)  # of an image, in pixels; of a sampler
SEED, PROCESSES = Range(0, 2**32 - 1), Range(0, 256)

# Every flag of the scripts and of eval/ that takes a number.
RANGES = {
    **dict.fromkeys(("max_train_steps", "max_train_samples", "train_batch_size", "batch_size"), COUNT),
    **dict.fromkeys(("checkpointing_steps", "validation_steps", "logging_steps", "checkpoints_total_limit"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "num_validation_images", "encoding_batch_size"), COUNT),
    **dict.fromkeys(("student_depth", "num_images", "columns", "latency_images", "cache_teacher"), COUNT),
    "num_processes": COUNT,
    "shuffle_buffer": COUNT,
    **dict.fromkeys(("resolution", "resize", "reference_resolution", "features_size"), SIDE),
    **dict.fromkeys(("num_inference_steps", "timesteps"), STEPS),
    **dict.fromkeys(("max_unreadable", "caption_dropout", "label_dropout", "kd_alpha"), SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay"), DECAY),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "logit_std", "snr_gamma"), POSITIVE),
    **dict.fromkeys(("learning_rate", "adam_weight_decay", "lr_warmup_steps", "lora_rank"), NOT_NEGATIVE),
    **dict.fromkeys(("lambda_task", "lambda_kd_output", "lambda_kd_feat", "guidance_scale"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "num_workers"), PROCESSES),
    **dict.fromkeys(("logit_mean", "mode_scale"), ANY),
    "num_train_epochs": POSITIVE,
    "seed": SEED,
    "group_size": Range(2),
    "max_sequence_length": Range(1, 512),  # what StableDiffusion3Pipeline takes
}
