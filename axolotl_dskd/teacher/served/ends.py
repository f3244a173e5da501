"""The ends of a causal language model, embedding, final norm and output head, without its layers.

A model of no layers is built by its own class and given what its checkpoint holds outside of
them. So every family's own treatment of embeddings and logits is kept, and of a model in many
files only those are read (or downloaded) that hold an end of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.teacher.load import apart_from_the_student, freeze

#: Layers stand in numbered lists, in every architecture; what lies outside of them does not.
_OF_A_LAYER = re.compile(r"\.\d+\.")


def load_ends(config: TeacherConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen teacher as a model of no layers: its logits are those of its embeddings.

    Raises:
        ValueError: there is no such checkpoint, or it does not hold these parts.
    """
    try:
        described = _without_layers(config)
        tensors = _outer_tensors(config)
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"embedding and head of the teacher {config.base_model!r} cannot be read: {error}\n"
            "dskd.teacher.base_model must name the checkpoint that the server serves."
        ) from error
    with apart_from_the_student():
        with init_empty_weights():
            kind = type(
                AutoModelForCausalLM.from_config(
                    described, trust_remote_code=config.trust_remote_code
                )
            )
        model, info = kind.from_pretrained(
            None, config=described, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    missing = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if missing:
        raise ValueError(
            f"the checkpoint {config.base_model!r} does not hold {', '.join(sorted(missing))} as "
            "plain numbers. Name a checkpoint whose embedding and head are not quantised."
        )
    return freeze(model.to(device))


def local_weights(config: TeacherConfig) -> int | None:
    """Bytes of the whole checkpoint where all of it is on this machine, else None."""
    try:
        files = {_found(config, name, local=True) for name in _shards(config, local=True).values()}
    except OSError:
        return None
    return sum(path.stat().st_size for path in files)


def end_files(config: TeacherConfig) -> list[Path]:
    """The files of a checkpoint that hold an end of the model, and what names them.

    Raises:
        ValueError: there are none.
    """
    try:
        index = _found(config, SAFE_WEIGHTS_INDEX_NAME, optional=True)
        shards = {shard for name, shard in _shards(config).items() if not _OF_A_LAYER.search(name)}
        files = [_found(config, shard) for shard in sorted(shards)]
    except OSError as error:
        raise ValueError(f"the teacher {config.base_model!r} has no weights: {error}") from error
    return files if index is None else [index, *files]


def _without_layers(config: TeacherConfig) -> Any:
    """The teacher's config with no layers; what a server does about quantisation is its own."""
    described = AutoConfig.from_pretrained(
        config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    text = described.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    if hasattr(described, "quantization_config"):
        del described.quantization_config
    return described


def _outer_tensors(config: TeacherConfig) -> dict[str, Tensor]:
    tensors = {}
    shards = _shards(config)
    outer = {name: shard for name, shard in shards.items() if not _OF_A_LAYER.search(name)}
    for shard in sorted(set(outer.values())):
        with safe_open(_found(config, shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if outer.get(name) == shard:
                    tensors[name] = file.get_tensor(name)
    return tensors


def _shards(config: TeacherConfig, *, local: bool = False) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        OSError: there are no safetensors.
    """
    index = _found(config, SAFE_WEIGHTS_INDEX_NAME, optional=True, local=local)
    if index is not None:
        return json.loads(index.read_text())["weight_map"]
    with safe_open(_found(config, SAFE_WEIGHTS_NAME, local=local), framework="pt") as file:
        return dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)


def _found(config: TeacherConfig, name: str, *, optional: bool = False, local: bool = False) -> Any:
    found = cached_file(
        config.base_model,
        name,
        revision=config.revision,
        local_files_only=local,
        _raise_exceptions_for_missing_entries=not optional,
    )
    return None if found is None else Path(found)
