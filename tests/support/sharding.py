"""Axolotl's keys for each way of sharding."""

from __future__ import annotations

from typing import Any

#: Axolotl's keys for FSDP2.
SHARDED: dict[str, Any] = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
}


def zero(stage: int) -> dict[str, Any]:
    """Axolotl's key for DeepSpeed, with a configuration that partitions small parameters, too."""
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    described = {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        **dict.fromkeys(keys, "auto"),
    }
    return {"deepspeed": described}
