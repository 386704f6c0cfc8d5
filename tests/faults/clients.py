"""What a client does with a daemon at a path, to be cancelled at each await of it."""

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from ferrum_rt.daemon.config import DaemonLimits
from ferrum_rt.daemon.server import Server
from ferrum_rt.interfaces.config import EngineConfig
from ferrum_rt.interfaces.errors import ConnectionLost
from ferrum_rt.interfaces.types import EngineMetrics, SchedulerStats, PageCounts
from ferrum_rt.ipc.client import CREDIT, connect
from ferrum_rt.ipc.connection import Connection
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import VERSION, Limits, Report, Welcome
from tests.faults.scenarios import CountingRuntime, Scenario
from tests.runtime.engines import text_after

import msgspec
import os
