"""What can come out besides text: JSON by a schema, several samples with their log-probabilities, one's own rules.

Run it with ``python examples/outputs.py``.
"""

import json
import math
from typing import Any

import anyio
from torch import Tensor

import ferrum_rt
from ferrum_rt import TokenId

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


class NoRepeats:
    """A LogitsProcessor: no token comes twice."""

    def apply(self, token_ids: list[TokenId], logits: Tensor) -> Tensor:
        logits[token_ids] = -math.inf
        return logits


async def main() -> None:
    async with ferrum_rt.open_runtime() as engine:
        # JSON that a schema describes, whatever the model would have liked to write.
        form = {"type": "json_schema", "definition": SCHEMA}
        response = await engine.infer("config = ", max_tokens=80, temperature=1, seed=3, response_format=form)
        print(json.loads(response.text))

        # Three samples of one prompt, which is computed once, and how sure the model was of each one's first token.
        response = await engine.infer("import ", max_tokens=6, temperature=1, seed=1, n=3, logprobs=2)
        for output in response.outputs:
            assert output.logprobs is not None
            first = output.logprobs[0]
            others = ", ".join(repr(item.token) for item in first.top)
            print(f"{output.text!r} began with {first.token!r} at {first.logprob:.2f}; the likeliest were {others}")

        # A rule in Python. If it raised, this request would fail, and no other.
        response = await engine.infer("x = [1, ", max_tokens=12, temperature=0, logits_processors=[NoRepeats()])
        assert len(set(response.token_ids)) == 12
        print(f"{response.text!r} repeats nothing; the seed was {response.seed}")


if __name__ == "__main__":
    anyio.run(main)
