"""ferrum_rt: the LLM inference runtime that lives inside an asyncio application.

The public names are imported when they are first used, so that ``import ferrum_rt`` is fast and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum_rt.interfaces.config import EngineConfig, load_config
    from ferrum_rt.interfaces.engine import InferenceEngine
    from ferrum_rt.interfaces.errors import (
        BackendError,
        Cancelled,
        ConfigError,
        ConnectionLost,
        DeadlineExceeded,
        DeviceError,
        EngineFailed,
        FerrumError,
        InvalidFormat,
        ModelError,
        NotFound,
        PermissionDenied,
        RequestValidationError,
        ResourceExhausted,
        TokenizerError,
        Unsupported,
    )
    from ferrum_rt.interfaces.sampler import LogitsProcessor
    from ferrum_rt.interfaces.types import (
        ChatMessage,
        ClientId,
        EngineMetrics,
        EngineStatus,
        FinishReason,
        FunctionCall,
        HealthStatus,
        InferenceRequest,
        InferenceResponse,
        Logprob,
        Mirostat,
        NamedTool,
        Output,
        Priority,
        RequestId,
        ResponseFormat,
        SamplingParams,
        SessionId,
        StreamChunk,
        TokenId,
        TokenLogprobs,
        Tool,
        ToolCall,
        ToolCallDelta,
        ToolFunction,
        Usage,
    )
    from ferrum_rt.ipc.client import connect
    from ferrum_rt.runtime.runtime import open_runtime

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Cancelled",
    "ChatMessage",
    "ClientId",
    "ConfigError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DeviceError",
    "EngineConfig",
    "EngineFailed",
    "EngineMetrics",
    "EngineStatus",
    "FerrumError",
    "FinishReason",
    "FunctionCall",
    "HealthStatus",
    "InferenceEngine",
    "InferenceRequest",
    "InferenceResponse",
    "InvalidFormat",
    "LogitsProcessor",
    "Logprob",
    "Mirostat",
    "ModelError",
    "NamedTool",
    "NotFound",
    "Output",
    "PermissionDenied",
    "Priority",
    "RequestId",
    "RequestValidationError",
    "ResourceExhausted",
    "ResponseFormat",
    "SamplingParams",
    "SessionId",
    "StreamChunk",
    "TokenId",
    "TokenLogprobs",
    "TokenizerError",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolFunction",
    "Unsupported",
    "Usage",
    "connect",
    "load_config",
    "open_runtime",
]

_HOMES = {
    "EngineConfig": "interfaces.config",
    "load_config": "interfaces.config",
    "InferenceEngine": "interfaces.engine",
    "LogitsProcessor": "interfaces.sampler",
    "connect": "ipc.client",
    "open_runtime": "runtime.runtime",
}


if not TYPE_CHECKING:  # a type checker that saw this would take any name for a public one

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOMES:
            home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
            return getattr(home, name)
        errors = importlib.import_module(f"{__name__}.interfaces.errors")
        types = importlib.import_module(f"{__name__}.interfaces.types")
        return getattr(errors, name, None) or getattr(types, name)


def __dir__() -> list[str]:
    return sorted(__all__)
