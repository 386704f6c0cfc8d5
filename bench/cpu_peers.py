"""How fast is the runtime on the CPU beside llama.cpp, OpenVINO GenAI and transformers, and beside what the machine allows?

One checkpoint of random weights in the shape of Qwen3-0.6B, in two widths, and greedy generation from token ids:

======  =============  ===========================  =======================================  ============
width   ferrum_rt      llama.cpp                    OpenVINO GenAI                           transformers
======  =============  ===========================  =======================================  ============
bf16    bfloat16       GGUF in BF16                 IR with weights in fp16                  bfloat16
int8    dtype="int8"   GGUF in Q8_0                 IR with weights in int8, by channel      (none)
======  =============  ===========================  =======================================  ============

Measured is *decode*, of 1, 4, 16 and 32 requests at once, each 32 tokens in and 64 out: tokens generated per second, from
handing over the prompts until every request has its last token; and *prefill*, of one prompt of 256 and one of 2,048 tokens:
the prompt's tokens per second until the first token is there. No request ends early, no prompt is used twice, and each
measurement follows one of the same shape that is not counted. Each engine runs in a process of its own, one at a time, with
the same number of threads, and the repeats are interleaved.

Engines that can do it in more than one way do it in each, and in every row the best way counts; the row says which.

- *llama.cpp*, built for this processor: all sequences in one llama_decode per step, argmax by numpy; its defaults otherwise
  (flash attention where it chooses so, keys and values in fp16).
- *OpenVINO GenAI*: *paged* is ContinuousBatchingPipeline, *stateful* is LLMPipeline with unpaged attention. Both compute
  in bf16 where the processor has it, which is their default, and quantize activations to multiply with int8; *paged, f32*
  computes in float32 from weights in fp16, which can be faster for a single request.
- *transformers*: *generate* and *continuous batching*, as in bench/throughput.py.

The *limit* is computed (bench/_cpu_limits.py) from the memory bandwidth, which is measured in the same run as a sum over
more than the caches hold, and from the operations per second that --bf16-gflops and --int8-gops say; the defaults are those
of two cores of an AMD EPYC (Zen 4). An engine that quantizes keys and values reads a little less than is counted here.

That the conversions are right is seen in the tokens: *agreement* is with transformers' generate, of each request's first
token, and of all tokens before the first that differs. Random weights part early by rounding alone, in int8 sooner. Where a
bf16 engine has fewer than half of the first tokens, the bench ends with an error.

The peers are no dependencies of ours, and live in an environment of their own:

    make bench-peers PEERS=DIRECTORY
    python -m bench.cpu_peers --peers-python DIRECTORY/bin/python [--repeats 5] [--threads 2] [--engines NAME …]

Whoever is missing, or cannot do a width, is left out with a note. Transformers is that of our own environment. Five repeats
take more than an hour on two cores.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ferrum_rt
from bench._common import TINY, Spread, finish, limit_threads, machine, progress, qwen3_config, spread, table
from bench._cpu_engines import (
    Generate,
    Job,
    Measured,
    Shape,
    agreement,
    check_lengths,
    create_checkpoint,
    in_process,
    measure,
    new_process,
    ours,
    transformers_continuous_batching,
    transformers_generate,
)
from bench._cpu_limits import WEIGHT_BYTES, Machine, least_seconds, read_bandwidth

OURS, LLAMA_CPP, OPENVINO, TRANSFORMERS = "ferrum_rt", "llama.cpp", "OpenVINO", "transformers"
ENGINES = (OURS, LLAMA_CPP, OPENVINO, TRANSFORMERS)
PACKAGES = {
    LLAMA_CPP: ("llama-cpp-python", "gguf", "torch", "safetensors"),
    OPENVINO: ("openvino-genai", "optimum-intel", "nncf"),
}
"""What the peers' environment must have."""

LOOK = """
import json, sys
from contextlib import suppress
from importlib import metadata
versions = {}
for name in sys.argv[1:]:
    with suppress(metadata.PackageNotFoundError):
        versions[name] = metadata.version(name)
print(json.dumps(versions))
"""

OUR_DTYPES = {"bf16": None, "int8": "int8"}
LOWEST_AGREEMENT = 0.5
HERE = Path(__file__).parent


class Contender(NamedTuple):
    """An engine, in one of its ways, with weights of one width."""

    engine: str
    way: str
    width: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.way}".strip()

    def __str__(self) -> str:
        return f"{self.name}, {self.width}"


REFERENCE = Contender(TRANSFORMERS, "generate", "bf16")
CONTENDERS = (
    *(Contender(OURS, "", width) for width in WEIGHT_BYTES),
    *(Contender(LLAMA_CPP, "", width) for width in WEIGHT_BYTES),
    *(Contender(OPENVINO, way, width) for width in WEIGHT_BYTES for way in ("paged", "stateful")),
    Contender(OPENVINO, "paged, f32", "bf16"),
    REFERENCE,
    Contender(TRANSFORMERS, "continuous batching", "bf16"),
)
HERE_TOO: dict[str, Callable[[Job], AbstractAsyncContextManager[Generate]]] = {
    OURS: ours,
    REFERENCE.name: transformers_generate,
    f"{TRANSFORMERS} continuous batching": transformers_continuous_batching,
}
"""Those that run in our own environment."""

DECODE, PREFILL = "decode", "prefill"
Repeat = dict[Contender, dict[Shape, Measured]]


class Results(NamedTuple):
    """Who took part, what each repeat measured, bytes read per second before it, and who was left out and why."""

    contenders: list[Contender]
    repeats: list[Repeat]
    bandwidths: list[float]
    left_out: dict[str, str]


class Setting(NamedTuple):
    """Where a run takes place: a directory with the models of each peer in it, the peers' interpreter, and ours, if one is
    shared."""

    directory: Path
    peers_python: Path | None
    shared: ProcessPoolExecutor | None
    threads: int


# -- who takes part -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a peer lacks to run, with what to do about it; and versions by distribution."""

    lack: str | None
    versions: dict[str, str]


def look_for(engine: str, python: Path | None) -> Found:
    remedy = "run `make bench-peers PEERS=DIRECTORY` and pass --peers-python DIRECTORY/bin/python"
    if python is None:
        return Found(f"no interpreter with it was named: {remedy}", {})
    try:
        found = subprocess.run([python, "-P", "-c", LOOK, *PACKAGES[engine]], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return Found(f"{python} does not say what it has ({error}): {remedy}", {})
    versions: dict[str, str] = json.loads(found.stdout)
    absent = ", ".join(package for package in PACKAGES[engine] if package not in versions)
    return Found(f"{python} lacks {absent}: {remedy}" if absent else None, versions)


def convert(setting: Setting, engine: str, model: Path) -> None:
    """Raises RuntimeError with the end of what was printed."""
    _run_peer(setting, [str(HERE / "_cpu_peer_convert.py"), engine, str(model), str(setting.directory / engine)], "")
    progress(f"converted the checkpoint for {engine}")


def _run_peer(setting: Setting, command: Sequence[str], told: str) -> str:
    whole = [str(setting.peers_python), "-P", *command]
    done = subprocess.run(whole, input=told, capture_output=True, text=True, cwd=setting.directory, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(whole)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


# -- one after the other --------------------------------------------------------------------------------------------------


def run_one(setting: Setting, contender: Contender, job: Job) -> dict[Shape, Measured]:
    """Raises ConfigError or Unsupported where our own runtime cannot do the width."""
    if (engine := HERE_TOO.get(contender.name)) is not None:
        dtype = OUR_DTYPES[contender.width] if contender.engine == OURS else None
        return in_process(partial(measure, engine, job._replace(dtype=dtype)), setting.shared)
    tasks = [(job.prompts(shape, "warm-up"), job.prompts(shape, "measured"), shape.output_tokens) for shape in job.shapes]
    model = setting.directory / contender.engine / contender.width
    command = [str(HERE / "_cpu_peer_engines.py"), contender.name, str(model), str(setting.threads)]
    results = json.loads(_run_peer(setting, command, json.dumps(tasks) + "\n"))
    measured = {shape: Measured(**result) for shape, result in zip(job.shapes, results, strict=True)}
    for shape, result in measured.items():
        check_lengths(shape, result.outputs)
    return measured


def run_repeat(setting: Setting, contenders: list[Contender], job: Job, left_out: dict[str, str]) -> Repeat:
    """Every contender once. Whoever turns out to be unable is moved to ``left_out``."""
    measured: Repeat = {}
    for contender in list(contenders):
        try:
            measured[contender] = run_one(setting, contender, job)
        except (ferrum_rt.ConfigError, ferrum_rt.Unsupported) as error:
            contenders.remove(contender)
            leave_out(left_out, str(contender), f"{type(error).__name__}: {error}")
            continue
        rates = (f"{rate(shape, found):.1f} ({title(shape)})" for shape, found in measured[contender].items())
        progress(f"repeat {job.seed}, {contender}, tokens/s: {', '.join(rates)}")
    return measured


def leave_out(left_out: dict[str, str], who: str, why: str) -> None:
    left_out[who] = why
    print(f"NOTE: left out is {who}: {why}")


# -- what came of it ------------------------------------------------------------------------------------------------------


def measure_of(shape: Shape) -> str:
    return PREFILL if shape.output_tokens == 1 else DECODE


def title(shape: Shape) -> str:
    if measure_of(shape) == PREFILL:
        return f"{PREFILL} of {shape.prompt_tokens} tokens"
    return f"{DECODE}, {shape.requests} at once"


def num_tokens(shape: Shape) -> int:
    return shape.requests * (shape.prompt_tokens if measure_of(shape) == PREFILL else shape.output_tokens)


def rate(shape: Shape, measured: Measured) -> float:
    """Tokens per second: of the prompt where prefill is measured, else those generated."""
    return num_tokens(shape) / measured.seconds


def summarize(
    config: dict[str, Any],
    shapes: Sequence[Shape],
    contenders: Sequence[Contender],
    repeats: Sequence[Repeat],
    limits: Machine,
) -> list[dict[str, Any]]:
    """A row for each shape and width. Ratios are taken within each repeat."""
    rows = []
    for shape in shapes:
        for width in WEIGHT_BYTES:
            rates = {
                contender: [rate(shape, repeat[contender][shape]) for repeat in repeats]
                for contender in contenders
                if contender.width == width
            }
            if not rates:
                continue
            best = best_ways(rates)
            limit = num_tokens(shape) / least_seconds(config, width, shape, limits)
            rows.append(
                {
                    "measure": measure_of(shape),
                    **shape._asdict(),
                    "width": width,
                    "tokens_per_s": {contender.name: spread(values) for contender, values in rates.items()},
                    "best_way": {engine: contender.way for engine, contender in best.items() if contender.way},
                    **against_best_peer(rates, best),
                    "limit_tokens_per_s": limit,
                    "share_of_limit": {
                        engine: spread(value / limit for value in rates[contender]) for engine, contender in best.items()
                    },
                }
            )
    return rows


def best_ways(rates: dict[Contender, list[float]]) -> dict[str, Contender]:
    """Each engine in the way with the highest median."""
    best: dict[str, Contender] = {}
    for contender in sorted(rates, key=lambda each: statistics.median(rates[each])):
        best[contender.engine] = contender
    return best


def against_best_peer(rates: dict[Contender, list[float]], best: dict[str, Contender]) -> dict[str, Any]:
    """Empty without ours, and without peers."""
    peers = [contender for engine, contender in best.items() if engine != OURS]
    if OURS not in best or not peers:
        return {}
    peer = max(peers, key=lambda each: statistics.median(rates[each]))
    ratios = spread(mine / other for mine, other in zip(rates[best[OURS]], rates[peer], strict=True))
    return {"best_peer": peer.name, "ours_over_best_peer": ratios}


def agreements(repeats: Sequence[Repeat], contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Everybody's tokens with those of REFERENCE; empty where that is left out."""
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        if contender == REFERENCE or REFERENCE not in contenders:
            continue
        mine, reference = (
            [output for repeat in repeats for found in repeat[each].values() for output in found.outputs]
            for each in (contender, REFERENCE)
        )
        first = agreement([output[:1] for output in mine], [output[:1] for output in reference])
        rows.append(
            {
                "contender": str(contender),
                "first": first,
                "all": agreement(mine, reference),
                "is_suspect": contender.width == REFERENCE.width and first < LOWEST_AGREEMENT,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], engine: str) -> str:
        way = row["best_way"].get(engine)
        found: Spread | None = row["tokens_per_s"].get(f"{engine} {way}" if way else engine)
        return "-" if found is None else f"{found.show()} {way or ''}".strip()

    header = ["", "width", *ENGINES, "ours / best peer", "limit", "ours / limit"]
    return table(
        header,
        [
            [
                title(Shape(row["requests"], row["prompt_tokens"], row["output_tokens"])),
                row["width"],
                *(cell(row, engine) for engine in ENGINES),
                row["ours_over_best_peer"].show(2) if "best_peer" in row else "-",
                f"{row['limit_tokens_per_s']:.0f}",
                row["share_of_limit"][OURS].show(2) if OURS in row["share_of_limit"] else "-",
            ]
            for row in rows
        ],
    )


# -- all of it together ---------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast is the runtime on the CPU beside its peers and the machine's limits?"
    )
    parser.add_argument("--peers-python", type=Path, help="the interpreter of the environment that `make bench-peers` made")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 32], help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, nargs="+", default=[256, 2048], help="lengths of prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28, help="of the checkpoint that is made")
    parser.add_argument("--threads", type=int, default=2, help="that each engine computes with")
    parser.add_argument("--bf16-gflops", type=float, default=465.0, help="what so many threads can compute at most")
    parser.add_argument("--int8-gops", type=float, default=932.0)
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.output_tokens < 2:
        parser.error("--output-tokens: at least 2, for a request with one is a measure of prefill")
    if args.smoke:
        args.batch, args.prefill, args.output_tokens, args.repeats = [1, 2], [48], 8, 1
    return args


def gather(args: argparse.Namespace, setting: Setting, model: Path, left_out: dict[str, str]) -> list[Contender]:
    """Who is there, with the checkpoint converted for each."""
    engines = set(args.engines)
    for engine in (name for name in PACKAGES if name in args.engines):
        if (lack := look_for(engine, setting.peers_python).lack) is None:
            convert(setting, engine, model)
        else:
            engines.remove(engine)
            leave_out(left_out, engine, lack)
    return [contender for contender in CONTENDERS if contender.engine in engines]


def run(args: argparse.Namespace, config: dict[str, Any], shapes: Sequence[Shape]) -> Results:
    left_out: dict[str, str] = {}
    repeats, bandwidths = [], []
    with ExitStack() as stack:
        # A smoke run imports transformers only once.
        shared = stack.enter_context(new_process()) if args.smoke else None
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ferrum-bench-")))
        setting = Setting(directory, args.peers_python and args.peers_python.absolute(), shared, args.threads)
        model = directory / "model"
        in_process(partial(create_checkpoint, model, config), shared)
        contenders = gather(args, setting, model, left_out)
        for number in range(1, args.repeats + 1):
            bandwidths.append(in_process(partial(read_bandwidth, 1 << (24 if args.smoke else 30)), shared))
            job = Job(model, tuple(shapes), config["vocab_size"], seed=number)
            repeats.append(run_repeat(setting, contenders, job, left_out))
    return Results(contenders, repeats, bandwidths, left_out)


def main() -> None:
    args = parse_arguments()
    limit_threads(args.threads)
    peers = [look_for(engine, args.peers_python).versions for engine in PACKAGES]
    facts = {**machine(), "peers": {name: version for versions in peers for name, version in versions.items()}}
    config = qwen3_config(**(TINY if args.smoke else {"num_hidden_layers": args.layers}))
    shapes = [Shape(batch, args.prompt_tokens, args.output_tokens) for batch in args.batch]
    shapes += [Shape(1, length, 1) for length in args.prefill]
    results = run(args, config, shapes)
    limits = Machine(max(results.bandwidths), {"bf16": args.bf16_gflops * 1e9, "int8": args.int8_gops * 1e9})
    rows = summarize(config, shapes, results.contenders, results.repeats, limits)
    agreed = agreements(results.repeats, results.contenders)

    print(f"Tokens per second: median (low to high) of {args.repeats} repeats, {args.threads} threads each")
    print(show(rows))
    print(f"Memory is read at {limits.read_bytes_per_s / 1e9:.1f} GB/s. Share of tokens that agree with {REFERENCE}:")
    print(table(["", "first", "all"], [[row["contender"], f"{row['first']:.2f}", f"{row['all']:.2f}"] for row in agreed]))
    finish(
        "cpu_peers",
        facts,
        {
            "repeats": args.repeats,
            "threads": args.threads,
            "shape": {key: config[key] for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")},
            "operations_per_s": limits.operations_per_s,
        },
        {
            "results": rows,
            "agreement_with_generate": agreed,
            "read_bytes_per_s": spread(results.bandwidths),
            "left_out": results.left_out,
        },
    )
    if suspects := [row["contender"] for row in agreed if row["is_suspect"]]:
        raise SystemExit(f"fewer than half of the first tokens agree, so the model may be another: {', '.join(suspects)}")


if __name__ == "__main__":
    main()
