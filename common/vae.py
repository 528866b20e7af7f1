# Copyright 2026 The LIFT and PLACE distillation authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Which VAE does `--vae` ask for, and how are pixels the latents of a pipeline like any other?"""

import math
from typing import Any

from common.cache import identify
from common.errors import fail, first_line
from common.loading import read_weights
from common.teachers import TeacherSource, check_weights, load_part, load_skeleton

import torch
from diffusers import AutoencoderKL


def load_vae(source: TeacherSource | None, vae: str | None, channels: int, skeleton: bool) -> AutoencoderKL:
    """The VAE that `--vae` asks for, in float32 on the CPU. One that does not fit the model ends the run.

    Args:
        source: The teacher; it may be `None` where there is a `vae`.
        vae: "none" for pixels, a folder or a Hub id, or `None` for the teacher's.
        channels: That the model takes.
        skeleton: Whether the teacher's comes without its weights, on the meta device.
    """
    if vae == "none":
        model = pixel_vae(channels)
    elif vae is None:
        model = (load_skeleton if skeleton else load_part)(source, AutoencoderKL, "vae").requires_grad_(False).eval()
    else:
        try:
            kind = AutoencoderKL.load_config(vae).get("_class_name", "AutoencoderKL")
            if kind != "AutoencoderKL":
                raise ValueError(f"it is a {kind}")
            model = read_weights(AutoencoderKL.from_pretrained, vae).float().eval()
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            fail(f"--vae {vae} does not load: {first_line(error)}; pass an AutoencoderKL, by a folder or a Hub id")
        check_weights(model, f"--vae {vae}")
    if model.config.latent_channels != channels or model.config.in_channels not in (1, 3):
        fail(
            f"--vae {vae} makes {model.config.latent_channels} channels of images with {model.config.in_channels}, "
            f"the model takes {channels}; pass a pair that fits, of grey or RGB images"
        )
    return model


def identify_vae(source: TeacherSource | None, vae: str | None) -> dict[str, Any]:
    """What tells one version of the VAE that `--vae` asks for from another. See [`load_vae`] and [`identify`]."""
    if vae is None:
        return identify(source.path, source.revision, ["vae"])
    return {"vae": "none"} if vae == "none" else identify(vae, None, ["."], index="config.json")


@torch.no_grad()
def pixel_vae(channels: int) -> AutoencoderKL:
    """A VAE that gives images back as they are, so that a pipeline of pixels is a DiTPipeline like any other.

    It carries each channel x as the pair (x, -x), since silu(x) - silu(-x) = x. Two large constants beside them fix
    what the normalisation divides by: the error is about 1e-6. Its residual blocks add nothing.
    """
    width, constant = 2 * channels + 2, 1000.0
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        block_out_channels=(width,),
        norm_num_groups=1,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    pairs = torch.eye(channels).repeat_interleave(2, 0)
    pairs[1::2] *= -1
    for name, parameter in vae.named_parameters():
        if "resnets" in name:
            parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        for part in (half.conv_in, half.conv_out, half.conv_norm_out):
            part.weight.zero_()
            part.bias.zero_()
        half.conv_in.weight[: 2 * channels, :, 1, 1] = pairs
        half.conv_in.bias[-2:] = torch.tensor([constant, -constant])
        half.conv_norm_out.weight.fill_(constant * math.sqrt(2 / width))
        half.conv_out.weight[:channels, : 2 * channels, 1, 1] = pairs.T
    vae.encoder.conv_out.bias[channels:] = -30  # the logarithm of the latents' variance
    return vae.requires_grad_(False).eval()
