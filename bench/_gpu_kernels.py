"""FlashInfer's kernels that the models here need: which they are, what compiling them takes, and keeping them for next time.

FlashInfer compiles a module where it is first called, one after the other. With FLASHINFER_DISABLE_JIT it says instead what
it would have compiled: so the calls are made twice, and between them all of it is compiled at once.

    python -m bench._gpu_kernels --out .aot [--only norm rope] [--jobs N]

compiles the same on a machine that has nvcc and FlashInfer but no GPU, for ``bench.gpu --aot .aot``; what is missing there
after all is compiled on the GPU machine.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench._common import progress
from bench._gpu_toolchain import fallbacks
from ferrum_rt.interfaces.tensor import AttentionKind
from ferrum_rt.kernels.batch import KvPages, QuerySpan, TokenBatch, allocate_pages
from ferrum_rt.kernels.cuda import CudaOps
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams, draw_in_graph

BLOCK_SIZE = 16
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


class Attention(NamedTuple):
    """Layers of one ``kind`` in a model of ``dtype`` with pages of ``kv_dtype``."""

    kind: AttentionKind
    dtype: torch.dtype
    kv_dtype: torch.dtype

    def __str__(self) -> str:
        kind = self.kind
        extras = [name for name, value in (("window", kind.window), ("soft cap", kind.soft_cap)) if value is not None]
        shape = f"{kind.num_heads} heads over {kind.num_kv_heads} of {kind.head_dim}"
        return ", ".join([shape, *extras, f"{self.dtype} over {self.kv_dtype}"])


# The shapes of ``_gpu_models``, the demo model, and what ``tests/gpu`` has beside them: windows and soft caps as tiny
# checkpoints of Mistral and Gemma have them.
ATTENTION = [
    *(Attention(AttentionKind(*shape, 0.1), BF16, BF16) for shape in ((32, 8, 128), (16, 8, 128), (32, 8, 64), (4, 2, 64))),
    Attention(AttentionKind(4, 2, 64, 0.1), FP16, FP16),
    Attention(AttentionKind(4, 2, 64, 0.1), FP16, FP8),
    Attention(AttentionKind(4, 2, 64, 0.1, window=16), BF16, BF16),
    Attention(AttentionKind(4, 2, 64, 0.1, soft_cap=5.0), BF16, BF16),
    Attention(AttentionKind(4, 2, 64, 0.1, window=16, soft_cap=5.0), BF16, BF16),
    Attention(AttentionKind(8, 4, 256, 0.1, window=100, soft_cap=50.0), BF16, BF16),
]
_NO_JIT = "FLASHINFER_DISABLE_JIT"
_CACHE = "flashinfer_jit_cache"
_GROUP = 8  # modules, of some ten sources each
_MADE_HERE = '"""Compiled for one version of FlashInfer and of tvm-ffi."""'
_PACKAGE = f"""{_MADE_HERE}

from pathlib import Path

__version__ = {{version!r}}


def get_jit_cache_dir() -> str:
    return str(Path(__file__).parent)
"""


class Call(NamedTuple):
    """``make`` calls what needs a module. ``what`` is for people."""

    what: str
    make: Callable[[], object]


def calls(device: str, flashinfer: Any = None) -> Iterator[Call]:
    """All that is called of FlashInfer, what every model needs first."""
    types = dict.fromkeys(attention[1:] for attention in ATTENTION)
    made = {
        (dtype, kv_dtype): CudaOps(device, block_size=BLOCK_SIZE, kv_dtype=kv_dtype, dtype=dtype, flashinfer=flashinfer)
        for dtype, kv_dtype in types
    }
    for dtype in (BF16, FP16):
        yield from _small_calls(made[dtype, dtype], dtype)
    logits, params = torch.zeros((2, 512), device=device), draw_params(2, device)
    yield Call("draw", lambda: draw_in_graph(logits, params, DrawForm.TRUNCATED, flashinfer))
    for attention in ATTENTION:
        step = _Step(made[attention[1:]], attention)
        yield Call(f"prefill, {attention}", step.prefill)
        yield Call(f"decode, {attention}", step.decode)


def _small_calls(ops: CudaOps, dtype: torch.dtype) -> Iterator[Call]:
    x, weight = ops.zeros((2, 128), dtype), ops.zeros((128,), torch.float32)
    half, heads = ops.zeros((2, 64), dtype), ops.zeros((2, 2, 64), dtype)
    positions, cos_sin = ops.zeros((2,), torch.int64), ops.zeros((4, 64), torch.float32)
    yield Call("norm", lambda: ops.rms_norm(x.clone(), x, weight, 1e-6))
    yield Call("silu", lambda: ops.gated_activation(half, x, "silu"))
    yield Call("gelu", lambda: ops.gated_activation(half, x, "gelu_tanh"))
    yield Call("rope", lambda: ops.qk_norm_rope(heads, None, 1e-6, positions, cos_sin))


class _Step:
    """Of two sequences of one page each."""

    def __init__(self, ops: CudaOps, attention: Attention) -> None:
        kind = attention.kind
        self._ops, self._kind, self._dtype = ops, kind, attention.dtype
        rows = 2 * BLOCK_SIZE
        self._pages: KvPages = allocate_pages(rows, kind.num_kv_heads, kind.head_dim, attention.kv_dtype, ops.device)
        self._pages.data.view(torch.uint8).zero_()
        self._tables = ops.from_host([[0], [1]], torch.int64)

    def prefill(self) -> None:
        none = self._ops.zeros((0,), torch.int64)
        spans = [QuerySpan(0, 0, 2, 4), QuerySpan(1, 2, 3, 0)]  # one query alone would be a decode
        batch = TokenBatch(none, none, none, none, spans, self._tables, BLOCK_SIZE)
        self._attend(5, self._ops.plan_attention(batch, [self._kind]))

    def decode(self) -> None:
        attention = self._ops.decode_attention(2, 1, [self._kind])
        attention.replan([0, 1], [5, 3], self._tables)
        self._attend(2, attention.plan)

    def _attend(self, rows: int, plan: Any) -> None:
        q = self._ops.zeros((rows, self._kind.num_heads, self._kind.head_dim), self._dtype)
        out = self._ops.zeros((rows, self._kind.num_heads * self._kind.head_dim), self._dtype)
        self._ops.attention(out, q, self._pages, plan, self._kind)


def draw_params(rows: int, device: str, **fields: float) -> DrawParams:
    """The same for all rows; where nothing is said temperature 1 and no cut."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "draws": 0.5, **fields}
    types = {"top_k": torch.int32, "draws": torch.float64}
    return DrawParams(
        *(torch.full((rows,), values[name], dtype=types.get(name, torch.float32), device=device) for name in values)
    )


@contextmanager
def _without_compiling() -> Iterator[None]:
    os.environ[_NO_JIT] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_JIT]


def missing_modules(todo: list[Call]) -> dict[str, Any]:
    """FlashInfer's build specifications by name, of all modules that the calls would have compiled."""
    missing: dict[str, Any] = {}
    with _without_compiling():
        for call in todo:
            try:
                call.make()
            except Exception as error:
                spec = getattr(error, "spec", None)
                if spec is None:
                    progress(f"{call.what}: {error!r}")
                else:
                    missing[spec.name] = spec
    return missing


def compile_all(device: str, out: Path, put: Callable[..., None]) -> None:
    """Compile, call, and copy what was compiled to ``out``/aot, which is on PYTHONPATH of whatever runs after this, and of
    what runs next time. What came from such a folder is copied too, so that the new one is whole. A few modules at a time:
    if this is cut off, what was compiled by then is there."""
    import flashinfer
    from flashinfer.jit import core, env

    aot = out / "aot"
    take_over(env.FLASHINFER_AOT_DIR, aot / _CACHE)
    todo = list(calls(device))
    began = time.perf_counter()
    missing = missing_modules(todo)
    progress(f"{len(missing)} modules to compile: {', '.join(missing)}")
    for first_of_group in range(0, len(missing), _GROUP):
        try:
            core.build_jit_specs(list(missing.values())[first_of_group : first_of_group + _GROUP])
        except Exception as error:  # the calls below compile what is missing, one by one, and say which of them fails
            put(build_error=repr(error)[-2000:])
        put(modules=len(missing), compile_s=time.perf_counter() - began, jobs=os.environ.get("MAX_JOBS"))
        keep_for_next_time(env.FLASHINFER_JIT_DIR, aot, flashinfer.__version__, put)
    # Else it asks ninja, which keeps no record of what another build compiled, and would compile each module again.
    env.FLASHINFER_AOT_DIR = aot / _CACHE
    first, again, failures = {}, {}, {}
    for call in todo:
        try:
            first[call.what] = _seconds(call)
            again[call.what] = _seconds(call)
        except Exception as error:
            failures[call.what] = repr(error)[-1000:]
    put(first_call_s=first, second_call_s=again, failures=failures)
    keep_for_next_time(env.FLASHINFER_JIT_DIR, aot, flashinfer.__version__, put)


def take_over(earlier: Path, package: Path) -> None:
    """The libraries that an earlier run left; not those that somebody else compiled of all there is."""
    made_here = earlier / "__init__.py"
    if made_here.is_file() and made_here.read_text(encoding="utf-8").startswith(_MADE_HERE) and earlier != package:
        shutil.copytree(earlier, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def specs_without_gpu() -> list[Any]:
    """What ``calls`` needs on a GPU of compute capability 9.0, by the rules of FlashInfer 0.6.18: prefills run on FA3, over
    fp8 on FA2, decodes of groups from four on with FA2's prefill kernel, others with the decode kernel."""
    from flashinfer.jit import activation, norm, rope, sampling
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module

    small = [norm.gen_norm_module(), rope.gen_rope_module(), sampling.gen_sampling_module()]
    small += [activation.gen_act_and_mul_module(name) for name in ("silu", "gelu_tanh")]
    attention = {}
    for kind, dtype, kv_dtype in ATTENTION:
        types, dims = (dtype, kv_dtype, dtype, torch.int32), (kind.head_dim, kind.head_dim)
        shape = (*types, *dims, 0, kind.window is not None, kind.soft_cap is not None)  # 0: no rotation
        is_grouped, is_narrow = kind.num_heads // kind.num_kv_heads >= 4, kv_dtype is FP8
        for spec in (
            gen_batch_prefill_module("fa2", *shape, False) if is_grouped else gen_batch_decode_module(*shape),
            gen_batch_prefill_module("fa2" if is_narrow else "fa3", *shape, False),
        ):
            attention[spec.name] = spec
    return [*small, *attention.values()]


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call.make()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def keep_for_next_time(built: Path, aot: Path, version: str, put: Callable[..., None]) -> None:
    """FlashInfer of ``version`` asks a package ``flashinfer_jit_cache`` where compiled modules lie, if there is one."""
    package = aot / _CACHE
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(_PACKAGE.format(version=version), encoding="utf-8")
    sizes = {}
    for library in sorted(built.glob("*/*.so")):
        if library.stem == library.parent.name:
            target = package / library.stem / library.name
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(library, target)
            sizes[library.stem] = library.stat().st_size
    put(object_seconds=compile_seconds(built), library_bytes=sizes, aot=str(aot))


def compile_seconds(built: Path) -> dict[str, float]:
    """By module, the processor seconds of its compiler runs as ninja wrote them down."""
    found: dict[str, float] = {}
    for log in sorted(built.rglob(".ninja_log")):
        for line in log.read_text(encoding="utf-8").splitlines():
            fields = line.split("\t")
            if not line.startswith("#") and len(fields) == 5:
                module = Path(fields[3]).parent.name or log.parent.name
                found[module] = found.get(module, 0.0) + (int(fields[1]) - int(fields[0])) / 1000
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles FlashInfer's kernels on a machine without a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="a folder for bench.gpu --aot")
    parser.add_argument("--only", nargs="+", help="modules whose names begin like this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "ferrum-flashinfer")
    args = parser.parse_args()
    # FlashInfer reads these when it is imported, or calls ninja; this process is ours.
    os.environ |= {
        "FLASHINFER_WORKSPACE_BASE": str(args.cache),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "MAX_JOBS": str(args.jobs),
        **fallbacks(args.cache / "stubs"),
    }
    import flashinfer
    from flashinfer.jit import core, env

    found: dict[str, Any] = {}
    specs = [spec for spec in specs_without_gpu() if not args.only or spec.name.startswith(tuple(args.only))]
    for spec in specs:
        progress(f"compiling {spec.name}")
        core.build_jit_specs([spec], skip_prebuilt=False)
        keep_for_next_time(env.FLASHINFER_JIT_DIR, args.out, flashinfer.__version__, lambda **fields: found.update(fields))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
