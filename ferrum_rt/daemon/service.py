"""The daemon's process, from its configuration to its exit status.

Its life: claim the socket, load the model, serve, and at SIGTERM or SIGINT drain: clients are told, new work is refused,
running work has ``scheduler.drain_s`` seconds to finish, the rest is cancelled. A second signal ends the drain at once.
SIGHUP reads the configuration again.
"""

import gc
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager

import anyio
import msgspec

from ferrum_rt.daemon import logs, systemd
from ferrum_rt.daemon.config import DaemonConfig, ServeConfig, difference
from ferrum_rt.daemon.server import Server
from ferrum_rt.daemon.socket_file import claim
from ferrum_rt.daemon.telemetry import exported
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import ConfigError
from ferrum_rt.runtime.loading.loader import LoadedModel, load_model
from ferrum_rt.runtime.runtime import Runtime

STOPPED, ENGINE_FAILED = 0, 1
_HEALTH_EVERY_S = 1.0
_OTHER_DESCRIPTORS = 64
_RELOADABLE = ("limits", "log_level", "allowed_uids")
_RELOADABLE_POLICIES = ("itl_target_s", "min_prefill_tokens", "ageing_steps", "default_client", "clients")

_log = logging.getLogger(__name__)


def run_daemon(
    config: ServeConfig, read_config: Callable[[], ServeConfig], load: Callable[[EngineConfig], LoadedModel] = load_model
) -> int:
    """Serve until told to stop; returns the exit status. ``read_config`` is called at SIGHUP. Raises the FerrumError of what
    prevents the start."""
    _occupy_standard_streams()
    console = logs.set_up(config.daemon.log_level)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nothing to reload yet; by default it would end the process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would have the load finished first
    service = _Service(config, read_config, load)  # with the engine, whose metrics are read once more at the end
    with exported(config.daemon, console):
        return anyio.run(service.run, backend_options={"use_uvloop": True})


class _Service:
    def __init__(
        self, config: ServeConfig, read_config: Callable[[], ServeConfig], load: Callable[[EngineConfig], LoadedModel]
    ) -> None:
        self._config, self._read_config, self._load = config, read_config, load
        self._status = STOPPED
        self._is_draining = False

    async def run(self) -> int:
        _make_room(self._config.daemon.limits.connections)
        self._watchdog_s = systemd.watchdog_interval_s()
        with ExitStack() as until_all_is_closed, _listening(self._config.daemon.socket) as listeners:
            _log.info("loading", extra={"sockets": [one.getsockname() for one in listeners], "pid": os.getpid()})
            async with Runtime(self._config.engine, self._load) as self._engine:
                # Only now: until here a signal ends the process at once, for there is nobody to drain. From here on none
                # does, not even half-way through the end.
                receiver = anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
                await self._serve(listeners, until_all_is_closed.enter_context(receiver))
        _log.info("stopped", extra={"status": self._status})
        return self._status

    async def _serve(self, listeners: list[socket.socket], signals: AsyncIterator[signal.Signals]) -> None:
        daemon = self._config.daemon
        self._server = Server(self._engine, allowed_uids=_uids(daemon), limits=daemon.limits)
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._server.run, listeners)
            tasks.start_soon(self._watch, tasks.cancel_scope)
            # A full collection over torch's own objects stops the event loop for 90 ms; they are here to stay.
            gc.collect()
            gc.freeze()
            _log.info("ready", extra={"model": self._engine.model_info.id})
            self._say_ready()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._reload()
                elif self._is_draining:
                    _log.warning("the drain is cut short", extra={"signal": number.name})
                    tasks.cancel_scope.cancel()
                else:
                    tasks.start_soon(self._drain, number.name, tasks.cancel_scope)

    async def _drain(self, cause: str, everything: anyio.CancelScope) -> None:
        """Let running work finish for a while, then end ``everything``: connections, and the watch."""
        self._is_draining = True
        drain_s, counts = self._config.engine.scheduler.drain_s, self._engine.status_now().requests
        under_way = counts.running + counts.waiting + counts.parked
        _log.info("draining", extra={"cause": cause, "requests": under_way, "connections": self._server.num_connections})
        systemd.notify(f"{systemd.STOPPING}\n{systemd.status('draining')}")
        self._server.go_away("the daemon is shutting down", drain_s)
        await self._engine.shutdown()
        everything.cancel()

    async def _watch(self, everything: anyio.CancelScope) -> None:
        """Tell systemd that we live. An engine that is broken ends the daemon, for whoever watches it to start another."""
        interval_s = self._watchdog_s
        while True:
            if not (self._is_draining or self._engine.health_now().healthy):
                _log.critical("the engine has failed")
                self._status = ENGINE_FAILED
                self._server.go_away("the engine has failed", 0.0)
                everything.cancel()
            if interval_s is not None:
                systemd.notify(systemd.WATCHDOG)
            await anyio.sleep(min(_HEALTH_EVERY_S, interval_s or _HEALTH_EVERY_S))

    def _reload(self) -> None:
        """Read the configuration again, and say what of it waits for a restart. A wrong one changes nothing."""
        systemd.notify(systemd.reloading())
        try:
            new = self._read_config()
        except ConfigError as error:
            _log.error("not reloaded", extra={"reason": str(error)})
        else:
            old, reloaded = self._config, {name: getattr(new.daemon, name) for name in _RELOADABLE}
            daemon = msgspec.structs.replace(old.daemon, **reloaded)
            policies = {name: getattr(new.engine.scheduler, name) for name in _RELOADABLE_POLICIES}
            self._engine.reconfigure(**policies)
            self._config = msgspec.structs.replace(old, daemon=daemon, engine=self._engine.config)
            lists = {"applied": difference(old, self._config), "need_a_restart": difference(self._config, new)}
            _log.info("reloaded", extra=lists)
            _make_room(daemon.limits.connections)
            self._server.reload(allowed_uids=_uids(daemon), limits=daemon.limits)
            logs.set_level(daemon.log_level)
        self._say_ready()

    def _say_ready(self) -> None:
        systemd.notify(f"{systemd.READY}\n{systemd.status(f'serving {self._engine.model_info.id}')}")


def _uids(daemon: DaemonConfig) -> set[int]:
    return {os.geteuid(), *daemon.allowed_uids}


@contextmanager
def _listening(path: str | None) -> Iterator[list[socket.socket]]:
    """The sockets that systemd opened for us; else one of our own at ``path``."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(one) for one in systemd.activated_sockets()]
        yield sockets or [stack.enter_context(claim(path)).listener]


def _occupy_standard_streams() -> None:
    """Where we were started without one of them, a file of ours would get its number: whoever means the stream would write
    there, and uvloop aborts when it closes it."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)


def _make_room(num_connections: int) -> None:
    """As many descriptors as the connections need. Where we may not have them, some will have to wait to be taken in."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + _OTHER_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            _log.warning("fewer descriptors than connections may need", extra={"may_have": most, "may_need": wanted})
