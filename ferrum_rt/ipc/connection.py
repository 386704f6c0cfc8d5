"""A Unix socket to a daemon, on whatever event loop anyio runs."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

from ferrum_rt.interfaces.errors import ConnectionLost, NotFound, PermissionDenied

_RECEIVE_BYTES = 65536


@contextmanager
def answer_within(limit_s: float, path: Path) -> Iterator[None]:
    """Raises ConnectionLost when the daemon at ``path`` has not answered by then."""
    try:
        with anyio.fail_after(limit_s):
            yield
    except TimeoutError as error:
        raise ConnectionLost(f"{path}: the daemon did not answer within {limit_s:g} s") from error


class Connection:
    """One reader and one writer at a time. It waits for the socket with anyio and does the rest itself: anyio's own stream
    reports an error to the host's event loop when a read is cancelled just as data comes (seen with 4.16)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)

    async def open(self) -> None:
        """Raises NotFound where no daemon listens, PermissionDenied where the file system keeps us out, ConnectionLost where
        it cannot be reached for another reason."""
        while True:
            try:
                self._socket.connect(str(self._path))
                return
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise NotFound(self._why_nobody()) from error
            except PermissionError as error:
                raise PermissionDenied(f"{self._path}: {error.strerror}; it is another user's daemon") from error
            except BlockingIOError:  # as many are waiting to be taken in as may
                await anyio.sleep(0.01)
            except OSError as error:
                raise ConnectionLost(f"{self._path}: {error.strerror}") from error

    async def receive(self) -> bytes:
        """What has come, at least a byte. Raises ConnectionLost."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            except OSError as error:
                raise self._lost() from error
            if not data:
                raise self._lost()
            return data

    async def send(self, data: bytes) -> None:
        """Until the last byte is on its way. Raises ConnectionLost."""
        left = memoryview(data)
        while left := left[self.send_nowait(left) :]:
            await self.wait_writable()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes could be sent at once. Raises ConnectionLost."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost() from error

    async def wait_writable(self) -> None:
        """Until something can be sent, or never can again."""
        await anyio.wait_writable(self._socket)

    def close(self) -> None:
        self._socket.close()

    def _why_nobody(self) -> str:
        if self._path.exists() and not self._path.is_socket():
            return f"{self._path}: not a socket; give the path of a daemon's"
        return f"no daemon listens at {self._path}; start one with: ferrum-rt serve --socket {self._path}"

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"{self._path}: the daemon has closed the connection")
