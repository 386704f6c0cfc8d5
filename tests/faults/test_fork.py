"""A host that forks while it has an engine or a client open: the copy in the child is of no use, and does no harm."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from ferrum_rt.interfaces.errors import ConnectionLost, EngineFailed
from ferrum_rt.ipc.client import connect
from tests.daemon.serving import daemon
from tests.runtime.engines import fake_engine, text_after


def in_child(act: Callable[[], None]) -> int:
    """The exit status of a forked process that runs ``act``; it is killed if it takes long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: that is the fault
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_once(call: Coroutine[Any, Any, Any]) -> None:
    """Run it to its end, which must come before it waits for anything."""
    try:
        call.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


async def test_an_engine_is_its_own_processs() -> None:
    """In the child a request is EngineFailed at once, leaving the block takes no time, and a report still comes; the
    parent's engine goes on, with what was under way."""
    async with fake_engine(step_s=0.001) as (engine, _):

        def child() -> None:
            for call in (engine.infer("y"), engine.infer([65])):
                with pytest.raises(EngineFailed, match=str(os.getppid())):
                    at_once(call)
            assert engine.status_now().requests.running == 1
            at_once(engine.shutdown())
            at_once(engine.__aexit__(None, None, None))

        async with engine.infer_stream("x", max_tokens=60) as chunks:
            text = (await anext(aiter(chunks))).text
            assert in_child(child) == 0
            text += "".join([chunk.text async for chunk in chunks])
        assert text == text_after("x", 60)
        assert (await engine.infer("y", max_tokens=5)).text == text_after("y", 5)


async def test_a_connection_is_its_own_processs(tmp_path: Path) -> None:
    """In the child every call is ConnectionLost and nothing is sent; leaving the block does not say goodbye for the parent,
    whose requests go on."""
    async with daemon(tmp_path, step_s=0.001) as (_, path), connect(path) as client:

        def child() -> None:
            for call in (client.infer("y"), client.status(), client.health_check()):
                with pytest.raises(ConnectionLost, match=str(os.getppid())):
                    at_once(call)
            client.metrics()
            at_once(client.shutdown())
            at_once(client.__aexit__(None, None, None))

        async with client.infer_stream("x", max_tokens=60) as chunks:
            text = (await anext(aiter(chunks))).text
            assert in_child(child) == 0
            text += "".join([chunk.text async for chunk in chunks])
        assert text == text_after("x", 60)
        assert (await client.infer("y", max_tokens=5)).text == text_after("y", 5)
