"""A raw connection to a daemon, which can say anything, and holds the answers against the protocol."""

import socket
from pathlib import Path

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.ipc.framing import client_decoder, server_decoder
from tests.daemon.ledger import Ledger

_RECEIVE_BYTES = 1 << 18


class Line:
    """Nothing here waits: ``pump`` moves what can be moved. ``num_frames`` counts those that the daemon has reason to look
    at: what comes after a frame that ends the connection counts for nothing."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)
        self.ledger = Ledger()
        self.sent = bytearray()
        self.unsent = bytearray()
        self.num_frames = 0
        self.is_over = False
        self.is_shut = False
        self._said, self._heard = client_decoder(), server_decoder()

    @property
    def has_half_a_frame(self) -> bool:
        """Whatever comes next belongs to a frame that was begun."""
        return self._said.num_held_bytes > 0

    def say(self, data: bytes, *, is_right: bool = False) -> None:
        """Any bytes, of which this side's decoder says what the daemon will make of them. ``is_right``: its requests must
        not fail."""
        self.sent += data
        self.unsent += data
        if self.ledger.is_ending:
            return
        try:
            for message in self._said.feed(data):
                self.num_frames += 1
                self.ledger.said(message, is_right=is_right)
                if self.ledger.is_ending:
                    return
        except InvalidFormat:
            self.num_frames += 1
            self.ledger.broke()

    def flush(self) -> None:
        """Send what can be sent."""
        while self.unsent and not self.is_over and not self.is_shut:
            try:
                sent = self.socket.send(self.unsent)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):  # why, the daemon has said
                sent = len(self.unsent)
            del self.unsent[:sent]

    def pump(self, *, is_reading: bool = True) -> None:
        """Send and hear what can be. Raises AssertionError for what the protocol does not allow."""
        self.flush()
        while is_reading and not self.is_over:
            try:
                data = self.socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:  # it closed without having read everything; all that it said has come before
                data = b""
            if not data:
                self.is_over = True
                self.ledger.heard_end()
                return
            for message in self._heard.feed(data):
                self.ledger.heard(message)

    def half_close(self) -> None:
        """Nothing more will be said; what was not sent by now never is."""
        self.ledger.left()
        self.is_shut = True
        if not self.is_over:
            self.socket.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        self.ledger.left()
        self.is_over = True
        self.socket.close()
