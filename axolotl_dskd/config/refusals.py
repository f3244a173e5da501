"""What of Axolotl does not combine with distillation, and `dskd:` keys that have moved."""

from __future__ import annotations

from typing import Any

# Axolotl's key -> (when it is in the way, what to do instead). A value of None means "any truthy".
_REFUSED: dict[str, str] = {
    "rl": "preference and RL training have no supervised text to distil on; remove `rl:`",
    "reward_model": "a reward model gives no next-token distribution; remove `reward_model:`",
    "process_reward_model": "a reward model gives no next-token distribution; remove it",
    "orpo_alpha": "ORPO has a loss of its own; remove `orpo_alpha:`",
    "kd_trainer": "it is Axolotl's built-in distillation; keep one of the two",
    "trainer_cls": "distillation needs its own trainer; remove `trainer_cls:`",
    "use_eaft": "it replaces the loss, as dskd does; remove `use_eaft:`",
    "use_dft": "it replaces the loss, as dskd does; remove `use_dft:`",
    "label_smoothing_factor": "it replaces the loss, as dskd does; remove it",
    "streaming": "both sides of a row are prepared ahead; remove `streaming:`",
    "pretraining_dataset": "streamed pretraining data is not supported; list it under `datasets:` "
    "with `type: completion`",
    "skip_prepare_dataset": "both sides of a row must be prepared; remove it",
    "processor_type": "multimodal data is not supported; remove `processor_type:`",
    "batch_flattening": "use `sample_packing: true` instead",
    "relora": "it resets the optimizer that the projectors follow; use plain LoRA",
    "fsdp": "FSDP1 is not supported; remove `fsdp:` and write `fsdp_config:` with "
    "`fsdp_version: 2`",
    "ray_num_workers": "launching through ray is not supported; use the default launcher",
}
#: What cannot be combined with an output head that is changed as training ends, and why.
_NOT_MERGED = {
    "deepspeed": "DeepSpeed keeps copies of the head of its own",
    "load_best_model_at_end": "checkpoints hold the head without the attention",
    "early_stopping_patience": "it picks a checkpoint, which holds the head without the attention",
}
#: How metrics end that evaluations measure of the student's answers.
_OF_ANSWERS = ("dskd/rouge_l", "dskd/rouge_l_sampled")
_OTHER_TRAINERS = ("axolotl.integrations.kd.", "axolotl.integrations.diffusion.")
_PARALLEL = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")


def refusals(data: dict[str, Any]) -> list[str]:
    """What of a raw configuration does not combine, each with what to do, in words."""
    found = [f"`{key}`: {why}" for key, why in _REFUSED.items() if data.get(key)]
    fsdp = data.get("fsdp_config") or {}
    if fsdp and str(data.get("fsdp_version") or fsdp.get("fsdp_version")) != "2":
        found.append("`fsdp_config` without `fsdp_version: 2`: FSDP1 is not supported; add it")
    found += [
        f"`{key}: {data[key]}`: parallelism inside a model is not supported; set it to 1"
        for key in _PARALLEL
        if str(data.get(key) or 1) != "1"  # a raw value may be text
    ]
    block = data.get("dskd")
    objective = block.get("objective") if isinstance(block, dict) else None
    projector = objective.get("projector") if isinstance(objective, dict) else None
    if data.get("deepspeed") and isinstance(projector, dict) and projector.get("warmup_steps"):
        found.append(
            "`deepspeed` with `dskd.objective.projector.warmup_steps`: DeepSpeed updates the "
            "student within its backward, so it cannot wait for the projectors; remove warmup_steps"
        )
    found += _metric_that_is_missing(data.get("metric_for_best_model"), block)
    attention = block.get("virtual_attention") if isinstance(block, dict) else None
    if isinstance(attention, dict) and attention.get("leave") == "merge":
        found += [
            f"`{key}` with `dskd.virtual_attention.leave: merge`: {why}; write `leave: anneal`"
            for key, why in _NOT_MERGED.items()
            if data.get(key)
        ]
    accelerate = data.get("accelerator_config")
    if isinstance(accelerate, dict) and accelerate.get("dispatch_batches"):
        found.append(
            "`accelerator_config` with `dispatch_batches: true`: rank 0 would cut each batch by "
            "rows, and tensors of supervised tokens have none; remove dispatch_batches"
        )
    if data.get("balance_labels") and not data.get("sample_packing"):
        found.append("`balance_labels` without `sample_packing`: set one, or remove the other")
    found += [
        f"plugin `{plugin}`: it brings a trainer of its own; remove it"
        for plugin in data.get("plugins") or []
        if str(plugin).startswith(_OTHER_TRAINERS)
    ]
    return found


def _metric_that_is_missing(metric: Any, block: Any) -> list[str]:
    """A checkpoint is picked by what not every evaluation measures: transformers wants it of each,
    and raises KeyError at the first without."""
    evaluation = (block.get("evaluation") if isinstance(block, dict) else None) or {}
    if not str(metric).endswith(_OF_ANSWERS) or not isinstance(evaluation, dict):
        return []
    if not evaluation.get("answers"):
        return [
            f"`metric_for_best_model: {metric}` without `dskd.evaluation.answers`: it is measured "
            "of answers; set how many, such as 32"
        ]
    if (every := evaluation.get("answers_every") or 1) != 1:
        return [
            f"`metric_for_best_model: {metric}` with `dskd.evaluation.answers_every: {every}`: "
            "every evaluation must measure it; set answers_every: 1, or choose another metric, "
            "such as eval_dskd/bits_per_byte"
        ]
    return []


#: Keys of `dskd:` that belong to the objective.
_OBJECTIVE_KEYS = (
    "alignment",
    "causal",
    "agreement_mask",
    "divergence",
    "temperature",
    "student_space_weight",
    "teacher_space_weight",
    "skew_lambda",
    "adaptive_alpha",
    "js_beta",
    "projector",
)


def refuse_moved_keys(block: dict[str, Any]) -> None:
    """Say where keys of the block have gone.

    Raises:
        ValueError: with the lines to write instead.
    """
    moved = [key for key in _OBJECTIVE_KEYS if key in block]
    if not moved:
        return
    objective = block.get("objective", "dual_space")
    name = objective.get("name") if isinstance(objective, dict) else objective
    lines = "".join(f"    {key}: {block[key]}\n" for key in moved)
    raise ValueError(
        f"dskd.{', dskd.'.join(moved)}: these keys belong to the objective now. Write\n"
        f"dskd:\n  objective:\n    name: {name}\n{lines}"
    )
