"""What the tests of a daemon's process ask it and look at."""

import signal
from pathlib import Path

from ferrum_rt.ipc.client import connect
from ferrum_rt.ipc.messages import Failed, Finished
from tests.daemon.test_session import Peer
from tests.fakes.daemon import ForkedDaemon
from tests.runtime.engines import text_after


def is_left(path: Path) -> bool:
    """The socket's file is there."""
    return path.is_socket()


async def answers(path: Path) -> bool:
    """A client that comes now is served."""
    async with connect(path) as engine:
        return (await engine.infer("hello", max_tokens=5)).text == text_after("hello", 5)


def ends(peer: Peer) -> dict[str, str]:
    """How each request ended, and under "" the connection."""
    return {
        m.request_id: "finished" if isinstance(m, Finished) else m.code
        for m in peer.heard
        if isinstance(m, Finished | Failed)
    }


async def reload(daemon: ForkedDaemon) -> None:
    daemon.send(signal.SIGHUP)
    assert "MONOTONIC_USEC=" in await daemon.notice("RELOADING=1")
    await daemon.notice("READY=1")
