"""Two clients of one runtime: somebody who waits for each answer, and a pile of work that can wait.

    python examples/two_clients.py

Both use the same engine at the same time. The editor's requests go first, because of their priority, and an answer that
would come too late is cut off at its deadline.
"""

from dataclasses import dataclass

import anyio

import ferrum_rt
from ferrum_rt import ClientId, InferenceEngine, InferenceResponse, Priority


@dataclass
class Account:
    """What one client has had."""

    client_id: ClientId
    answers: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0

    def book(self, result: InferenceResponse | ferrum_rt.FerrumError) -> None:
        if isinstance(result, ferrum_rt.FerrumError):
            self.failures += 1
            return
        self.answers += 1
        self.prompt_tokens += result.usage.prompt_tokens
        self.output_tokens += result.usage.completion_tokens


async def complete_lines(engine: InferenceEngine, account: Account) -> None:
    """An editor: one short completion after the other, each of use for two seconds only."""
    for line in ("import os,", "def read_file(path", "    return [", "class Parser(", "    except"):
        try:
            response = await engine.infer(
                line, max_tokens=12, client_id=account.client_id, priority=Priority.HIGH, deadline_s=2.0
            )
        except ferrum_rt.DeadlineExceeded as error:  # not even a first token came in time
            account.book(error)
        else:
            account.book(response)


async def write_modules(engine: InferenceEngine, account: Account) -> None:
    """A batch job: many long texts, in no hurry."""
    prompts = [f'"""Tests for part {number} of the library."""\n' for number in range(12)]
    for result in await engine.infer_batch(prompts, max_tokens=48, client_id=account.client_id, priority=Priority.LOW):
        account.book(result)


async def main() -> None:
    editor, batch = Account(ClientId("editor")), Account(ClientId("batch"))
    async with ferrum_rt.open_runtime() as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(write_modules, engine, batch)
        tasks.start_soon(complete_lines, engine, editor)
    print("client  answers  failures  prompt tokens  output tokens")
    for a in (editor, batch):
        print(f"{a.client_id:<6}  {a.answers:7}  {a.failures:8}  {a.prompt_tokens:13}  {a.output_tokens:13}")


if __name__ == "__main__":
    anyio.run(main)
