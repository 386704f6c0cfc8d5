"""ferrum-rt chat: a conversation, line by line."""

import argparse
import asyncio
import importlib
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress

import anyio
import anyio.to_thread

from ferrum_rt.cli.options import open_engine, sampling_params
from ferrum_rt.cli.output import report_error
from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.errors import ConnectionLost, FerrumError
from ferrum_rt.interfaces.types import ChatMessage, SamplingParams

PROMPT = ">>> "
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C cancels an answer"


def chat(arguments: argparse.Namespace) -> int:
    """Answer each line of standard input; on a terminal with a prompt before it."""
    params, opening = sampling_params(arguments), open_engine(arguments)
    anyio.run(_chat, opening, params, backend_options={"use_uvloop": True})
    return 0


async def _chat(opening: AbstractAsyncContextManager[InferenceEngine], params: SamplingParams) -> None:
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    async with opening as engine:
        with _Interrupts(PROMPT if is_interactive else "") as interrupts:
            await _Conversation(engine, params, interrupts, is_interactive=is_interactive).run()


class _Interrupts:
    """Ctrl-C cancels the answer that is being given; between answers it says how to leave."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._answer: anyio.CancelScope | None = None

    def __enter__(self) -> "_Interrupts":
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.remove_signal_handler(signal.SIGINT)

    @contextmanager
    def cancel_answer(self) -> Iterator[None]:
        with anyio.CancelScope() as self._answer:
            try:
                yield
            finally:
                self._answer = None

    def _interrupt(self) -> None:
        if self._answer is not None:
            self._answer.cancel()
        else:
            print(f"\n{HELP}", file=sys.stderr)
            print(self._prompt, end="", flush=True)


class _Conversation:
    """``history`` is what the model is shown: every question with its answer, as far as that was given."""

    def __init__(
        self, engine: InferenceEngine, params: SamplingParams, interrupts: _Interrupts, *, is_interactive: bool
    ) -> None:
        self._engine, self._params, self._interrupts = engine, params, interrupts
        self._is_interactive = is_interactive
        self._history: list[ChatMessage] = []

    async def run(self) -> None:
        if self._is_interactive:
            print(HELP)
            with suppress(ImportError):
                importlib.import_module("readline")  # from here on input() can edit and recall lines
        while (line := await self._read_line()) is not None:
            match line.strip():
                case "":
                    pass
                case "/exit":
                    return
                case "/reset":
                    self._history.clear()
                case question:
                    await self._exchange(question)

    async def _read_line(self) -> str | None:
        prompt = PROMPT if self._is_interactive else ""
        try:
            return await anyio.to_thread.run_sync(input, prompt, abandon_on_cancel=True)
        except EOFError:
            if self._is_interactive:
                print()
            return None

    async def _exchange(self, question: str) -> None:
        asked = [*self._history, ChatMessage(role="user", content=question)]
        try:
            answer = await self._answer(asked)
        except FerrumError as error:
            if not self._is_interactive or isinstance(error, ConnectionLost):
                raise  # a lost connection stays lost
            report_error(error)
        else:
            self._history = [*asked, ChatMessage(role="assistant", content=answer)]

    async def _answer(self, messages: list[ChatMessage]) -> str:
        pieces: list[str] = []
        try:
            with self._interrupts.cancel_answer():
                async with self._engine.infer_stream(messages, sampling_params=self._params) as chunks:
                    async for chunk in chunks:
                        pieces.append(chunk.text)
                        print(chunk.text, end="", flush=True)
        finally:
            print(flush=True)
        return "".join(pieces)
