"""The server's end, at whatever moment it comes."""

import asyncio
import socket
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from ferrum_rt.ipc.framing import encode, server_decoder
from ferrum_rt.ipc.messages import Failed, ServerMessage
from tests.daemon.serving import server
from tests.daemon.test_session import HELLO


def rest_of(client: socket.socket) -> list[ServerMessage]:
    """What is still said, until the other end is closed."""
    client.settimeout(10)
    data = b""
    try:
        while received := client.recv(65536):
            data += received
    except ConnectionResetError:
        pass
    return list(server_decoder().feed(data))


@pytest.mark.parametrize("turns", range(8))
def test_a_connection_is_told_of_the_end_however_young_it_is(tmp_path: Path, turns: int) -> None:
    """One that is being taken in when the server ends is told so and closed, like any other; only one that waits to be taken
    in hears nothing. On uvloop, which is what the daemon runs on."""
    complaints = list[dict[str, Any]]()

    async def end_after_some_turns(client: socket.socket) -> bool:
        asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
        async with server(tmp_path) as (_, path, serving):
            client.connect(str(path))
            client.sendall(encode(HELLO))
            for _ in range(turns):
                await anyio.lowlevel.checkpoint()
            is_taken_in = serving.num_connections > 0
        assert serving.num_connections == 0
        return is_taken_in

    with socket.socket(socket.AF_UNIX) as client:
        is_taken_in = anyio.run(partial(end_after_some_turns, client), backend_options={"use_uvloop": True})
        heard = rest_of(client)
    assert not complaints
    assert heard or not is_taken_in
    assert not heard or (isinstance(heard[-1], Failed) and heard[-1].code == "cancelled"), heard
