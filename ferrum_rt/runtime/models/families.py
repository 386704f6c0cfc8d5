"""What a checkpoint's config.json says, as data for the one decoder: shapes, switches, and where each weight is found."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.interfaces.types import ModelType
from ferrum_rt.runtime.models.rope import RopeSpec

_Count = Annotated[int, msgspec.Meta(ge=1)]


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What differs between layers: how far back attention sees, which rotary table, experts or one dense network."""

    window: _Count | None
    rope: RopeSpec
    is_moe: bool


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """``top_k`` of ``num_experts`` networks see each token; ``renormalize`` makes their weights sum to 1."""

    num_experts: _Count
    top_k: _Count
    intermediate_size: _Count
    renormalize: bool


class DecoderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the decoder must know of a model. ``norm_offset`` is added to norm weights (Gemma stores w - 1);
    ``has_post_norms`` norms what attention and MLP return, before it joins the residual."""

    type: ModelType
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_heads: _Count
    num_kv_heads: _Count
    head_dim: _Count
    max_positions: _Count
    layers: Annotated[tuple[LayerSpec, ...], msgspec.Meta(min_length=1)]
    norm_eps: float
    norm_offset: float
    activation: str
    has_qk_norm: bool
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_post_norms: bool
    is_tied: bool
    embed_scale: float
    attention_scale: float
    attention_soft_cap: float | None
    final_soft_cap: float | None
    moe: MoeSpec | None


class Part(msgspec.Struct, frozen=True):
    """One weight of the decoder: the checkpoint's tensors ``names`` with their ``shapes``, laid one below the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


_ARCHITECTURES = {
    "LlamaForCausalLM": ModelType.LLAMA,
    "MistralForCausalLM": ModelType.MISTRAL,
    "Qwen2ForCausalLM": ModelType.QWEN2,
    "Qwen3ForCausalLM": ModelType.QWEN3,
    "Phi3ForCausalLM": ModelType.PHI3,
    "Gemma2ForCausalLM": ModelType.GEMMA2,
    "Gemma3ForCausalLM": ModelType.GEMMA3,
    "MixtralForCausalLM": ModelType.MIXTRAL,
    "Qwen3MoeForCausalLM": ModelType.QWEN3_MOE,
}
_GEMMA = (ModelType.GEMMA2, ModelType.GEMMA3)
_MAX_LAYERS = 10_000
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What transformers assumes where config.json is silent.
_DEFAULTS: dict[ModelType, dict[str, Any]] = {
    ModelType.QWEN3: {"head_dim": 128},
    ModelType.GEMMA2: {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    ModelType.GEMMA3: {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def parse_config(config: Mapping[str, Any]) -> DecoderSpec:
    """Read a config.json. Raises ModelError for an architecture or a feature that the decoder does not have."""
    if config.get("quantization_config"):
        raise ModelError("config.json: quantized checkpoints are not supported yet (quantization_config is set)")
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is set, but attention is causal here")
    try:
        kind = _model_type(config)
        spec = _spec(kind, {**_DEFAULTS.get(kind, {}), **config})
        # The constructor of a Struct checks no types.
        spec = msgspec.convert(msgspec.to_builtins(spec), DecoderSpec)
    except KeyError as error:
        raise ModelError(f"config.json: the key {error} is missing") from error
    except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"config.json: a value cannot be used: {error}") from error
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(f"config.json: {spec.num_heads} heads cannot share {spec.num_kv_heads} key-value heads evenly")
    if spec.moe is not None and spec.moe.top_k > spec.moe.num_experts:
        raise ModelError(f"config.json: a token cannot see {spec.moe.top_k} of {spec.moe.num_experts} experts")
    return spec


def _spec(kind: ModelType, config: Mapping[str, Any]) -> DecoderSpec:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden_size // num_heads
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"config.json: the activation {activation!r} is not supported")
    bias = bool(config.get("attention_bias"))
    moe = _moe(kind, config)
    return DecoderSpec(
        type=kind,
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        max_positions=config["max_position_embeddings"],
        layers=tuple(_layers(kind, config, head_dim, has_moe=moe is not None)),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        norm_offset=1.0 if kind in _GEMMA else 0.0,
        activation=_ACTIVATIONS[activation],
        has_qk_norm=kind in (ModelType.QWEN3, ModelType.QWEN3_MOE, ModelType.GEMMA3),
        has_qkv_bias=bias or kind is ModelType.QWEN2,
        has_o_bias=bias,
        has_mlp_bias=bool(config.get("mlp_bias")),
        has_post_norms=kind in _GEMMA,
        is_tied=bool(config.get("tie_word_embeddings")),
        embed_scale=math.sqrt(hidden_size) if kind in _GEMMA else 1.0,
        attention_scale=(config["query_pre_attn_scalar"] if kind in _GEMMA else head_dim) ** -0.5,
        attention_soft_cap=config.get("attn_logit_softcapping"),
        final_soft_cap=config.get("final_logit_softcapping"),
        moe=moe,
    )


def _model_type(config: Mapping[str, Any]) -> ModelType:
    names = config.get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    if not names and config.get("model_type") in set(ModelType):
        return ModelType(config["model_type"])
    known = ", ".join(_ARCHITECTURES)
    raise ModelError(f"config.json: architecture {names or config.get('model_type')!r} is not supported; these are: {known}")


def _moe(kind: ModelType, config: Mapping[str, Any]) -> MoeSpec | None:
    if kind not in (ModelType.MIXTRAL, ModelType.QWEN3_MOE):
        return None
    is_mixtral = kind is ModelType.MIXTRAL
    return MoeSpec(
        num_experts=config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size" if is_mixtral else "moe_intermediate_size"],
        renormalize=is_mixtral or bool(config.get("norm_topk_prob")),
    )


def _layers(kind: ModelType, config: Mapping[str, Any], head_dim: int, *, has_moe: bool) -> Iterator[LayerSpec]:
    dense = set(config.get("mlp_only_layers") or ())
    every = config.get("decoder_sparse_step") or 1
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers is {config['num_hidden_layers']}, more than {_MAX_LAYERS}")
    types = config.get("layer_types") or [_layer_type(kind, config, i) for i in range(config["num_hidden_layers"])]
    for index in range(config["num_hidden_layers"]):
        if types[index] not in ("full_attention", "sliding_attention"):
            raise ModelError(f"config.json: the layer type {types[index]!r} is not supported")
        is_sliding = types[index] == "sliding_attention"
        if is_sliding and config["sliding_window"] is None:
            raise ModelError("config.json: sliding_window is null, but there are layers of the type 'sliding_attention'")
        yield LayerSpec(
            window=config["sliding_window"] if is_sliding else None,
            rope=_rope(config, types[index], head_dim),
            is_moe=has_moe and index not in dense and (index + 1) % every == 0,
        )


def _layer_type(kind: ModelType, config: Mapping[str, Any], index: int) -> str:
    """Configs written before ``layer_types`` existed leave the pattern to the family."""
    match kind:
        case ModelType.GEMMA2:
            is_sliding = index % 2 == 0
        case ModelType.GEMMA3:
            pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
            is_sliding = (index + 1) % pattern != 0
        case ModelType.QWEN2 | ModelType.QWEN3 | ModelType.QWEN3_MOE:
            is_sliding = bool(config.get("use_sliding_window")) and index >= config.get("max_window_layers", 0)
        case _:
            is_sliding = True
    return "sliding_attention" if is_sliding and config.get("sliding_window") else "full_attention"


def _rope(config: Mapping[str, Any], layer_type: str, head_dim: int) -> RopeSpec:
    """``rope_parameters`` is today's key, possibly one mapping per layer type; ``rope_theta`` with ``rope_scaling`` the
    older form, in which Gemma 3 gives its sliding layers a theta of their own and no scaling."""
    given = config.get("rope_parameters")
    if given:
        scaling = given[layer_type] if any(isinstance(value, dict) for value in given.values()) else given
        theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    elif layer_type == "sliding_attention" and "rope_local_base_freq" in config:
        scaling, theta = {}, config["rope_local_base_freq"]
    else:
        scaling, theta = config.get("rope_scaling") or {}, config.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    # The rest alone, so that old and new configs (and layers that share a table) have equal specs.
    said_elsewhere = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    rest = {key: value for key, value in scaling.items() if key not in said_elsewhere}
    rest.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return RopeSpec(theta=float(theta), rotary_dim=int(head_dim * share), scaling={"rope_type": kind, **rest})


def decoder_parts(spec: DecoderSpec) -> dict[str, Part]:
    """The weights outside the layers."""
    table = (spec.vocab_size, spec.hidden_size)
    return {
        "embed": Part(("model.embed_tokens.weight",), (table,)),
        "norm": Part(("model.norm.weight",), ((spec.hidden_size,),)),
        "lm_head": Part(("model.embed_tokens.weight" if spec.is_tied else "lm_head.weight",), (table,)),
    }


def layer_parts(spec: DecoderSpec, index: int) -> dict[str, Part]:
    """The weights of one layer, by the names that the decoder uses."""
    at = f"model.layers.{index}."
    hidden, q, kv = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    parts = {
        "attn_in_norm": _norm(at + "input_layernorm", hidden),
        "o": Part((at + "self_attn.o_proj.weight",), ((hidden, q),)),
    }
    if spec.type is ModelType.PHI3:
        parts["qkv"] = Part((at + "self_attn.qkv_proj.weight",), ((q + 2 * kv, hidden),))
    else:
        names = tuple(at + f"self_attn.{name}_proj.weight" for name in "qkv")
        parts["qkv"] = Part(names, ((q, hidden), (kv, hidden), (kv, hidden)))
    if spec.has_qkv_bias:
        names = tuple(at + f"self_attn.{name}_proj.bias" for name in "qkv")
        parts["qkv_bias"] = Part(names, ((q,), (kv,), (kv,)))
    if spec.has_o_bias:
        parts["o_bias"] = Part((at + "self_attn.o_proj.bias",), ((hidden,),))
    if spec.has_qk_norm:
        parts["q_norm"] = _norm(at + "self_attn.q_norm", spec.head_dim)
        parts["k_norm"] = _norm(at + "self_attn.k_norm", spec.head_dim)
    if spec.has_post_norms:
        parts["attn_out_norm"] = _norm(at + "post_attention_layernorm", hidden)
        parts["mlp_in_norm"] = _norm(at + "pre_feedforward_layernorm", hidden)
        parts["mlp_out_norm"] = _norm(at + "post_feedforward_layernorm", hidden)
    else:
        parts["mlp_in_norm"] = _norm(at + "post_attention_layernorm", hidden)
    if spec.moe is not None and spec.layers[index].is_moe:
        return parts | _moe_parts(spec, spec.moe, at)
    return parts | _mlp_parts(spec, at)


def kv_scale_names(index: int, which: str) -> tuple[str, ...]:
    """What a layer's scale of keys ("k") or values ("v") in fp8 pages is called by those who calibrate it."""
    return tuple(f"model.layers.{index}.self_attn.{name}{which}_scale" for name in ("", f"{which}_proj.", "attn."))


def _norm(name: str, size: int) -> Part:
    return Part((name + ".weight",), ((size,),))


def _mlp_parts(spec: DecoderSpec, at: str) -> dict[str, Part]:
    wide, hidden = spec.intermediate_size, spec.hidden_size
    parts = {"down": Part((at + "mlp.down_proj.weight",), ((hidden, wide),))}
    if spec.type is ModelType.PHI3:
        parts["gate_up"] = Part((at + "mlp.gate_up_proj.weight",), ((2 * wide, hidden),))
    else:
        names = (at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight")
        parts["gate_up"] = Part(names, ((wide, hidden), (wide, hidden)))
    if spec.has_mlp_bias:
        parts["gate_up_bias"] = Part((at + "mlp.gate_proj.bias", at + "mlp.up_proj.bias"), ((wide,), (wide,)))
        parts["down_bias"] = Part((at + "mlp.down_proj.bias",), ((hidden,),))
    return parts


def _moe_parts(spec: DecoderSpec, moe: MoeSpec, at: str) -> dict[str, Part]:
    is_mixtral = spec.type is ModelType.MIXTRAL
    at += "block_sparse_moe." if is_mixtral else "mlp."
    gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    wide, hidden = moe.intermediate_size, spec.hidden_size
    parts = {"router": Part((at + "gate.weight",), ((moe.num_experts, hidden),))}
    for index in range(moe.num_experts):
        expert = f"{at}experts.{index}."
        names = (f"{expert}{gate}.weight", f"{expert}{up}.weight")
        parts[f"expert_{index}_gate_up"] = Part(names, ((wide, hidden), (wide, hidden)))
        parts[f"expert_{index}_down"] = Part((f"{expert}{down}.weight",), ((hidden, wide),))
    return parts
