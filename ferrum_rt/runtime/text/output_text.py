"""One output of a request: its tokens as text, with stop strings, tool calls and log-probabilities."""

from collections.abc import Sequence

from ferrum_rt.interfaces.sampler import TokenScores
from ferrum_rt.interfaces.scheduler import SequenceUpdate
from ferrum_rt.interfaces.tokenizer import IncrementalTokenizer, Tokenizer
from ferrum_rt.interfaces.types import (
    FinishReason,
    InferenceRequest,
    Logprob,
    StreamChunk,
    TokenId,
    TokenLogprobs,
    ToolCallDelta,
    Usage,
)
from ferrum_rt.runtime.text.detokenizer import StopStrings
from ferrum_rt.runtime.text.tool_calls import ToolCallParser


class TokenOffsets:
    """Follows the text that tokens become, to say where in it each begins."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[TokenId], *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder: IncrementalTokenizer = tokenizer.incremental(prompt, skip_special_tokens=skip_special_tokens)
        self._num_bytes = 0

    @property
    def next(self) -> int:
        """Where the next token will begin, in bytes of UTF-8."""
        return self._num_bytes + self._decoder.num_held_bytes

    def push(self, token_id: TokenId) -> str:
        """The text that is now certain."""
        text = self._decoder.push(token_id)
        self._num_bytes += len(text.encode())
        return text

    def flush(self) -> str:
        return self._decoder.flush()

    def describe(self, token_id: TokenId, scores: TokenScores | None) -> TokenLogprobs:
        """The next token's log-probabilities with their tokens' texts."""
        top = zip(scores.token_ids[1:], scores.logprobs[1:], strict=True) if scores is not None else ()
        return TokenLogprobs(
            token_id=token_id,
            token=self._text_of(token_id),
            logprob=None if scores is None else scores.logprobs[0],
            offset=self.next,
            top=[Logprob(token_id=other, token=self._text_of(other), logprob=logprob) for other, logprob in top],
        )

    def _text_of(self, token_id: TokenId) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


class OutputText:
    """Turns what the steps bring for sample ``index`` into its chunks. ``parser`` takes tool calls out of the text; without
    a tokenizer there is no text."""

    def __init__(
        self,
        request: InferenceRequest,
        index: int,
        prompt: Sequence[TokenId],
        tokenizer: Tokenizer | None,
        parser: ToolCallParser | None,
    ) -> None:
        params = request.sampling_params
        self.is_finished = False
        self._request, self._params, self._index, self._parser = request, params, index, parser
        self._num_prompt_tokens = len(prompt)
        self.num_tokens = 0
        self._stop = StopStrings(params.stop, include=params.include_stop)
        # The marks around a call may be special tokens: the parser has to see them, and takes them out.
        skip = params.skip_special_tokens and parser is None
        self._offsets = TokenOffsets(tokenizer, prompt, skip_special_tokens=skip) if tokenizer else None

    def advance(self, update: SequenceUpdate) -> StreamChunk:
        """The chunk for an update; its ``finish_reason`` may be a stop string that only the text shows."""
        texts, reason = [], update.finish_reason
        logprobs: list[TokenLogprobs] = []
        # The token that ends a text is not part of it, unless asked for.
        is_silent = reason in (FinishReason.EOS, FinishReason.STOP) and not self._params.include_stop
        last, token_ids = len(update.token_ids) - 1, update.token_ids
        for number, token_id in enumerate(update.token_ids):
            self.num_tokens += 1
            if self._offsets is None:
                continue
            if update.scores:
                logprobs.append(self._offsets.describe(token_id, update.scores[number]))
            if is_silent and number == last:
                continue
            text, stopped = self._watch(self._offsets.push(token_id))
            texts.append(text)
            if stopped:
                reason, token_ids = FinishReason.STOP, token_ids[: number + 1]
                break
        else:
            if reason is not None and self._offsets is not None:
                text, stopped = self._watch(self._offsets.flush())
                texts += [text, self._stop.flush()]
                reason = FinishReason.STOP if stopped else reason
        text, calls = self._take_calls("".join(texts), is_last=reason is not None)
        self.is_finished = reason is not None
        return StreamChunk(
            request_id=self._request.id,
            index=self._index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs if self._params.logprobs is not None else None,
            finish_reason=reason,
            usage=self._usage(update.num_cached_tokens) if reason else None,
            tool_calls=calls,
            seed=self._params.seed if reason else None,
        )

    def _watch(self, text: str) -> tuple[str, bool]:
        """The part of ``text`` that may go out, and whether a stop string was found in it. Before ``min_tokens`` none is
        looked for."""
        if self.num_tokens < self._params.min_tokens:
            return text, False
        return self._stop.push(text)

    def _take_calls(self, text: str, *, is_last: bool) -> tuple[str, Sequence[ToolCallDelta]]:
        if self._parser is None:
            return text, ()
        text, calls = self._parser.push(text)
        if is_last:
            rest, more = self._parser.flush()
            text, calls = text + rest, [*calls, *more]
        return text, calls

    def _usage(self, num_cached_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self.num_tokens,
            cached_tokens=num_cached_tokens,
        )
