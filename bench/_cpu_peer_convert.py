"""Turns a Qwen3 checkpoint into what llama.cpp and OpenVINO read. It runs in the peers' environment, without any of ours.

    PYTHON bench/_cpu_peer_convert.py llama.cpp|OpenVINO MODEL OUTPUT

writes OUTPUT/bf16 and OUTPUT/int8: GGUF files in BF16 and Q8_0, or directories with OpenVINO's IR as its own exporter writes
it (optimum-cli), with weights in fp16 and in int8 by channel. The GGUF file has no vocabulary, since prompts are token ids.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO"


def write_gguf(model: Path, output: Path) -> None:
    """Raises ValueError where a tensor has no name in GGUF."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_bytes())
    arch = gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[arch])
    _write_sizes(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    tensors = {name: value for shard in sorted(model.glob("*.safetensors")) for name, value in load_file(shard).items()}
    for name, value in tensors.items():
        if (known := names.get_name(name, try_suffixes=(".weight",))) is None:
            raise ValueError(f"{name} has no name in GGUF")
        if value.dim() == 1:  # norms: llama.cpp multiplies by float32 alone
            writer.add_tensor(known, value.float().numpy())
        else:
            data = value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(known, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: dict[str, Any]) -> None:
    theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def convert_llama_cpp(model: Path, output: Path) -> None:
    """Raises RuntimeError where llama.cpp does not quantize."""
    from llama_cpp import llama_cpp

    write_gguf(model, output / "bf16")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    if llama_cpp.llama_model_quantize(bytes(output / "bf16"), bytes(output / "int8"), settings):
        raise RuntimeError("llama_model_quantize failed")


def convert_openvino(model: Path, output: Path) -> None:
    """Raises CalledProcessError where optimum-cli fails."""
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    task = ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
    for width, weights in (("bf16", "fp16"), ("int8", "int8")):
        options = ["--model", str(model), "--weight-format", weights, *task, str(output / width)]
        subprocess.run([cli, "export", "openvino", *options], check=True)


if __name__ == "__main__":
    engine, model, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    output.mkdir(parents=True)
    {LLAMA_CPP: convert_llama_cpp, OPENVINO: convert_openvino}[engine](model, output)
