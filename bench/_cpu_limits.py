"""What the machine allows at most: the least time in which a decoder's weights can be read and its products computed."""

import time
from typing import NamedTuple

from bench._cpu_engines import Shape

WEIGHT_BYTES = {"bf16": 2, "int8": 1}
"""Per weight; scales are not counted."""

KV_BYTES = 2


class Machine(NamedTuple):
    """Bytes read per second, and operations per second (two to a multiplication and an addition) by the weights' width."""

    read_bytes_per_s: float
    operations_per_s: dict[str, float]


def read_bandwidth(num_bytes: int, passes: int = 7) -> float:
    """Bytes per second: the fastest of so many sums over as many bytes, which are to be more than the caches hold."""
    import torch

    data = torch.ones(num_bytes // 8, dtype=torch.int64)
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return data.nbytes / min(seconds)


def least_seconds(config: dict[str, int], width: str, shape: Shape, machine: Machine) -> float:
    """From the prompts of ``shape`` to its last tokens. A step takes as long as reading or computing, whichever is longer.

    All prompts are one step, with logits for their last tokens alone. A step reads every weight once, and keys and values
    in two bytes each. Attention is computed at the rate of bf16 whatever the width.
    """
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    dim, kv_heads, hidden = config["head_dim"], config["num_key_value_heads"], config["hidden_size"]
    layer_weights = layers * hidden * (2 * (heads + kv_heads) * dim + 3 * config["intermediate_size"])
    head_weights = hidden * config["vocab_size"]

    def step(tokens: int, pairs: int, context: int) -> float:
        """So many tokens, pairs of tokens that attend to each other, and tokens whose keys and values are read."""
        products = 2 * (layer_weights * tokens + head_weights * shape.requests)
        attention = 4 * layers * heads * dim * pairs
        num_bytes = WEIGHT_BYTES[width] * (layer_weights + head_weights) + KV_BYTES * 2 * layers * kv_heads * dim * context
        rates = machine.operations_per_s
        return max(products / rates[width] + attention / rates["bf16"], num_bytes / machine.read_bytes_per_s)

    requests, prompt = shape.requests, shape.prompt_tokens
    seconds = step(requests * prompt, requests * prompt * (prompt + 1) // 2, 0)
    for context in range(prompt + 1, shape.length):
        seconds += step(requests, requests * context, requests * context)
    return seconds
