"""What systemd and its services tell each other: sockets that it hands over, readiness, the watchdog.

By the manual pages sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3). Only for a process that is ours: the variables
are the process's, and are taken out of its environment once they have been used.
"""

import os
import re
import socket
import time

from ferrum_rt.interfaces.errors import ConfigError

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"

_FIRST_FD = 3
_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def activated_sockets() -> list[socket.socket]:
    """The listening Unix sockets that systemd opened for this process; none if it opened none, or on a second call.

    They are non-blocking, not inherited by children, and the caller's to close. Raises ConfigError for anything but a
    listening Unix stream socket: on another nobody could tell who connects.
    """
    if _number("LISTEN_PID") != os.getpid():
        return []  # for our parent, which did not take the variables out
    count = _number("LISTEN_FDS") or 0
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in _LISTEN_VARIABLES:
        os.environ.pop(variable, None)
    sockets: list[socket.socket] = []
    try:
        for index in range(count):
            sockets.append(_adopt(_FIRST_FD + index, names[index] if index < len(names) else ""))
    except BaseException:
        for one in sockets:
            one.close()
        raise
    return sockets


def _adopt(fd: int, name: str) -> socket.socket:
    fault = ConfigError(
        f"LISTEN_FDS: descriptor {fd} ({name or 'unnamed'}) is not a listening Unix stream socket; "
        "the .socket unit needs ListenStream= with a path, and Accept=no"
    )
    try:
        adopted = socket.socket(fileno=fd)
    except OSError as error:
        raise fault from error
    try:
        is_stream = adopted.family == socket.AF_UNIX and adopted.type == socket.SOCK_STREAM
        if not (is_stream and adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
            raise fault
        adopted.set_inheritable(False)
        adopted.setblocking(False)
    except BaseException:
        adopted.close()
        raise
    return adopted


def notify(state: str) -> None:
    """Tell systemd, if it listens: one or several of the assignments below, by lines. Never raises and never waits; what
    cannot be sent at once is lost."""
    address = os.fsencode(os.environ.get("NOTIFY_SOCKET", ""))
    if address[:1] not in (b"/", b"@"):
        return
    if address.startswith(b"@"):
        address = b"\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            channel.sendto(state.encode(errors="replace"), address)
    except OSError:
        pass  # a service runs as well without being watched


def reloading() -> str:
    """The state of a daemon that reads its configuration again, with the time that tells systemd which reload is meant."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"


def status(text: str) -> str:
    """The line that ``systemctl status`` shows. ``text`` is put on one line: a second one would be another assignment."""
    return "STATUS=" + " ".join(text.split())


def watchdog_interval_s() -> float | None:
    """Seconds between two ``WATCHDOG``: half the time after which systemd takes us for dead. None if it does not watch."""
    pid, limit_us = _number("WATCHDOG_PID"), _number("WATCHDOG_USEC")
    if not limit_us or pid not in (None, os.getpid()):
        return None
    return limit_us / 2e6


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ConfigError(f"{variable} is {text!r}, not a number; systemd sets it, so unset it if systemd did not start us")
    return int(text)
