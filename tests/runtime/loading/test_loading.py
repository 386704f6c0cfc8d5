"""From a directory to a model that runs, and what is said of a directory that cannot."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ferrum_rt.interfaces.config import build_config
from ferrum_rt.interfaces.errors import ConfigError, FerrumError, ModelError, TokenizerError, Unsupported
from ferrum_rt.interfaces.model_executor import PrefillInput, SlotAssignment, StepInput, UnifiedBatch
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.types import DataType, ModelType, RequestId, SamplingParams, TokenId
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.loading.loader import LoadedModel, load_model
from ferrum_rt.runtime.models.families import parse_config
from tests.checkpoints import EOS, FAMILIES, VOCAB_SIZE, save_checkpoint, save_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TENSOR = "model.layers.2.mlp.up_proj.weight"

Change = Callable[[Path], object]


def save(kind: str, directory: Path, **settings: Any) -> Path:
    save_checkpoint(kind, directory, **settings)
    return save_tokenizer(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in one file; not to be written to."""
    return save("llama", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with layers of two types; not to be written to."""
    return save("gemma3", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts; not to be written to."""
    return save("mixtral", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint as ``checkpoint``, in shards."""
    directory = save("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def load(directory: Path, **fields: Any) -> LoadedModel:
    return load_model(build_config(str(directory), None, fields))


def first_tokens(model: LoadedModel) -> list[TokenId | None]:
    """The token that follows each of 16 prompts, greedily."""
    prompts = [[TokenId((7 * row + 3 * column) % 300 + 5) for column in range(2 + row)] for row in range(16)]
    sampling = SamplingConfig(temperature=0.0)
    slots = [SlotAssignment(slot, RequestId(f"{slot}"), sampling, [2 * slot, 2 * slot + 1]) for slot in range(16)]
    batch = UnifiedBatch([], [PrefillInput(slot, prompt, 0, True) for slot, prompt in enumerate(prompts)])
    output = model.executor.execute(StepInput(slots, [], [], batch)).result()
    return [item.sampled.token_id for item in output.prefills if item.sampled is not None]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_config(**changes: Any) -> Change:
    """Lay ``changes`` over config.json; ``...`` takes a key out."""

    def change(directory: Path) -> None:
        config = read_json(directory / CONFIG, ModelError) | changes
        write_json(directory / CONFIG, {key: value for key, value in config.items() if value is not ...})

    return change


def edit_tensors(**changes: torch.Tensor | None) -> Change:
    """Replace tensors; None takes one out."""

    def change(directory: Path) -> None:
        tensors = {**load_file(directory / WEIGHTS), **changes}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)

    return change


def edit_index(**changes: Any) -> Change:
    """Write an index that finds every tensor in the one file, with ``changes`` laid over it; None takes one out."""

    def change(directory: Path) -> None:
        where = {**dict.fromkeys(load_file(directory / WEIGHTS), WEIGHTS), **changes}
        write_json(directory / INDEX, {"weight_map": {name: file for name, file in where.items() if file is not None}})

    return change


def write(name: str, content: bytes | str) -> Change:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name: str) -> Change:
    return lambda directory: (directory / name).unlink()


def truncate(name: str, size: int) -> Change:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size])


def both(first: Change, second: Change) -> Change:
    def change(directory: Path) -> None:
        first(directory)
        second(directory)

    return change


# -- what loads -----------------------------------------------------------------------------------------------------------


def test_shards_equal_a_single_file(checkpoint: Path, sharded: Path) -> None:
    """A checkpoint in shards is the same model as in one file."""
    whole, parts = load(checkpoint), load(sharded)
    assert parts.executor.model_info.num_parameters == whole.executor.model_info.num_parameters
    assert parts.executor.memory_usage() == whole.executor.memory_usage()
    tokens = first_tokens(whole)
    assert len(set(tokens)) > 4, "tokens that are all the same would prove nothing"
    assert first_tokens(parts) == tokens


def test_index_of_a_single_file(copy: Path, checkpoint: Path) -> None:
    """An index may name the one file, and tensors that no model needs."""
    edit_index(unneeded=WEIGHTS)(copy)
    assert first_tokens(load(copy)) == first_tokens(load(checkpoint))


@pytest.mark.parametrize("kind", FAMILIES)
def test_model_info(kind: str, tmp_path: Path) -> None:
    """What is said of a loaded model is what its checkpoint holds, each parameter counted once."""
    save_checkpoint(kind, tmp_path)
    save_tokenizer(tmp_path)
    info = load(tmp_path).executor.model_info
    assert info.type is parse_config(read_json(tmp_path / CONFIG, ModelError)).type
    assert info.num_parameters == sum(tensor.numel() for tensor in load_file(tmp_path / WEIGHTS).values())
    assert (info.num_layers, info.hidden_size, info.vocab_size) == (4, 64, VOCAB_SIZE)
    assert (info.max_model_len, info.dtype) == (512, DataType.FLOAT32)
    assert info.id == str(tmp_path)


@pytest.mark.parametrize("kind", FAMILIES)
def test_dummy_weights_need_only_a_config(kind: str, tmp_path: Path) -> None:
    """``load_format="dummy"`` makes a model that runs from config.json alone, the same one each time."""
    save_checkpoint(kind, tmp_path / "full")
    (tmp_path / "dummy").mkdir()
    shutil.copy(tmp_path / "full" / CONFIG, tmp_path / "dummy")
    model = load(tmp_path / "dummy", load_format="dummy")
    assert model.tokenizer is None
    tokens = first_tokens(model)
    assert None not in tokens
    assert first_tokens(load(tmp_path / "dummy", load_format="dummy")) == tokens


def test_dummy_weights_with_a_tokenizer(copy: Path) -> None:
    """A tokenizer that is there is loaded beside dummy weights."""
    (copy / WEIGHTS).unlink()
    assert load(copy, load_format="dummy").tokenizer is not None


def test_other_dtypes(checkpoint: Path) -> None:
    """The weights are converted to the type that is asked for, all but norms and rotary tables, and the cache keeps the
    weights' type unless told."""
    model = load(checkpoint, dtype="bfloat16", kv_cache={"num_pages": 8})
    assert model.executor.model_info.dtype is DataType.BFLOAT16
    exact = load(checkpoint, kv_cache={"num_pages": 8})
    assert 2 * model.executor.memory_usage().kv_cache == exact.executor.memory_usage().kv_cache
    in_float32 = 9 * 64 * 4 + 8 * 16 * 16 * 4
    assert 2 * model.executor.memory_usage().weights - in_float32 == exact.executor.memory_usage().weights


def test_end_tokens(copy: Path) -> None:
    """End tokens come from generation_config.json, else from config.json, else from the tokenizer."""
    write_json(copy / "generation_config.json", {"eos_token_id": [7, 8]})
    assert load(copy).eos_token_ids == {7, 8}
    write_json(copy / "generation_config.json", {})
    edit_config(eos_token_id=9)(copy)
    assert load(copy).eos_token_ids == {9}
    edit_config(eos_token_id=...)(copy)
    assert load(copy).eos_token_ids == {EOS}


def test_sampling_defaults(copy: Path) -> None:
    """What generation_config.json recommends becomes the default; without sampling, greedy."""
    write_json(copy / "generation_config.json", {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "bos_token_id": 1})
    assert load(copy).defaults == SamplingParams(temperature=0.6, top_p=0.9, top_k=20)
    write_json(copy / "generation_config.json", {"do_sample": False, "temperature": None})
    assert load(copy).defaults == SamplingParams(temperature=0.0)
    (copy / "generation_config.json").unlink()
    assert load(copy).defaults == SamplingParams()


def test_model_type_alone(checkpoint: Path) -> None:
    """A config without architectures is told by its model_type."""
    config = read_json(checkpoint / CONFIG, ModelError)
    del config["architectures"]
    assert parse_config(config).type is ModelType.LLAMA


# -- older configs --------------------------------------------------------------------------------------------------------


def older(config: dict[str, Any], *, type_key: str = "rope_type") -> dict[str, Any]:
    """The config as transformers 4 wrote it: rope_theta and rope_scaling, no layer_types."""
    config = dict(config)
    config.pop("layer_types", None)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {type_key if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None if scaling[type_key] == "default" else scaling
    return config


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("kind", "now", "then"),
    [
        ("llama", {}, {}),
        ("mistral", {}, {}),
        ("qwen2", {}, {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, {}),
        ("qwen3", {}, {}),
        ("phi3", {}, {}),
        ("gemma2", {}, {}),
        ("gemma3", {}, {"sliding_window_pattern": 3}),
        ("mixtral", {}, {}),
        ("qwen3_moe", {}, {}),
    ],
)
def test_older_configs(kind: str, now: dict[str, Any], then: dict[str, Any], type_key: str, tmp_path: Path) -> None:
    """A config in the form of transformers 4 says the same as in today's."""
    save_checkpoint(kind, tmp_path, **now)
    config = read_json(tmp_path / CONFIG, ModelError)
    spec = parse_config(config)
    assert parse_config(older(config, type_key=type_key) | then) == spec


def test_defaults_of_older_configs(gemma: Path) -> None:
    """Gemma 3 without a pattern has a full layer in every six; a rope that nothing is said of is the plain one."""
    config = older(read_json(gemma / CONFIG, ModelError)) | {"num_hidden_layers": 12}
    del config["_sliding_window_pattern"]
    layers = parse_config(config).layers
    assert [index for index, layer in enumerate(layers) if layer.window is None] == [5, 11]
    for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        del config[key]
    assert {(layer.rope.theta, layer.rope.scaling["rope_type"]) for layer in parse_config(config).layers} == {
        (10000.0, "default")
    }


# -- what does not load ---------------------------------------------------------------------------------------------------


def assert_refused(directory: Path, kind: type[FerrumError], *words: str, **fields: Any) -> None:
    """Loading raises an error of that very class, and its message has all the words."""
    with pytest.raises(FerrumError) as caught:
        load(directory, **fields)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)


DAMAGED_WEIGHTS: list[tuple[Change, tuple[str, ...]]] = [
    (truncate(WEIGHTS, 0), (WEIGHTS,)),
    (truncate(WEIGHTS, 4), (WEIGHTS,)),
    (truncate(WEIGHTS, 1000), (WEIGHTS,)),
    (truncate(WEIGHTS, -1), (WEIGHTS, "truncated")),
    (write(WEIGHTS, bytes(range(256)) * 8), (WEIGHTS, "damaged")),
    (write(WEIGHTS, bytes(2048)), (WEIGHTS, "damaged")),
    (remove(WEIGHTS), (WEIGHTS, "no such file")),
    (edit_tensors(**{TENSOR: None}), (WEIGHTS, TENSOR, "missing")),
    (edit_tensors(**{TENSOR: torch.zeros(64, 96)}), (WEIGHTS, TENSOR, "[64, 96]", "[96, 64]")),
    (edit_tensors(**{TENSOR: torch.zeros(())}), (WEIGHTS, TENSOR, "[]")),
    (edit_tensors(**{TENSOR: torch.zeros(96, 64).to(torch.float8_e4m3fn)}), (WEIGHTS, TENSOR, "F8_E4M3")),
    (edit_tensors(**{TENSOR: torch.zeros(96, 64, dtype=torch.int8)}), (WEIGHTS, TENSOR, "I8")),
    (write(INDEX, "{{"), (INDEX,)),
    (write(INDEX, "[" * 100_000), (INDEX,)),
    (write(INDEX, "[1]"), (INDEX,)),
    (write(INDEX, "{}"), (INDEX, "weight_map")),
    (write(INDEX, '{"weight_map": [1]}'), (INDEX,)),
    (edit_index(**{TENSOR: "../elsewhere.safetensors"}), (INDEX, "../elsewhere.safetensors", "outside")),
    (edit_index(**{TENSOR: "/elsewhere.safetensors"}), (INDEX, "/elsewhere.safetensors", "outside")),
    (edit_index(**{TENSOR: "below/model.safetensors"}), (INDEX, "below/model.safetensors", "outside")),
    (edit_index(**{TENSOR: ""}), (INDEX, "outside")),
    (edit_index(**{TENSOR: "absent.safetensors"}), ("absent.safetensors", "no such file")),
    (edit_index(**{TENSOR: None}), (TENSOR, "missing")),
    (both(edit_index(), edit_tensors(**{TENSOR: None})), (WEIGHTS, TENSOR, "listed in the index")),
]


@pytest.mark.parametrize(("change", "words"), DAMAGED_WEIGHTS)
def test_damaged_weights(copy: Path, change: Change, words: tuple[str, ...]) -> None:
    """Weights that are damaged or of another model are a ModelError that names the file and the tensor."""
    change(copy)
    assert_refused(copy, ModelError, *words)


def test_missing_and_damaged_shards(sharded: Path, tmp_path: Path) -> None:
    """A shard that is missing or cut short is a ModelError that names it."""
    directory = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shard = sorted(directory.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert_refused(directory, ModelError, str(shard), "truncated")
    shard.unlink()
    assert_refused(directory, ModelError, str(shard), "no such file")


NEEDED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DAMAGED_CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(({key: ...}, (repr(key), "missing")) for key in NEEDED_KEYS),
    *(({key: value}, (CONFIG,)) for key in NEEDED_KEYS for value in (None, "64", 64.0, 0, -64, [64])),
    ({"architectures": ["GPT2LMHeadModel"]}, ("GPT2LMHeadModel", "LlamaForCausalLM")),
    ({"architectures": ["Gemma3ForConditionalGeneration"]}, ("Gemma3ForConditionalGeneration",)),
    ({"architectures": ..., "model_type": "gpt2"}, ("gpt2",)),
    ({"architectures": ..., "model_type": ...}, ("architecture",)),
    ({"architectures": 5}, (CONFIG,)),
    ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
    ({"hidden_act": "relu"}, ("relu",)),
    ({"num_key_value_heads": 3}, ("4 heads", "3 key-value heads")),
    ({"head_dim": -16}, (CONFIG,)),
    ({"rms_norm_eps": "small"}, ("norm_eps",)),
    ({"rms_norm_eps": None}, ("norm_eps",)),
    ({"layer_types": ["full_attention"]}, (CONFIG,)),
    ({"layer_types": ["chunked_attention"] * 4}, ("chunked_attention",)),
    ({"layer_types": 4}, (CONFIG,)),
    ({"rope_parameters": {"rope_type": "longrope"}}, ("longrope", "not supported")),
    ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2}}, ("dynamic", "not supported")),
    ({"rope_parameters": {"rope_type": ["linear"]}}, (CONFIG,)),
    ({"rope_parameters": {"rope_type": "linear"}}, ("linear", "'factor'")),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ("linear",)),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ("llama3", "'low_freq_factor'")),
    ({"rope_parameters": LLAMA3 | {"factor": 0.0}}, ("llama3",)),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "big"}}, ("yarn",)),
    ({"rope_parameters": LLAMA3 | {"rope_theta": -1.0}}, ("theta",)),
    ({"rope_parameters": LLAMA3 | {"rope_theta": "big"}}, (CONFIG,)),
    ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.2}}, ("rotary_dim",)),
    ({"rope_parameters": [1]}, (CONFIG,)),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGED_CONFIGS, ids=lambda value: str(value)[:60])
def test_damaged_configs(copy: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    """A config.json that lacks a key, or asks for what we do not have, is a ModelError that names it."""
    edit_config(**changes)(copy)
    assert_refused(copy, ModelError, CONFIG, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sliding_window": None}, ("sliding_window",)),
        ({"sliding_window": "16"}, ("window",)),
        ({"sliding_window": 0}, ("window",)),
        ({"query_pre_attn_scalar": 0}, (CONFIG,)),
        ({"query_pre_attn_scalar": "24"}, (CONFIG,)),
        ({"final_logit_softcapping": "8"}, ("final_soft_cap",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, ("sliding_attention",)),
        ({"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
    ],
    ids=str,
)
def test_damaged_gemma_configs(gemma: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    """So is one that has sliding layers but no window, or half of the rope parameters."""
    with pytest.raises(ModelError) as caught:
        parse_config(
            {key: value for key, value in (read_json(gemma / CONFIG, ModelError) | changes).items() if value is not ...}
        )
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "changes", [{"num_experts_per_tok": 5}, {"num_experts_per_tok": 0}, {"num_local_experts": "4"}], ids=str
)
def test_damaged_mixture_configs(mixture: Path, changes: dict[str, Any]) -> None:
    """So is one whose tokens are to see more experts than there are."""
    with pytest.raises(ModelError, match=CONFIG):
        parse_config(read_json(mixture / CONFIG, ModelError) | changes)


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff\xfe\x00", b"[" * 100_000])
def test_files_that_are_not_json(copy: Path, name: str, content: bytes) -> None:
    """A JSON file that is none, or no object, is a ModelError that names the file."""
    (copy / name).write_bytes(content)
    assert_refused(copy, ModelError, str(copy / name))


@pytest.mark.parametrize("content", [{"temperature": "hot"}, {"temperature": -1}, {"top_p": 7}, {"top_k": -1}], ids=str)
def test_impossible_sampling_defaults(copy: Path, content: dict[str, Any]) -> None:
    """A recommendation that no request could ask for is a ModelError that names the file and the field."""
    write_json(copy / "generation_config.json", content)
    assert_refused(copy, ModelError, "generation_config.json", *content)


def test_unsupported_dtype(copy: Path) -> None:
    """A checkpoint of a type that we cannot compute in is refused, unless another type is asked for."""
    edit_config(dtype="float64")(copy)
    assert_refused(copy, Unsupported, CONFIG, "float64", "dtype=")
    assert load(copy, dtype="float32").executor.model_info.dtype is DataType.FLOAT32
    edit_config(dtype="int8")(copy)
    assert_refused(copy, Unsupported, CONFIG, "int8", "dtype=")


def test_missing_directories(tmp_path: Path) -> None:
    """A directory that is missing, empty or a file is a ModelError that names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "missing", ModelError, str(tmp_path / "missing"), "no such directory")
    assert_refused(tmp_path / "file", ModelError, str(tmp_path / "file"))
    assert_refused(tmp_path / "empty", ModelError, str(tmp_path / "empty" / CONFIG), "no such file")


def add_tokens(directory: Path) -> None:
    """Let the tokenizer know more tokens than the model."""
    path = directory / TOKENIZER
    content = json.loads(path.read_bytes())
    settings = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": VOCAB_SIZE, "content": "<more>", **settings})
    write_json(path, content)


DAMAGED_TOKENIZERS: list[tuple[Change, tuple[str, ...]]] = [
    (remove(TOKENIZER), (TOKENIZER, "no such file")),
    (write(TOKENIZER, ""), (TOKENIZER,)),
    (write(TOKENIZER, "{"), (TOKENIZER, "not a valid tokenizer")),
    (write(TOKENIZER, "{}"), (TOKENIZER, "not a valid tokenizer")),
    (write(TOKENIZER, b"\xff\x00"), (TOKENIZER, "not a valid tokenizer")),
    (add_tokens, (TOKENIZER, f"{VOCAB_SIZE + 1} tokens", f"{VOCAB_SIZE} rows")),
    (write(TOKENIZER_CONFIG, "{"), (TOKENIZER_CONFIG, "not valid JSON")),
    (write(TOKENIZER_CONFIG, b"\xff\xfe\x00"), (TOKENIZER_CONFIG, "not valid JSON")),
    (write(TOKENIZER_CONFIG, "[" * 100_000), (TOKENIZER_CONFIG,)),
    (write(TOKENIZER_CONFIG, "[]"), (TOKENIZER_CONFIG, "object")),
    (write(TOKENIZER_CONFIG, '{"chat_template": "{% for %}"}'), (TOKENIZER_CONFIG, "chat template")),
    (write("chat_template.jinja", "{{"), ("chat_template.jinja", "chat template")),
    (write("chat_template.jinja", b"\xe9"), ("chat_template.jinja",)),
]


@pytest.mark.parametrize(("change", "words"), DAMAGED_TOKENIZERS)
def test_damaged_tokenizers(copy: Path, change: Change, words: tuple[str, ...]) -> None:
    """A tokenizer that is missing, damaged or too large for the model is a TokenizerError that names the file."""
    change(copy)
    assert_refused(copy, TokenizerError, *(str(copy / words[0]), *words[1:]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_model_len": 513}, ("max_model_len", "513", "512")),
        ({"memory": {"kv_cache_bytes": 100}}, ("memory.kv_cache_bytes", "bytes")),
        ({"max_model_len": 100, "kv_cache": {"num_pages": 1}}, ("max_model_len", "num_pages")),
        ({"kv_cache": {"num_pages": 2**44}}, ("num_pages",)),
    ],
    ids=str,
)
def test_caches_that_do_not_fit(checkpoint: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """A cache that is too small for the length, or too large for the machine, is a ConfigError with the numbers."""
    assert_refused(checkpoint, ConfigError, *words, **fields)
