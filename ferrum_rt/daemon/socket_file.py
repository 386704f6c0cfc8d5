"""The daemon's place in the file system: who serves a path, on what socket, and who may speak to it.

A lock decides who serves. The socket's directory is ours and nobody else can write to it, so within it only a program of our
own user that ignores the lock can get between two of our steps. Two steps are open to that one: between the last look at a
socket and its unlink() (Linux cannot unlink by inode), and between a connect() that found nobody and the unlink(). Bind and
connect take no directory, so they go by the path: who can write *above* the directory can send them elsewhere, but not make
us listen there, for what was bound is looked up again in the directory that was checked.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ferrum_rt.interfaces.errors import ConfigError, PermissionDenied
from ferrum_rt.ipc.address import socket_path

_BACKLOG = 128
_UCRED = struct.Struct("iII")
_MAX_PID_BYTES = 16


class Claim(NamedTuple):
    """A path that this process serves, and the socket that listens there: non-blocking, not inherited by children."""

    path: Path
    listener: socket.socket


class Peer(NamedTuple):
    """Who connected, as the kernel noted it at connect(). A user whom our user namespace does not know has uid 65534."""

    pid: int
    uid: int
    gid: int


@contextmanager
def claim(path: str | Path | None) -> Iterator[Claim]:
    """Listen on ``path`` (None: the default) for as long as the block lasts, as the only daemon that does.

    The last directory is created if it is missing, with mode 0700; the socket has mode 0600. Raises ConfigError, with
    everything left as it was but for the directory and the lock file, if another daemon serves the path, if something is
    there that is not a socket that a dead daemon of this user left, or if others could put something there.
    """
    place = socket_path(path)
    owner = os.getpid()
    with ExitStack() as stack:
        try:
            directory = _open_directory(place.parent)
            stack.callback(os.close, directory)
            lock = _lock(directory, place)
            stack.callback(_release, lock, owner)
            _remove_stale(directory, place)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            _bind(listener, directory, place, owner, stack)
        except OSError as error:
            raise ConfigError(f"{place}: cannot listen there: {error}") from error
        yield Claim(place, listener)


def _open_directory(path: Path) -> int:
    """A descriptor of the directory, which is ours and which nobody else can write to."""
    try:
        os.mkdir(path, 0o700)
        is_new = True
    except FileExistsError:
        is_new = False
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent}: no such directory; create it, or give the socket another path") from error
    if path.is_symlink():  # only for the message: O_NOFOLLOW is what refuses it
        raise ConfigError(f"{path}: the socket's directory is a symbolic link; give the path that it leads to")
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if is_new:
            os.fchmod(directory, 0o700)  # the umask may have taken more
        found = os.fstat(directory)
        if found.st_uid != os.geteuid():
            raise ConfigError(f"{path}: the socket's directory belongs to uid {found.st_uid}, not to uid {os.geteuid()}")
        if found.st_mode & 0o022:
            raise ConfigError(
                f"{path}: others can write to the socket's directory (mode {stat.S_IMODE(found.st_mode):04o}); "
                "take that from them (chmod go-w), or put the socket into a directory of its own"
            )
    except BaseException:
        os.close(directory)
        raise
    return directory


def _lock(directory: int, path: Path) -> int:
    """A descriptor that holds the lock beside ``path``.

    The file stays when we go. Were it removed, one daemon could lock the removed file, which it had open already, and
    another the new one: two would serve. Its text is our pid, for people; the lock itself is the kernel's and ends with us.
    """
    lock_path = path.with_name(f"{path.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(lock_path.name, flags, 0o600, dir_fd=directory)
    try:
        found = os.fstat(lock)
        is_free = _try_lock(lock)
        # Read after the try, for whoever has won may still have been writing; b"?" is no pid.
        text = os.pread(lock, _MAX_PID_BYTES, 0).strip() if stat.S_ISREG(found.st_mode) else b"?"
        if found.st_uid != os.geteuid() or not (text == b"" or text.isdigit()):
            raise ConfigError(f"{lock_path}: not the lock file of a daemon of ours; give the socket another name")
        if not is_free:
            pid = text.decode() or "not known yet"
            raise ConfigError(f"{path}: another daemon serves it (pid {pid}); stop that one, or give another path")
        os.fchmod(lock, 0o600)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(lock: int, owner: int) -> None:
    """Give the lock back. A child that was forked inside the block shares it, and must leave it to its parent."""
    if os.getpid() == owner:
        # Explicitly, for a child that lives on would keep it: a lock lasts until its last descriptor is closed.
        with suppress(OSError):
            os.ftruncate(lock, 0)
            fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _remove_stale(directory: int, path: Path) -> None:
    """Make room at ``path``, if a dead daemon's socket is all that is there."""
    try:
        found = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path}: something other than a socket is there; remove it, or give another path")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path}: a socket of uid {found.st_uid} is there; remove it, or give another path")
    if _is_alive(path):
        raise ConfigError(f"{path}: another program listens there; stop it, or give another path")
    _unlink(directory, path.name, found)


def _is_alive(path: Path) -> bool:
    """Whether anybody may be listening. Every answer but a clear no counts: EAGAIN is a listener with a full queue,
    EPROTOTYPE a socket of another type, EACCES one that we cannot ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fsencode(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _bind(listener: socket.socket, directory: int, path: Path, owner: int, stack: ExitStack) -> None:
    """Bind, and have ``stack`` undo it.

    The mode is set between bind() and listen(): until then a connect() is refused whoever makes it, so there is no window
    and the umask, which all threads share, is left alone.
    """
    listener.setblocking(False)
    listener.bind(os.fsencode(path))
    # Holds the inode, even once whoever took the listener over has closed it: its number cannot come to be another socket's.
    pin = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    stack.callback(os.close, pin)
    stack.callback(_unlink_ours, directory, path.name, pin, owner)
    os.chmod(path.name, 0o600, dir_fd=directory)
    listener.listen(_BACKLOG)


def _unlink_ours(directory: int, name: str, pin: int, owner: int) -> None:
    # A socket that cannot be removed now is a stale one, which the next daemon removes.
    with suppress(OSError):
        if os.getpid() == owner:
            _unlink(directory, name, os.fstat(pin))


def _unlink(directory: int, name: str, expected: os.stat_result) -> None:
    """Remove ``name`` if it still is the file that ``expected`` describes."""
    with suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if os.path.samestat(found, expected):
            os.unlink(name, dir_fd=directory)


def peer(connection: socket.socket) -> Peer:
    """Who is at the other end of an accepted Unix connection. For any other socket the uid is one that nobody has."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def check_peer(peer: Peer, allowed_uids: Collection[int]) -> None:
    """Raises PermissionDenied unless the peer's user is one of those. Root is not, unless it is named."""
    if peer.uid not in allowed_uids:
        raise PermissionDenied(f"uid {peer.uid} may not use this daemon")
