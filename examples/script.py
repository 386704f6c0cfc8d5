"""The runtime in a script: a whole answer, a stream, and a batch.

Run it with ``python examples/script.py``.
"""

import anyio

import ferrum_rt


async def main() -> None:
    async with ferrum_rt.open_runtime() as engine:
        # One prompt, one answer.
        prompt = "if __name__ =="
        response = await engine.infer(prompt, max_tokens=12, temperature=0)
        print(f"{prompt}{response.text}")
        print(f"-- {response.usage.completion_tokens} tokens, ended by {response.finish_reason}\n")

        # The same, as it comes.
        prompt = "class Queue:"
        print(prompt, end="")
        async with engine.infer_stream(prompt, max_tokens=64, seed=7) as chunks:
            async for chunk in chunks:
                print(chunk.text, end="", flush=True)
        print("\n")

        # Many at once. A bad one comes back as its error, and the others as their answers.
        prompts: list[str | list[int]] = ["def main():", "for i in range(", [123_456_789], "try:"]
        results = await engine.infer_batch(prompts, max_tokens=12, temperature=0)
        for asked, result in zip(prompts, results, strict=True):
            if isinstance(result, ferrum_rt.FerrumError):
                print(f"{asked!r}: {result.code}: {result}")
            else:
                print(f"{asked!r} -> {result.text!r}")


if __name__ == "__main__":
    anyio.run(main)
