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
_NO_JIT = "FLASHINFER_DISABLE_JIT"
_PACKAGE = '''"""Compiled for one version of FlashInfer and of tvm-ffi."""

from pathlib import Path

__version__ = {version!r}


def get_jit_cache_dir() -> str:
    return str(Path(__file__).parent)
'''


class Call(NamedTuple):
    """``make`` calls what needs a module. ``what`` is for people."""

    what: str
    make: Callable[[], object]


def calls(device: str, flashinfer: Any = None) -> Iterator[Call]:
    """For the shapes of ``_gpu_models`` in bfloat16, and the demo model in both types of 16 bits."""
    kinds = {
        torch.bfloat16: [AttentionKind(*shape, 0.1) for shape in ((32, 8, 128), (16, 8, 128), (32, 8, 64), (4, 2, 64))],
        torch.float16: [AttentionKind(4, 2, 64, 0.1)],
    }
    for dtype, attention in kinds.items():
        ops = CudaOps(device, block_size=BLOCK_SIZE, kv_dtype=dtype, dtype=dtype, flashinfer=flashinfer)
        for kind in attention:
            shape = f"{kind.num_heads} heads over {kind.num_kv_heads} of {kind.head_dim}, {dtype}"
            yield Call(f"prefill, {shape}", _Attention(ops, kind, dtype).prefill)
            yield Call(f"decode, {shape}", _Attention(ops, kind, dtype).decode)
        yield from _small_calls(ops, dtype)
    logits, params = torch.zeros((2, 512), device=device), draw_params(2, device)
    yield Call("draw", lambda: draw_in_graph(logits, params, DrawForm.TRUNCATED, flashinfer))


def _small_calls(ops: CudaOps, dtype: torch.dtype) -> Iterator[Call]:
    x, weight = ops.zeros((2, 128), dtype), ops.zeros((128,), torch.float32)
    half, heads = ops.zeros((2, 64), dtype), ops.zeros((2, 2, 64), dtype)
    positions, cos_sin = ops.zeros((2,), torch.int64), ops.zeros((4, 64), torch.float32)
    yield Call("norm", lambda: ops.rms_norm(x.clone(), x, weight, 1e-6))
    yield Call("silu", lambda: ops.gated_activation(half, x, "silu"))
    yield Call("gelu", lambda: ops.gated_activation(half, x, "gelu_tanh"))
    yield Call("rope", lambda: ops.qk_norm_rope(heads, None, 1e-6, positions, cos_sin))


class _Attention:
    """One step of two sequences of one page each."""

    def __init__(self, ops: CudaOps, kind: AttentionKind, dtype: torch.dtype) -> None:
        self._ops, self._kind, self._dtype = ops, kind, dtype
        self._pages: KvPages = allocate_pages(2 * BLOCK_SIZE, kind.num_kv_heads, kind.head_dim, dtype, ops.device)
        self._pages.data.zero_()
        self._tables = ops.from_host([[0], [1]], torch.int64)

    def prefill(self) -> None:
        none = self._ops.zeros((0,), torch.int64)
        spans = [QuerySpan(0, 0, 1, 4), QuerySpan(1, 1, 3, 0)]
        batch = TokenBatch(none, none, none, none, spans, self._tables, BLOCK_SIZE)
        self._attend(4, self._ops.plan_attention(batch, [self._kind]))

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
    """Compile, call, and copy what was compiled to ``out``/aot, a folder to put on PYTHONPATH next time."""
    import flashinfer
    from flashinfer.jit import core, env

    todo = list(calls(device))
    began = time.perf_counter()
    missing = missing_modules(todo)
    progress(f"{len(missing)} modules to compile: {', '.join(missing)}")
    try:
        core.build_jit_specs(list(missing.values()))
    except Exception as error:  # the calls below compile what is missing, one by one, and say which of them fails
        put(build_error=repr(error)[-2000:])
    put(modules=len(missing), compile_s=time.perf_counter() - began, jobs=os.environ.get("MAX_JOBS"))
    keep_for_next_time(env.FLASHINFER_JIT_DIR, out / "aot", flashinfer.__version__, put)
    first, again, failures = {}, {}, {}
    for call in todo:
        try:
            first[call.what] = _seconds(call)
            again[call.what] = _seconds(call)
        except Exception as error:
            failures[call.what] = repr(error)[-1000:]
    put(first_call_s=first, second_call_s=again, failures=failures)
    keep_for_next_time(env.FLASHINFER_JIT_DIR, out / "aot", flashinfer.__version__, put)


def specs_without_gpu() -> list[Any]:
    """What ``calls`` needs on a GPU of compute capability 9.0, by the rules of FlashInfer 0.6.18: prefills run on FA3,
    decodes of groups from four on with FA2's prefill kernel, others with the decode kernel."""
    from flashinfer.jit import activation, norm, rope, sampling
    from flashinfer.jit.attention import gen_batch_decode_module, gen_batch_prefill_module

    small = [norm.gen_norm_module(), rope.gen_rope_module(), sampling.gen_sampling_module()]
    small += [activation.gen_act_and_mul_module(name) for name in ("silu", "gelu_tanh")]
    attention = []
    for dtype, dims, grouped in ((torch.bfloat16, (128, 64), (128, 64)), (torch.float16, (64,), ())):
        for dim in dims:
            shape = (dtype, dtype, dtype, torch.int32, dim, dim, 0, False, False)  # no rotation, no window, no soft cap
            attention.append(gen_batch_decode_module(*shape))
            attention += [gen_batch_prefill_module("fa2", *shape, False)] if dim in grouped else []
            attention.append(gen_batch_prefill_module("fa3", *shape, False))
    return [*small, *attention]


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call.make()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def keep_for_next_time(built: Path, aot: Path, version: str, put: Callable[..., None]) -> None:
    """FlashInfer of ``version`` asks a package ``flashinfer_jit_cache`` where compiled modules lie, if there is one."""
    package = aot / "flashinfer_jit_cache"
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
