"""The peers that bench/cpu_peers.py runs in their own environment. It imports nothing of ours.

    PYTHON bench/_cpu_peer_engines.py NAME MODEL THREADS      (a name of ENGINES; MODEL as _cpu_peer_convert.py wrote it)

reads tasks as one line of JSON from standard input, computes each twice, of which the first is not counted, and writes the
seconds and the outputs to the descriptor that standard output was: whatever libraries print goes to standard error.

What each is given beyond its defaults: so many threads, room for all requests at once, greedy sampling without an end token.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

TokenIds = list[int]


class Task(NamedTuple):
    """Two sets of prompts of one shape, the first to warm up with, and how many tokens to generate after each prompt."""

    warm_up: list[TokenIds]
    prompts: list[TokenIds]
    num_outputs: int

    @property
    def length(self) -> int:
        """Of a request in the end."""
        return len(self.prompts[0]) + self.num_outputs


Generate = Callable[[list[TokenIds], int], list[TokenIds]]
"""From prompts of one length and a number of tokens to what was generated after each prompt."""

Open = Callable[[Task], Generate]
"""An engine with room for this task. What the one before took may be given back."""


# -- llama.cpp ------------------------------------------------------------------------------------------------------------


class LlamaCpp:
    """Contexts of one model. Every step is one llama_decode for all sequences, and one argmax by numpy."""

    def __init__(self, model: Path, threads: int) -> None:
        from llama_cpp import llama_cpp

        self._lib = llama_cpp
        self._threads = threads
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(bytes(model), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._batch: Any = None

    def open(self, task: Task) -> Generate:
        lib, sequences = self._lib, len(task.prompts)
        if self._context is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = sequences * -(-task.length // 256) * 256  # llama.cpp rounds each sequence's share up to 256
        params.n_batch = max(2048, sequences * len(task.prompts[0]))  # all prompts in one call, as n_ubatch tokens a time
        params.n_threads = params.n_threads_batch = self._threads
        self._context = lib.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp makes no context for {sequences} sequences of {task.length} tokens")
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        return self._generate

    def _generate(self, prompts: list[TokenIds], num_outputs: int) -> list[TokenIds]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        latest = self._step(prompts, 0)
        outputs = [[token] for token in latest]
        for position in range(len(prompts[0]), len(prompts[0]) + num_outputs - 1):
            latest = self._step([[token] for token in latest], position)
            for output, token in zip(outputs, latest, strict=True):
                output.append(token)
        return outputs

    def _step(self, rows: list[TokenIds], position: int) -> TokenIds:
        """Each sequence's next token after its row, which begins at ``position``."""
        import numpy as np

        batch, at = self._batch, 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(row) - 1
                at += 1
        batch.n_tokens = at
        if status := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = self._lib.llama_get_logits(self._context)
        next_tokens: TokenIds = np.ctypeslib.as_array(logits, (len(rows), self._vocab_size)).argmax(axis=1).tolist()
        return next_tokens


def llama_cpp(model: Path, threads: int) -> Open:
    return LlamaCpp(model, threads).open


# -- OpenVINO GenAI -------------------------------------------------------------------------------------------------------


def openvino_paged(model: Path, threads: int, **settings: str) -> Open:
    """ContinuousBatchingPipeline, with a step's tokens as large as it needs to take all prompts at once."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 4096
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **settings}
    )

    def generate(prompts: list[TokenIds], num_outputs: int) -> list[TokenIds]:
        ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(ids, [_greedy(num_outputs)] * len(ids))
        return [list(result.m_generation_ids[0]) for result in results]

    return lambda task: generate


def openvino_stateful(model: Path, threads: int) -> Open:
    """LLMPipeline with the attention that is not paged: one batch from its first token to its last."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        model, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1
    )

    def generate(prompts: list[TokenIds], num_outputs: int) -> list[TokenIds]:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return [list(tokens) for tokens in pipeline.generate(inputs, _greedy(num_outputs)).tokens]

    return lambda task: generate


def _greedy(num_outputs: int) -> Any:
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = num_outputs, True, False
    config.set_eos_token_id(2**31 - 1)  # it wants one, and there is no such token
    return config


ENGINES: dict[str, Callable[[Path, int], Open]] = {
    "llama.cpp": llama_cpp,
    "OpenVINO paged": openvino_paged,
    "OpenVINO paged, f32": partial(openvino_paged, INFERENCE_PRECISION_HINT="f32"),
    "OpenVINO stateful": openvino_stateful,
}


def measure(open_engine: Open, tasks: list[Task]) -> list[dict[str, Any]]:
    """Seconds from handing over the prompts to the last token, and the tokens."""
    measured = []
    for task in tasks:
        generate = open_engine(task)
        generate(task.warm_up, min(8, task.num_outputs))
        began = time.perf_counter()
        outputs = generate(task.prompts, task.num_outputs)
        measured.append({"seconds": time.perf_counter() - began, "outputs": outputs})
    return measured


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    name, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    tasks = [Task(*task) for task in json.loads(sys.stdin.readline())]
    print(json.dumps(measure(ENGINES[name](model, threads), tasks)), file=results)


if __name__ == "__main__":
    main()
