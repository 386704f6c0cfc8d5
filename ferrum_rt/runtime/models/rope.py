"""Rotary position embeddings: the tables, for each of the scalings that checkpoints use."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import ModelError


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``rotary_dim`` of a head's dimensions are rotated. ``scaling`` is the config's own mapping, with its ``rope_type``."""

    theta: Annotated[float, msgspec.Meta(gt=0)]
    rotary_dim: Annotated[int, msgspec.Meta(ge=2, multiple_of=2)]
    scaling: dict[str, Any]


def cos_sin_table(spec: RopeSpec, num_positions: int) -> Tensor:
    """float32 [num_positions, rotary_dim]: cosines, then sines."""
    frequencies, magnitude = _frequencies(spec)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * magnitude
    if not table.isfinite().all():
        raise ModelError(f"config.json: rope scaling {spec.scaling['rope_type']!r} has values that lead to no finite angles")
    return table


def _frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    base = torch.pow(spec.theta, exponents).reciprocal()
    kind = spec.scaling.get("rope_type", "default")
    try:
        match kind:
            case "default":
                return base, 1.0
            case "linear":
                return base / float(spec.scaling["factor"]), 1.0
            case "llama3":
                return _llama3(base, spec.scaling), 1.0
            case "yarn":
                return _yarn(base, spec)
    except KeyError as error:
        raise ModelError(f"config.json: rope scaling {kind!r} needs the key {error}") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"config.json: rope scaling {kind!r} has a value that cannot be used: {error}") from error
    raise ModelError(f"config.json: rope scaling {kind!r} is not supported (default, linear, llama3 and yarn are)")


def _llama3(base: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are slowed by ``factor``, short ones kept, those between blended."""
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * base / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    blended: Tensor = base / scaling["factor"] * (1 - blend) + base * blend
    return blended


def _yarn(base: Tensor, spec: RopeSpec) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): dimensions that turn often are kept, the others interpolated, and scores made sharper."""
    scaling = spec.scaling
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return spec.rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    ramp = (torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0.0, 1.0)
    frequencies = base / factor * interpolated + base * (1 - interpolated)
    return frequencies, _yarn_magnitude(scaling, factor)


def _yarn_magnitude(scaling: Mapping[str, Any], factor: float) -> float:
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(weight) / magnitude(weight_all) if weight and weight_all else magnitude(1.0)
