"""A request's chunks put together again. Shared by the in-process engine and the socket client."""

from collections.abc import Sequence

from ferrum_rt.interfaces.types import (
    FunctionCall,
    InferenceResponse,
    Output,
    RequestMetrics,
    StreamChunk,
    ToolCall,
    ToolCallDelta,
    Usage,
)


def assemble(chunks: Sequence[StreamChunk], metrics: RequestMetrics | None) -> InferenceResponse:
    """The response that a finished request's chunks add up to."""
    by_output: dict[int, list[StreamChunk]] = {}
    for chunk in chunks:
        by_output.setdefault(chunk.index, []).append(chunk)
    outputs = [_output(index, by_output[index]) for index in sorted(by_output)]
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    first = outputs[0]
    return InferenceResponse(
        request_id=chunks[0].request_id,
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.finish_reason,
        usage=Usage(
            prompt_tokens=usages[0].prompt_tokens,
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=usages[0].cached_tokens,
        ),
        logprobs=first.logprobs,
        outputs=outputs if len(outputs) > 1 else [],
        metrics=metrics,
        tool_calls=first.tool_calls,
        prompt_logprobs=next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None), None),
        seed=by_output[first.index][-1].seed,
    )


def _output(index: int, chunks: Sequence[StreamChunk]) -> Output:
    reason = chunks[-1].finish_reason
    assert reason is not None  # a stream that ends without one raises instead
    has_logprobs = chunks[0].logprobs is not None
    return Output(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        finish_reason=reason,
        logprobs=[item for chunk in chunks for item in chunk.logprobs or ()] if has_logprobs else None,
        tool_calls=_calls([delta for chunk in chunks for delta in chunk.tool_calls]),
    )


def _calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    by_call: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        by_call.setdefault(delta.index, []).append(delta)
    return [
        ToolCall(
            id=next((part.id for part in parts if part.id is not None), ""),
            function=FunctionCall(
                name=next((part.name for part in parts if part.name is not None), ""),
                arguments="".join(part.arguments for part in parts),
            ),
        )
        for _, parts in sorted(by_call.items())
    ]
