"""Shapes of known models, for random weights: no checkpoint has to be on the machine."""

import json
from pathlib import Path
from typing import Any

from bench._common import TINY, qwen3_config

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": qwen3_config(),
    "Llama-3.2-1B": {
        **_LLAMA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}
"""A config.json by the name of the model that it is shaped like; without an end token."""


def write_model(name: str, directory: Path, *, is_tiny: bool = False) -> Path:
    """A directory with the config.json alone, to be loaded with ``load_format="dummy"``; ``is_tiny`` keeps the family."""
    config = {**CONFIGS[name], **(TINY if is_tiny else {})}
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def read_config(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    return config


def decode_bytes(config: dict[str, Any]) -> int:
    """Of weights that a decode of one token reads, in 16 bits: all but an embedding that is not the output's too."""
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    per_layer = hidden * (2 * q + 2 * kv) + 3 * hidden * wide
    num_bytes: int = 2 * (layers * per_layer + config["vocab_size"] * hidden)
    return num_bytes
