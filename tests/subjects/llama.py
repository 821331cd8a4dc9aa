"""Hugging Face transformers: a Llama whose own tensor-parallel plan is applied as it is loaded."""

from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import parity


def llama():
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "num_hidden_layers": 2}
    sizes = {"vocab_size": 36, "hidden_size": 24, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**heads, **sizes, use_cache=False))


def llama_tp(full, mesh):
    with TemporaryDirectory() as folder:
        llama().config.save_pretrained(folder)
        save_file(full, f"{folder}/model.safetensors", {"format": "pt"})
        config = DistributedConfig(tp_size=mesh.size())
        return LlamaForCausalLM.from_pretrained(
            folder, distributed_config=config, dtype=torch.get_default_dtype()
        )


@parity.matrix(tp=[1, 2, 4])
def check_llama(case):
    """Hugging Face transformers (5.23): a Llama with its own tensor-parallel plan."""
    case.check(llama, llama_tp, [torch.randint(36, (2, 8))])
