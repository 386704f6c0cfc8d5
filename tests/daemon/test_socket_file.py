"""Claiming a path: one daemon at a time, in a directory that is ours alone, and never at the cost of what was there."""

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ferrum_rt.daemon.socket_file import Peer, check_peer, claim, peer
from ferrum_rt.interfaces.errors import ConfigError, PermissionDenied

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ferrum-rt" / "default.sock"


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    """Every test here, those of failures above all, ends with the descriptors it began with."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def listening(path: Path, kind: int = socket.SOCK_STREAM, backlog: int = 1) -> Iterator[socket.socket]:
    """A socket of a program that knows nothing of our lock."""
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            listener.listen(backlog)
        yield listener


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def identity(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_mode


def make_stale(path: Path) -> None:
    """What a daemon leaves that was killed."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with listening(path):
        pass


def run_python(code: str, *arguments: object, pass_fds: tuple[int, ...] = ()) -> str:
    """What ``code`` prints in a fresh process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, pass_fds=pass_fds)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_claim_listens_until_it_ends(path: Path) -> None:
    """Clients get through while the block lasts; then the socket is gone, and the lock file stays, empty."""
    with claim(path) as held:
        assert held.path == path
        assert not held.listener.getblocking()
        assert not held.listener.get_inheritable()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            connection, _ = held.listener.accept()
            with connection:
                assert peer(connection) == Peer(os.getpid(), os.getuid(), os.getgid())
        lock = path.with_name("default.sock.lock")
        assert lock.read_text() == f"{os.getpid()}\n"
    assert [(entry.name, entry.stat().st_size) for entry in path.parent.iterdir()] == [("default.sock.lock", 0)]
    assert held.listener.fileno() == -1
    with claim(path):
        connect(path)


def test_no_descriptor_of_a_claim_is_inherited(path: Path) -> None:
    """A child holds neither the lock nor the socket, so that both end with the daemon."""
    before = set(os.listdir("/proc/self/fd"))
    with claim(path):
        for fd in set(os.listdir("/proc/self/fd")) - before:
            if os.path.exists(f"/proc/self/fd/{fd}"):  # listdir's own is gone
                assert not os.get_inheritable(int(fd)), os.readlink(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277, 0o777])
def test_modes_do_not_depend_on_the_umask(umask: int, path: Path) -> None:
    """The directory has mode 0700, the socket and the lock file 0600, under any umask, which is itself left alone."""
    if umask & 0o500 and os.geteuid() != 0:
        pytest.skip("only root can open a directory that it took its own rights to")
    before = os.umask(umask)
    try:
        with claim(path):
            assert (mode(path.parent), mode(path), mode(path.with_name(path.name + ".lock"))) == (0o700, 0o600, 0o600)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_second_daemon_is_told_who_serves(path: Path) -> None:
    """The second claim is refused with the first one's pid, and the first goes on serving."""
    with claim(path):
        with pytest.raises(ConfigError, match=rf"{path}: another daemon serves it \(pid {os.getpid()}\)"):
            with claim(path):
                raise AssertionError
        connect(path)


RACE = """
import json, os, signal, sys
from ferrum_rt.daemon.socket_file import claim
from ferrum_rt.interfaces.errors import ConfigError

def race(path, start, result):
    os.read(start, 1)
    try:
        with claim(path) as held:
            os.write(result, b"w")
            signal.alarm(60)
            signal.pause()
    except ConfigError as error:
        os.write(result, b"l" if "another daemon serves it" in str(error) else str(error).encode())
    except BaseException as error:
        os.write(result, repr(error).encode())

path, rounds = sys.argv[1], []
for _ in range(50):
    start, go = os.pipe()
    children = {}
    for _ in range(2):
        result, answer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go)
            race(path, start, answer)
            os._exit(0)
        os.close(answer)
        children[pid] = result
    os.close(start)
    os.close(go)
    rounds.append(sorted(os.read(result, 4096).decode() for result in children.values()))
    for pid, result in children.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(result)
print(json.dumps(rounds))
"""


@pytest.mark.slow
def test_of_two_that_race_one_wins(path: Path) -> None:
    """Of two processes that claim a path at once exactly one serves, 50 times over; each time but the first over the socket
    of a winner that was killed, as we then can, too."""
    assert json.loads(run_python(RACE, path)) == [["l", "w"]] * 50
    assert path.is_socket()
    with claim(path):
        connect(path)


def test_a_stale_socket_is_replaced(path: Path) -> None:
    """A socket of ours that nobody answers on gives way, and so does the pid in the lock file, of however many digits."""
    make_stale(path)
    lock = path.with_name("default.sock.lock")
    lock.write_text("4194303999\n")
    with claim(path):
        connect(path)
        assert lock.read_text() == f"{os.getpid()}\n"
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink to a stale socket", "dangling symlink", "fifo"])
def test_what_is_no_socket_is_left_alone(kind: str, path: Path) -> None:
    """A file, a directory or a symlink at the path is refused, and is the same afterwards."""
    path.parent.mkdir(mode=0o700)
    target = path.with_name("target")
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
        if kind == "symlink to a stale socket":
            make_stale(target)
    before = identity(path)
    with pytest.raises(ConfigError, match=f"{path}: something other than a socket is there"):
        with claim(path):
            raise AssertionError
    assert identity(path) == before
    assert kind != "file" or path.read_text() == "precious"
    assert target.is_socket() == (kind == "symlink to a stale socket")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_live_socket_is_left_alone(kind: int, path: Path) -> None:
    """A socket of any type that another program listens on is refused, and that program is still reached by it."""
    path.parent.mkdir(mode=0o700)
    with listening(path, kind):
        before = identity(path)
        with pytest.raises(ConfigError, match=f"{path}: another program listens there"):
            with claim(path):
                raise AssertionError
        assert identity(path) == before
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(str(path))


def test_a_live_socket_with_a_full_queue_is_left_alone(path: Path) -> None:
    """A program too busy to accept is alive: it is not waited for, and not taken for dead."""
    path.parent.mkdir(mode=0o700)
    with listening(path, backlog=0), socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(str(path))
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.connect(str(path))
        with pytest.raises(ConfigError, match="another program listens there"):
            with claim(path):
                raise AssertionError
        assert path.is_socket()


@as_root
def test_a_socket_of_another_user_is_left_alone(path: Path) -> None:
    """A socket of another uid is refused by that uid, dead as it may be."""
    make_stale(path)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"{path}: a socket of uid {NOBODY} is there"):
        with claim(path):
            raise AssertionError
    assert path.is_socket()


def test_a_symlinked_directory_is_refused(path: Path) -> None:
    """A directory that is a symlink is refused, though it leads to a sound one, and nothing is put into that."""
    sound = path.parent.with_name("sound")
    sound.mkdir(mode=0o700)
    path.parent.symlink_to(sound)
    with pytest.raises(ConfigError, match=f"{path.parent}: the socket's directory is a symbolic link"):
        with claim(path):
            raise AssertionError
    assert list(sound.iterdir()) == []


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(bits: int, path: Path) -> None:
    """Write permission for group or world is refused by mode, the sticky bit or not, and the mode is not changed."""
    path.parent.mkdir()
    path.parent.chmod(bits)
    with pytest.raises(ConfigError, match=rf"{path.parent}: others can write .*\(mode {bits:04o}\)"):
        with claim(path):
            raise AssertionError
    assert mode(path.parent) == bits
    assert list(path.parent.iterdir()) == []


@as_root
def test_a_directory_of_another_user_is_refused(path: Path) -> None:
    """A directory of another uid is refused by that uid, for us being root as well."""
    path.parent.mkdir(mode=0o700)
    os.chown(path.parent, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"{path.parent}: the socket's directory belongs to uid {NOBODY}"):
        with claim(path):
            raise AssertionError
    assert list(path.parent.iterdir()) == []


def test_only_the_last_directory_is_created(path: Path) -> None:
    """A missing directory above the socket's own is an error that names it; a file in its place is one, too."""
    with pytest.raises(ConfigError, match=f"{path.parent}: no such directory"):
        with claim(path.parent / "deep" / "a.sock"):
            raise AssertionError
    path.parent.write_text("precious")
    with pytest.raises(ConfigError, match=str(path)):
        with claim(path):
            raise AssertionError
    assert path.parent.read_text() == "precious"


@pytest.mark.parametrize("kind", ["text", "symlink", "fifo", "directory"])
def test_a_foreign_lock_file_is_left_alone(kind: str, path: Path) -> None:
    """What has the lock file's name and is not one is refused: written to, somebody's uv.lock would be lost."""
    path.parent.mkdir(mode=0o700)
    lock, target = path.with_name("default.sock.lock"), path.with_name("target")
    target.write_text("")
    if kind == "text":
        lock.write_text("version = 1")
    elif kind == "symlink":
        lock.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    before = identity(lock)
    with pytest.raises(ConfigError, match=str(path)):
        with claim(path):
            raise AssertionError
    assert identity(lock) == before
    assert kind != "text" or lock.read_text() == "version = 1"
    assert target.read_text() == ""
    assert not path.exists()


def test_a_successor_that_took_the_name_keeps_it(path: Path) -> None:
    """A socket that was renamed over ours stays when we go."""
    with claim(path):
        other = path.with_name("other")
        with listening(other):
            other.rename(path)
            before = identity(path)
    assert identity(path) == before


def test_an_inode_number_that_came_round_again_is_not_ours(path: Path) -> None:
    """The socket removed and its listener closed by others, the file system may give the inode's number to the next socket:
    that one stays all the same."""
    for _ in range(8):
        with claim(path) as held:
            path.unlink()
            held.listener.close()
            make_stale(path)
        path.unlink()


def test_a_listener_that_was_closed_within_the_block_is_cleaned_up(path: Path) -> None:
    """Whoever takes the listener over may close it, or detach and close it; the path is freed all the same."""
    with claim(path) as held:
        held.listener.close()
    assert not path.exists()
    with claim(path) as held:
        os.close(held.listener.detach())
    assert not path.exists()


def test_an_error_in_the_block_comes_out_as_it_is(path: Path) -> None:
    """Only faults of claiming become ConfigError; the daemon's own go through, and the path is freed."""
    with pytest.raises(OSError, match="the daemon's own"):
        with claim(path):
            raise OSError("the daemon's own")
    assert not path.exists()


def test_a_change_of_the_working_directory_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim by a relative path still serves and cleans up that path when the process has moved elsewhere."""
    path.parent.mkdir(mode=0o700)
    monkeypatch.chdir(path.parent)
    with claim("default.sock") as held:
        monkeypatch.chdir("/")
        assert held.path == path
        connect(path)
    assert not path.exists()


def test_a_directory_that_was_moved_is_still_cleaned_up(path: Path) -> None:
    """Our socket is removed from where it is now, and a namesake in a new directory at the old place stays."""
    moved = path.parent.with_name("moved")
    with claim(path):
        path.parent.rename(moved)
        make_stale(path)
    assert not (moved / path.name).exists()
    assert path.is_socket()


def test_a_directory_that_is_gone_is_no_error(path: Path) -> None:
    """With the directory removed there is nothing to clean up."""
    with claim(path):
        for entry in path.parent.iterdir():
            entry.unlink()
        path.parent.rmdir()


FORK = """
import os, signal, sys
from ferrum_rt.daemon.socket_file import claim

with claim(sys.argv[1]):
    leaver = os.fork()
    if leaver:
        os.waitpid(leaver, 0)
        print(os.path.exists(sys.argv[1]), flush=True)
        try:
            with claim(sys.argv[1]):
                print("claimed twice")
        except Exception as error:
            print(f"pid {os.getpid()}" in str(error))
        survivor = os.fork()
        if survivor == 0:
            signal.alarm(20)
            signal.pause()
if leaver:
    with claim(sys.argv[1]):
        print(os.path.exists(sys.argv[1]))
    os.kill(survivor, signal.SIGKILL)
    os.waitpid(survivor, 0)
"""


def test_a_forked_child_leaves_the_claim_to_its_parent(path: Path) -> None:
    """A child that was forked inside the block and leaves it takes away neither the socket nor the lock; nor does one that
    lives on keep the lock from the next daemon."""
    assert run_python(FORK, path).split() == ["True", "True", "True"]


OTHER_USER = f"""
import os, socket, sys
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
client = socket.socket(socket.AF_UNIX)
print(os.getpid(), client.connect_ex(sys.argv[1].replace("@", chr(0))))
"""


@as_root
def test_the_peer_of_another_user_is_known_and_refused() -> None:
    """A process that connects as another uid is seen with its pid, uid and gid, also when it has gone; the refusal names the
    uid and no more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # an abstract name, which every user can connect to
        listener.listen()
        pid = int(run_python(OTHER_USER, listener.getsockname().replace(b"\0", b"@").decode()).split()[0])
        connection, _ = listener.accept()
        with connection:
            seen = peer(connection)
    assert seen == Peer(pid, NOBODY, NOBODY)
    check_peer(seen, {0, NOBODY})
    with pytest.raises(PermissionDenied) as caught:
        check_peer(seen, {0})
    assert str(caught.value) == f"uid {NOBODY} may not use this daemon"


@as_root
def test_another_user_cannot_connect(path: Path) -> None:
    """In a directory that all can enter, the socket's own mode keeps other users out."""
    path.parent.mkdir(mode=0o755)
    directory = os.open(path.parent, os.O_PATH)
    with claim(path):
        code = f"import os; os.fchdir({directory})" + OTHER_USER
        outcome = run_python(code, path.name, pass_fds=(directory,)).split()[1]
    os.close(directory)
    assert os.strerror(int(outcome)) == "Permission denied"


def test_the_peer_of_a_socket_that_is_not_unix_is_nobody() -> None:
    """TCP knows no users: such a peer has a uid that no list allows."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        found = peer(client)
    assert found.uid == 2**32 - 1
    with pytest.raises(PermissionDenied):
        check_peer(found, {0, os.getuid()})
