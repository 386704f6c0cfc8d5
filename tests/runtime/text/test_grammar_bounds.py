"""Whatever a definition is, compiling and following it takes bounded time and memory."""

import random
import resource
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings

from ferrum_rt.interfaces.errors import RequestValidationError
from ferrum_rt.interfaces.grammar import Grammar, GrammarMatcher
from ferrum_rt.interfaces.types import ResponseFormat, TokenId
from tests.hostile_grammars import HOSTILE, REFUSED, random_definitions
from tests.machine import seconds_here
from tests.runtime.text.grammars import ENDS, NUM_LOGITS, Kind, compile_format, compiler


def test_compiling_lets_other_threads_run() -> None:
    """While a definition is compiled, Python goes on elsewhere."""
    count = 0
    started, stop = threading.Event(), threading.Event()

    def work() -> None:
        nonlocal count
        started.set()
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    schema = {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(400)}}
    before, begun = count, time.perf_counter()
    compiler().compile(ResponseFormat(type="json_schema", definition=schema))
    per_ms = (count - before) / (time.perf_counter() - begun) / 1_000
    stop.set()
    thread.join()
    assert per_ms > 100, "the GIL was held"


def walk(matcher: GrammarMatcher, rng: random.Random, max_tokens: int) -> Iterator[tuple[set[int], float]]:
    """Random tokens; each mask, and the CPU seconds that it and the step before it took."""
    for _ in range(max_tokens):
        begun = time.thread_time()
        mask = bytearray(-(-NUM_LOGITS // 32) * 4)
        matcher.write_mask(memoryview(mask))
        seconds = time.thread_time() - begun
        bits = int.from_bytes(mask, "little")
        tokens = {index for index, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"}
        yield tokens, seconds
        if tokens <= ENDS:
            return
        matcher.advance(TokenId(rng.choice(sorted(tokens - ENDS))))


def compile_and_walk(kind: Kind, definition: Any, max_tokens: int = 30) -> str:
    """ "" or why it was refused. Anything else than a refusal, or too much CPU time, fails the test."""
    message, begun = "", time.thread_time()
    try:
        grammar: Grammar | None = compile_format(kind, definition)
    except RequestValidationError as error:
        grammar, message = None, str(error)
    assert time.thread_time() - begun < seconds_here(1.0)
    if grammar is not None:
        try:
            for tokens, seconds in walk(grammar.start(), random.Random(1), max_tokens):
                assert tokens
                assert seconds < 0.25
        except RequestValidationError as error:
            message = str(error)
    assert not message or message.startswith("response_format: ")
    assert len(message) < 400
    return message


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "definition"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_definition_takes_bounded_time_and_memory(kind: Kind, definition: Any) -> None:
    """Compiling takes less than a second, a step less than a quarter of one, and both little memory, refused or not."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compile_and_walk(kind, definition)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_fuel_does_not_bound_is_refused(name: str) -> None:
    """These would take minutes, gigabytes, or the end of the stack; they are refused on sight, and one is told why."""
    begun = time.thread_time()
    error = compile_and_walk(*HOSTILE[name])
    assert any(word in error for word in ("complex", "nested", "more than", "at most", "recursive"))
    assert time.thread_time() - begun < seconds_here(0.1)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(definition=random_definitions())
def test_random_definitions_are_compiled_or_refused(definition: tuple[Kind, Any]) -> None:
    """Whatever the definition, it is compiled and followed, or refused with a reason, in bounded time."""
    compile_and_walk(*definition, max_tokens=5)
