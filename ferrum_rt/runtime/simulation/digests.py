"""A model that computes nothing but digests, and so knows of every token what it must be.

The K/V memory holds, for each position, a digest of the tokens up to there, in the page that the block table names. The
next token follows from the digest alone. So a request's output depends on nothing but its own tokens as long as the
scheduler hands out slots, positions and pages rightly; where it does not, DigestMemory raises WrongStep, or the output
differs from ``expected_tokens``.
"""

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ferrum_rt.interfaces.errors import BackendError, EngineFailed
from ferrum_rt.interfaces.model_executor import DecodeOutput, PrefillInput, PrefillOutput, StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SampledToken
from ferrum_rt.interfaces.types import RequestId, TokenId

Answer = Callable[[int], TokenId]
"""The token that follows a text with this digest."""

# What a computation that went wrong leaves in the pages: nothing that follows from it can be right again.
_DAMAGE = 0x5EED_BAD5


class WrongStep(EngineFailed):
    """A step asks for what no right scheduler asks for; the message names slot, page or request."""


def printable(digest: int) -> TokenId:
    """An Answer: one of the 95 printable ASCII characters, so never the end of the text."""
    return TokenId(32 + digest % 95)


def expected_tokens(
    prompt: Sequence[int], count: int, answer: Answer = printable, sample: int = 0, eos: int | None = None
) -> list[TokenId]:
    """What comes after ``prompt`` as the request's sample number ``sample``: ``count`` tokens, or fewer if the last of them
    is ``eos``."""
    digest, tokens = 0, list[TokenId]()
    for token in prompt:
        digest = _digest(digest, token)
    for _ in range(count):
        tokens.append(answer(_digest(digest, sample) if sample else digest))
        if tokens[-1] == eos:
            break
        digest = _digest(digest, tokens[-1])
    return tokens


@dataclass(slots=True)
class _Slot:
    """``length`` is None until the first chunk says how much came from the prefix cache. ``heads`` are what the first
    entry of each page held when this sequence wrote or took it over: whoever takes the page writes that entry first."""

    request_id: RequestId
    pages: list[int]
    sample_index: int
    length: int | None = None
    last_token: TokenId | None = None
    heads: list[int] = field(default_factory=list)


class DigestMemory:
    """Slots and ``num_pages`` pages of ``block_size`` positions; executes steps by the book."""

    def __init__(self, num_slots: int, num_pages: int, block_size: int, answer: Answer = printable) -> None:
        self._num_slots, self._block_size, self._answer = num_slots, block_size, answer
        self._digests: list[int | None] = [None] * (num_pages * block_size)
        self._host: dict[int, list[int | None]] = {}  # what was swapped there, by host page
        self._slots: dict[int, _Slot] = {}

    def owner(self, slot: int) -> RequestId:
        """Whose slot it is since the last step that assigned it."""
        return self._slots[slot].request_id

    def execute(self, step: StepInput, *, nan: Collection[RequestId] = (), damaged: bool = False) -> StepOutput:
        """Run a step. Rows of the requests in ``nan`` sample nothing, and what they write is damaged; in a ``damaged`` step
        every row's is, as if it had failed half-way. Raises WrongStep."""
        self.take_over(step)
        batch = step.batch
        used = [item.slot for item in batch.decodes] + [item.slot for item in batch.prefills]
        if len(set(used)) != len(used):
            raise WrongStep(f"a slot is in the batch twice: {used}")
        for prefill in batch.prefills:  # before anything is written: what a step computes, itself it cannot hit
            self._begin(prefill)
        if batch.num_rounds > 1 and batch.prefills:
            raise WrongStep("prefills do not go in rounds")
        decodes = []
        for item in batch.decodes:
            places = range(item.position, item.position + batch.num_rounds)
            first, *later = [self._decode(item.slot, position, nan, damaged) for position in places]
            decodes.append(DecodeOutput(first, later))
        return StepOutput(decodes, [PrefillOutput(self._prefill(item, nan, damaged)) for item in batch.prefills])

    def take_over(self, step: StepInput) -> None:
        """What a step changes in the slots and the pages, before its batch."""
        size, digests = self._block_size, self._digests
        for assigned in step.assigned:
            if not 0 <= assigned.slot < self._num_slots:
                raise WrongStep(f"slot {assigned.slot} is out of range")
            index = assigned.sampling.sample_index
            self._slots[assigned.slot] = _Slot(assigned.request_id, list(assigned.pages), index)
        for appended in step.appended:
            pages = self._slots[appended.slot].pages
            if appended.index != len(pages):
                raise WrongStep(f"page {appended.index} of slot {appended.slot} follows {len(pages)} pages")
            pages.append(appended.page)
        for swapped in step.swapped_out:
            self._host[swapped.host_page] = digests[swapped.page * size : (swapped.page + 1) * size]
        for copied in step.copied:
            source = slice(copied.source * size, (copied.source + 1) * size)
            digests[copied.target * size : (copied.target + 1) * size] = digests[source]
        for swapped in step.swapped_in:
            if swapped.host_page not in self._host:
                raise WrongStep(f"host page {swapped.host_page} comes back, and nothing was ever swapped there")
            digests[swapped.page * size : (swapped.page + 1) * size] = self._host[swapped.host_page]

    def _begin(self, item: PrefillInput) -> None:
        slot = self._slots[item.slot]
        if not item.token_ids:
            raise WrongStep(f"slot {item.slot} prefills no tokens")
        if slot.length is None:
            self._take_over_prefix(slot, item.start)
        if slot.length != item.start:
            raise WrongStep(f"slot {item.slot} holds {slot.length} tokens, and prefills from {item.start}")

    def _prefill(self, item: PrefillInput, nan: Collection[RequestId], damaged: bool) -> SampledToken | None:
        slot = self._slots[item.slot]
        is_nan = item.sample and slot.request_id in nan
        digest = self._write(slot, item.token_ids, item.start, _DAMAGE if is_nan or damaged else 0)
        return self._sample(slot, digest, is_nan) if item.sample else None

    def _decode(self, number: int, position: int, nan: Collection[RequestId], damaged: bool) -> SampledToken:
        slot = self._slots[number]
        if slot.length != position:
            raise WrongStep(f"slot {number} holds {slot.length} tokens, and decodes at {position}")
        is_nan = slot.request_id in nan
        token_ids = (TokenId(0) if slot.last_token is None else slot.last_token,)
        return self._sample(slot, self._write(slot, token_ids, position, _DAMAGE if is_nan or damaged else 0), is_nan)

    def _take_over_prefix(self, slot: _Slot, length: int) -> None:
        size = self._block_size
        if length > len(slot.pages) * size:
            raise WrongStep(f"{slot.request_id} starts at {length}, past its {len(slot.pages)} pages")
        for start in range(0, length, size):
            page = slot.pages[start // size]
            entries = self._digests[page * size : page * size + min(size, length - start)]
            if entries[0] is None or None in entries:
                raise WrongStep(f"page {page} of {slot.request_id} came from others, but they have computed nothing in it")
            slot.heads.append(entries[0])
        slot.length = length

    def _write(self, slot: _Slot, token_ids: Sequence[TokenId], start: int, flaw: int) -> int:
        """The digest of all tokens of the slot, once these stand at ``start`` and after."""
        size, pages, digests = self._block_size, slot.pages, self._digests
        if start + len(token_ids) > len(pages) * size:
            raise WrongStep(f"{slot.request_id} has no page for its tokens")
        for page, head in zip(pages, slot.heads, strict=False):
            if digests[page * size] != head:
                raise WrongStep(f"page {page} of {slot.request_id} was overwritten by another")
        before = digests[pages[(start - 1) // size] * size + (start - 1) % size] if start else 0
        if before is None:
            raise WrongStep(f"{slot.request_id} reads a position that was never written")
        digest = before
        for position, token_id in enumerate(token_ids, start):
            digest = _digest(digest, token_id) ^ flaw
            digests[pages[position // size] * size + position % size] = digest
            if position % size == 0:
                slot.heads.append(digest)
        slot.length = start + len(token_ids)
        return digest

    def _sample(self, slot: _Slot, digest: int, is_nan: bool) -> SampledToken:
        if is_nan:
            slot.last_token = None
            return SampledToken(None, error=BackendError("the model's logits are not numbers (NaN) for this request"))
        slot.last_token = self._answer(digest if slot.sample_index == 0 else _digest(digest, slot.sample_index))
        return SampledToken(slot.last_token)


def _digest(before: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), before)
