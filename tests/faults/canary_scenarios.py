"""Ways through the engine, with canaries in everything that a caller says: ``python -m tests.faults.canary_scenarios`` goes
them all, and prints what each has told, and what of that it should not have, as JSON."""

import asyncio
import json
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

import ferrum_rt
from ferrum_rt.interfaces.config import EngineConfig, build_config
from ferrum_rt.interfaces.engine import InferenceEngine
from ferrum_rt.interfaces.errors import (
    BackendError,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    EngineFailed,
    FerrumError,
    RequestValidationError,
    ResourceExhausted,
    TokenizerError,
)
from ferrum_rt.interfaces.types import ChatMessage, FinishReason, RequestId, SessionId
from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Hello
from ferrum_rt.runtime.loading.loader import LoadedModel
from ferrum_rt.runtime.runtime import Runtime
from ferrum_rt.runtime.text.chat_template import ChatTemplate
from tests.daemon.serving import daemon
from tests.fakes.daemon import _BrokenExecutor, daemon_process
from tests.fakes.executor import fake_model
from tests.faults.canary import Canaries, Told, planted, without_captured
from tests.faults.quoting import quoting_engine
from tests.runtime.engines import fake_engine, text_after, until

Scenario = Callable[[Canaries, Told], Awaitable[None]]
SLOW: dict[str, Any] = {"step_s": 0.002}
HOT: dict[str, Any] = {"temperature": 100.0, "seed": 1, "ignore_eos": True}  # words that stand nowhere else


# -- what is right --------------------------------------------------------------------------------------------------------


async def _all_calls(said: Canaries, engine: InferenceEngine) -> None:
    """Every call there is, and every field that holds words."""
    prompt = said.prompt("prompt")
    words: dict[str, Any] = {
        "stop": [said.text("stop string")],
        "bad_words": [said.text("bad word")],
        "metadata": {"note": said.text("metadata")},
    }
    assert (await engine.infer(prompt, max_tokens=40, **words)).text == text_after(prompt, 40)
    cut = text_after(prompt, 40)[20:24]
    assert (await engine.infer(prompt, max_tokens=40, stop=[cut], include_stop=True)).finish_reason is FinishReason.STOP
    await engine.infer(list(said.prompt("token ids").encode()), max_tokens=40)
    await engine.infer(said.prompt("samples"), n=3, max_tokens=40)
    await engine.infer_batch([said.prompt("batch"), said.prompt("batch, too")], max_tokens=40, deadline_s=60.0)
    async with engine.infer_stream(said.prompt("stream"), max_tokens=40, **words) as chunks:
        assert len("".join([chunk.text async for chunk in chunks])) == 40
    await engine.infer(said.prompt("turn"), max_tokens=40, session_id=SessionId("s"))
    await engine.infer(_chat(said), max_tokens=40, tools=[_tool(said)])


def _chat(said: Canaries) -> list[ChatMessage | dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": said.text("call")})}}
    return [
        ChatMessage(role="system", content=said.text("system message")),
        {"role": "user", "content": said.text("chat message"), "name": said.text("speaker")},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": said.text("tool result"), "tool_call_id": "1"},
    ]


def _tool(said: Canaries, **more: Any) -> dict[str, Any]:
    about = said.text("property of a tool")
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": about}}, **more}
    return {"type": "function", "function": {"name": "f", "description": said.text("tool"), "parameters": parameters}}


async def well(said: Canaries, told: Told) -> None:
    async with fake_engine() as (engine, _):
        await _all_calls(said, engine)


async def well_over_the_socket(said: Canaries, told: Told) -> None:
    async with _daemon() as path, connect(path) as client:
        await _all_calls(said, client)


@asynccontextmanager
async def _daemon(**fake: Any) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        async with daemon(Path(directory), **fake) as (_, path):
            yield path


# -- what is refused ------------------------------------------------------------------------------------------------------


async def _refusals(said: Canaries, told: Told, engine: InferenceEngine) -> None:
    refuse: Callable[[Awaitable[object]], Awaitable[None]] = partial(told.fails, kind=RequestValidationError)
    long = said.text("a prompt that is too long") * 100
    await refuse(engine.infer(long, max_tokens=5))
    for prompt in (
        {"text": said.text("a dict for a prompt")},
        [said.text("text among ids"), 1],
        [1, said.text("text behind ids")],
        [{"role": "user", "content": [{"type": "text", "text": said.text("content in parts")}]}],
        [{"role": said.text("role") + "!", "content": said.text("content beside a wrong role")}],
        [{"role": "user", "content": said.text("content beside a wrong call"), "tool_calls": [said.text("a call")]}],
    ):
        await refuse(engine.infer(prompt))  # type: ignore[arg-type]
    for fields in (
        {"stop": [said.text("stop beside a number"), 3]},
        {"stop": said.text("a stop string that is too long") * 50},
        {"bad_words": said.text("bad words that are no list")},
        {"bad_words": [said.text("a bad word that is too long") * 50]},
        {"metadata": said.text("metadata that is text")},
        {"metadata": {"note": said.text("metadata that is too long") * 200}},
        {"metadata": {"note": [said.text("metadata in a list")]}},
        {"response_format": {"type": "json_schema", "definition": [said.text("a schema in a list")]}},
        {"response_format": {"type": "json_object", "definition": said.text("a definition too many")}},
        {"response_format": {"type": "json_schema", "definition": {"enum": [said.text("beside no number"), float("nan")]}}},
        {"response_format": said.text("a format that is text")},
        {"tools": said.text("tools that are text")},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": [said.text("no object")]}}}]},
        {"tools": [_tool(said)]},  # beside a text
        {"temperature": -1.0, "stop": [said.text("beside a wrong field")]},
    ):
        await refuse(engine.infer(said.prompt("beside a wrong field"), **fields))
    await told.fails(engine.infer(said.prompt("beside an unknown field"), promt=said.text("unknown")), TypeError)  # type: ignore[call-arg]
    await told.fails(engine.infer(said.prompt("not Unicode") + "\udc00"), FerrumError)


async def refused(said: Canaries, told: Told) -> None:
    async with fake_engine() as (engine, _):
        await _refusals(said, told, engine)
        results = await engine.infer_batch([said.prompt("right"), [said.text("wrong")]], max_tokens=5)  # type: ignore[list-item]
        for result in results:
            if isinstance(result, FerrumError):
                told.note_error("exception", result)


async def refused_over_the_socket(said: Canaries, told: Told) -> None:
    async with _daemon() as path, connect(path) as client:
        await _refusals(said, told, client)


async def full(said: Canaries, told: Told) -> None:
    config = {"scheduler": {"max_running_requests": 1, "max_waiting_requests": 1}}
    async with fake_engine(config, **SLOW) as (engine, _):
        async with engine.infer_stream(said.prompt("first")), engine.infer_stream(said.prompt("second")):
            await told.fails(engine.infer(said.prompt("one too many")), ResourceExhausted)


# -- what fails -----------------------------------------------------------------------------------------------------------


async def tokenizers_that_quote(said: Canaries, told: Told) -> None:
    async with quoting_engine() as engine:
        for start in ("0", "1", "2", "surrogate \udc00"):
            prompt = start + said.text(f"a prompt that begins with {start!a}")
            if "\udc00" not in prompt:
                said.answered_after(prompt)
            await told.fails(engine.infer(prompt, max_tokens=40), TokenizerError)
        bad = ["0" + said.text("a bad word that cannot be encoded")]
        await told.fails(engine.infer(said.prompt("beside a bad word"), bad_words=bad), TokenizerError)
        for kind in ("regex", "grammar"):
            form = {"type": kind, "definition": said.text(f"a {kind} that the compiler quotes")}
            await told.fails(engine.infer(said.prompt("beside it"), response_format=form), BackendError)


async def templates_that_quote(said: Canaries, told: Told) -> None:
    for number, source in enumerate(
        (
            "{{ raise_exception('cannot take ' + messages[0].content) }}",
            "{{ messages[0].content.nothing() }}",
            "{{ messages[0][messages[0].content]['x'] }}",
            "{{ {}[messages[0].content].x }}",
            "{{ messages[0].content | int(base=messages[0].content) }}",
            "{{ messages[0].content + 1 }}",
            "{{ '%d' % messages[0].content }}",
            "{% set x = namespace() %}{% set x[messages[0].content] = 1 %}{{ x[messages[0].content].y }}",
        )
    ):
        with suppress(TokenizerError):  # one that is no template fails at its load, with nobody's words
            template = ChatTemplate(source, {}, "here")
            try:
                template.render([ChatMessage(role="user", content=said.text(f"for template {number}"))])
            except RequestValidationError as error:
                told.note_error("exception", error)


async def executors_that_fail(said: Canaries, told: Told) -> None:
    async with fake_engine(fail_at={1, 2, 5}) as (engine, executor):
        await told.fails(engine.infer(said.prompt("alone in a step that fails"), max_tokens=40), BackendError)
        results = await engine.infer_batch([said.prompt("in it"), said.prompt("in it, too")], max_tokens=40)
        for result in results:
            if isinstance(result, FerrumError):
                told.note_error("exception", result)
        nan = RequestId("nan")
        executor.nan_requests.add(nan)
        await told.fails(engine.infer(said.prompt("not a number"), id=nan, max_tokens=40), BackendError)


async def engines_that_break(said: Canaries, told: Told) -> None:
    def load(config: EngineConfig) -> LoadedModel:
        return fake_model(config, _BrokenExecutor(config, broken_at=20))

    async with Runtime(build_config(None, None, {}), load) as engine:
        await told.fails(engine.infer(said.prompt("in an engine that breaks"), max_tokens=100), EngineFailed)
        await told.fails(engine.infer(said.prompt("in one that is broken")), EngineFailed)
        for health in engine.health_now().status.components.values():
            told.note("health", health.detail)
    async with fake_engine(**SLOW) as (engine, _):
        async with engine.infer_stream(said.prompt("over a ledger that is wrong"), max_tokens=900) as chunks:
            await anext(aiter(chunks))
            engine._cache._free.append(0)
        await told.fails(engine.infer(said.prompt("behind it")), EngineFailed)


# -- what is cut short ----------------------------------------------------------------------------------------------------


async def _cuts(said: Canaries, told: Told, engine: InferenceEngine) -> None:
    """Its steps take a few milliseconds."""
    late = await engine.infer(said.prompt("until its deadline"), max_tokens=900, deadline_s=0.1)
    assert late.finish_reason is FinishReason.DEADLINE
    with anyio.move_on_after(0.05):
        await engine.infer(said.prompt("until nobody waits"), max_tokens=900)
    async with engine.infer_stream(said.prompt("left early"), max_tokens=900) as chunks:
        await anext(aiter(chunks))
    with suppress(ZeroDivisionError):
        async with engine.infer_stream(said.prompt("left with an error"), max_tokens=900) as chunks:
            await anext(aiter(chunks))
            raise ZeroDivisionError


async def cut_short(said: Canaries, told: Told) -> None:
    async with fake_engine({"scheduler": {"drain_s": 0.01}}, **SLOW) as (engine, _):
        await _cuts(said, told, engine)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(told.fails, engine.infer(said.prompt("at the end"), max_tokens=900), Cancelled))
            await until(lambda: engine.status_now().requests.running == 1)
            await engine.shutdown()
        await told.fails(engine.infer(said.prompt("after the end")), Cancelled)
    chunked = {"scheduler": {"max_running_requests": 1}, "batching": {"max_batched_tokens": 2}}
    async with fake_engine(chunked, step_s=0.02) as (engine, _):
        await told.fails(engine.infer(said.prompt("too late"), max_tokens=9, deadline_s=0.05), DeadlineExceeded)


async def cut_short_over_the_socket(said: Canaries, told: Told) -> None:
    async with _daemon(**SLOW) as path, connect(path) as client:
        await _cuts(said, told, client)
    async with connect_to_a_dying_daemon(said, told):
        pass


@asynccontextmanager
async def connect_to_a_dying_daemon(said: Canaries, told: Told) -> AsyncIterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        async with daemon_process(Path(directory) / "s", **SLOW) as process, connect(Path(directory) / "s") as client:
            async with client.infer_stream(said.prompt("when the daemon dies"), max_tokens=900) as chunks:
                await anext(aiter(chunks))
                process.kill()
                await told.fails(_rest(chunks), ConnectionLost)
            yield


async def _rest(chunks: AsyncIterator[Any]) -> None:
    async for _ in chunks:
        pass


async def squeezed(said: Canaries, told: Told) -> None:
    """Sequences make way for others, and readers are slow."""
    few = {"kv_cache": {"num_pages": 12, "block_size": 4, "prefix_caching": False}}
    async with fake_engine(few) as (engine, _):
        await engine.infer_batch([said.prompt("squeezed"), said.prompt("squeezed, too")], max_tokens=20)
        assert engine.metrics().scheduler.preemptions
    async with fake_engine({"batching": {"stream_capacity": 2}}) as (engine, _):
        async with engine.infer_stream(said.prompt("read slowly"), max_tokens=60) as chunks:
            await until(lambda: engine.status_now().requests.parked == 1)
            await _rest(chunks)


async def blocked(said: Canaries, told: Told) -> None:
    """The host keeps the event loop, which is logged."""
    async with fake_engine(step_s=0.01) as (engine, _):
        async with engine.infer_stream(said.prompt("while the host blocks"), max_tokens=30) as chunks:
            await anext(aiter(chunks))
            time.sleep(0.3)  # noqa: ASYNC251 - that is the fault
            await _rest(chunks)


# -- what is hostile ------------------------------------------------------------------------------------------------------


def _hostile_frames(said: Canaries) -> list[bytes]:
    pack = msgspec.msgpack.encode
    prompt = said.prompt("in a hostile message")
    sampling = {"temperature": said.text("text for a number"), "stop": [said.text("stop in a hostile message")]}
    bodies = [
        pack({"type": "submit", "request_id": "a", "request": {"text": prompt, "sampling": sampling}, "credit": 1}),
        pack({"type": "submit", "request_id": "a", "request": {"text": prompt, said.text("key"): 1}, "credit": 1}),
        pack({"type": "submit", "request_id": "a", "request": {"text": 3, "messages": [prompt]}, "credit": 1}),
        pack({"type": "submit", "request_id": "a", "request": {"text": prompt}, "credit": -1}),
        pack({"type": "query", "query_id": 1, "kind": said.text("kind")}),
        pack({"type": said.text("type"), "request_id": "a"}),
        pack({"type": "submit", "request_id": "a"}) + said.text("garbage").encode(),
        pack({"type": "submit", "request_id": "a", "request": {"text": "x"}, "credit": 1}).replace(b"\xa1x", b"\xa1\xff"),
        said.text("nothing but garbage").encode() * 9,
    ]
    return [len(body).to_bytes(4, "little") + body for body in bodies]


async def _say(path: Path, frames: list[bytes]) -> None:
    for frame in frames:
        async with await anyio.connect_unix(path) as stream:
            with suppress(anyio.BrokenResourceError):
                await stream.send(encode(Hello(version=1, client="x")) + frame)
                async for _ in stream:
                    pass


async def hostile(said: Canaries, told: Told) -> None:
    async with _daemon() as path:
        await _say(path, _hostile_frames(said))


async def a_daemons_log(said: Canaries, told: Told) -> None:
    """At level debug, of a daemon in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "config").write_text("[daemon]\nlog_level = 'debug'")
        with (place / "log").open("wb") as log:
            daemon_options = {"config_file": str(place / "config"), **SLOW}
            async with daemon_process(place / "s", stderr=log, **daemon_options) as process:
                async with connect(place / "s") as client:
                    await _all_calls(said, client)
                    await _refusals(said, told, client)
                    await _cuts(said, told, client)
                await _say(place / "s", _hostile_frames(said))
                process.terminate()
                await anyio.to_thread.run_sync(process.wait)
        lines = (place / "log").read_text().splitlines()
        assert {"ready", "connected", "cut off", "stopped"} <= {json.loads(line)["event"] for line in lines}
        for line in lines:
            told.note("log", line)


# -- the demo model -------------------------------------------------------------------------------------------------------


async def a_real_model(said: Canaries, told: Told) -> None:
    """Its tokenizer, its template, its grammars, its words."""
    form: dict[str, Any]
    definition: Any
    async with ferrum_rt.open_runtime(device="cpu", dtype="float32") as engine:
        plain = await engine.infer(said.text("prompt") + "\nimport ", max_tokens=40, **HOT)
        said.answered(plain.text)
        scored = await engine.infer(said.text("scored"), max_tokens=20, logprobs=5, prompt_logprobs=3, n=2, **HOT)
        for output in scored.outputs:
            said.answered(output.text)
        chat = await engine.infer(_chat(said), max_tokens=20, **HOT)
        said.answered(chat.text)
        said.answered((await engine.infer(said.text("again") + plain.text, max_tokens=20, **HOT)).text)
        for kind, definition in (
            ("json_schema", {"enum": [said.text("value in a schema")], "description": said.text("schema")}),
            ("regex", f"({said.text('regex')}|a)"),
            ("grammar", f'start: "{said.text("grammar")}" | "b"'),
        ):
            form = {"type": kind, "definition": definition}
            await engine.infer(said.text("beside a grammar"), max_tokens=60, response_format=form)
        for kind, definition in (
            ("json_schema", {"type": "string", "pattern": f"({said.text('unclosed pattern')}"}),
            ("json_schema", {"allOf": [{"const": said.text("contradiction")}, {"const": said.text("its other half")}]}),
            ("json_schema", {"type": said.text("type of a schema")}),
            ("json_schema", '{"const": "' + said.text("half a schema")),
            ("json_schema", {"const": said.text("not Unicode") + "\udc00"}),
            ("regex", f"({said.text('unclosed regex')}"),
            ("regex", f"(?={said.text('look-ahead')})"),
            ("grammar", f'start: "{said.text("unclosed grammar")}'),
            ("grammar", f'start: "{said.text("before an unknown rule")}" nothing'),
            ("grammar", f"start: /{said.text('unclosed regex in a grammar')}(/"),
            ("grammar", f'start: %json {{"const": "{said.text("half a schema in a grammar")}'),
        ):
            form = {"type": kind, "definition": definition}
            call = engine.infer(said.text("beside a wrong grammar"), response_format=form)
            await told.fails(call, RequestValidationError)
        await told.fails(engine.infer(said.text("not Unicode") + "\udc00"), FerrumError)
        must: dict[str, Any] = {"tools": [_tool(said)], "tool_choice": "required"}
        await told.fails(engine.infer(_chat(said), **must), FerrumError)  # its template shows no calls


# -- what is meant to be told, and what this search can find --------------------------------------------------------------


async def captured(said: Canaries, told: Told) -> None:
    """With ``capture_content`` the two attributes hold what was said and answered; without them nothing does."""
    config = {"monitoring": {"capture_content": True}}
    async with fake_engine(config) as (engine, _):
        await _all_calls(said, engine)
    async with fake_engine(config, fail_at={5}) as (engine, _):
        await told.fails(engine.infer(said.prompt("in a step that fails"), max_tokens=20), BackendError)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        well,
        well_over_the_socket,
        refused,
        refused_over_the_socket,
        full,
        tokenizers_that_quote,
        templates_that_quote,
        executors_that_fail,
        engines_that_break,
        cut_short,
        cut_short_over_the_socket,
        squeezed,
        blocked,
        hostile,
        a_daemons_log,
        a_real_model,
        captured,
        planted,
    )
}


async def _go_all(told: Told, only: Sequence[str]) -> dict[str, Any]:
    asyncio.get_running_loop().set_exception_handler(told.on_loop_fault)
    report: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        if only and name not in only:
            continue
        said, fault, words = Canaries(), None, ""
        try:
            await scenario(said, told)
        except Exception:
            fault = traceback.format_exc()
        await anyio.lowlevel.checkpoint()
        spans = told.take_spans()
        if name == captured.__name__:
            spans, words = without_captured(spans)
        texts = told.take(spans)
        leaks = [(kind, sorted(found), text[:3000]) for kind, text in texts if (found := said.found_in(text))]
        kinds = [kind for kind, _ in texts]
        report[name] = {
            "fault": fault,
            "leaks": leaks,
            "captured": sorted(said.found_in(words)),
            "told": {kind: kinds.count(kind) for kind in set(kinds)},
            "spans": sorted({span.name for span in spans}),
        }
    return report


if __name__ == "__main__":
    print(json.dumps(anyio.run(_go_all, Told(), sys.argv[1:])))
