"""The daemon's model if one is running, else one in this process: the code that uses it is the same.

ferrum-rt serve &
python examples/shared_model.py [SOCKET]
"""

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio

import ferrum_rt
from ferrum_rt import InferenceEngine


@asynccontextmanager
async def any_engine(socket: str | None) -> AsyncIterator[InferenceEngine]:
    async with AsyncExitStack() as stack:
        try:
            engine: InferenceEngine = await stack.enter_async_context(ferrum_rt.connect(socket))
        except ferrum_rt.NotFound as error:
            print(error, file=sys.stderr)
            engine = await stack.enter_async_context(ferrum_rt.open_runtime())
        yield engine


async def main(socket: str | None) -> None:
    async with any_engine(socket) as engine:
        async with engine.infer_stream("def read_lines(", max_tokens=48, temperature=0) as chunks:
            async for chunk in chunks:
                print(chunk.text, end="", flush=True)
        status = await engine.status()
        print(f"\n-- {status.requests.finished} requests answered in {status.uptime_s:.0f} s")


if __name__ == "__main__":
    anyio.run(main, sys.argv[1] if len(sys.argv) > 1 else None)
