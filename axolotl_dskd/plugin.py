"""The plugin: Axolotl's hooks and nothing else.

Imports little on purpose: Axolotl 0.19 only logs a plugin's ImportError and then trains plain SFT.
What can fail is imported inside the hooks, whose errors stop the run.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from axolotl_dskd.config import DSKDConfig


class DSKDPlugin(BasePlugin):
    """Dual-space knowledge distillation; inert in runs without a `dskd:` block."""

    def register(self, cfg: Any) -> None:
        """Make Axolotl's data pipeline prepare both sides of every row."""
        if cfg.get("dskd"):
            from axolotl_dskd.data.hooks import install_hooks

            install_hooks()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Refuse an objective that does not work for the pair of tokenizers, before rows are
        prepared or any weight is loaded. Loads no data: Axolotl goes on to do that."""
        config = DSKDConfig.of(cfg)
        if config is not None and config.uses_teacher:
            from axolotl.loaders import load_tokenizer

            from axolotl_dskd.objectives import check_pair

            check_pair(config, load_tokenizer(cfg))

    def get_input_args(self) -> str:
        """The schema of the `dskd:` block."""
        return "axolotl_dskd.config.DSKDArgs"

    def get_trainer_cls(self, cfg: Any) -> Any:
        """The distilling trainer; with `kd_ratio: 0` it fine-tunes on the same rows."""
        config = DSKDConfig.of(cfg)
        if config is None:
            return None
        from axolotl_dskd.training.trainer import DSKDTrainer

        return DSKDTrainer.for_config(config)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Let `metric_for_best_model` pick what is better."""
        if DSKDConfig.of(cfg) is not None:
            from axolotl_dskd.training.recorder import best_by_name

            best_by_name(trainer.args, cfg.greater_is_better)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Let Axolotl's lm_eval plugin, which runs after training, find an adapter: it names the
        folder of the training for whole weights, which are not there."""
        if DSKDConfig.of(cfg) is None or not (cfg.adapter and cfg.lm_eval_tasks):
            return
        if not cfg.lm_eval_model:  # handed on to lm-eval as it is
            folder = cfg.output_dir
            cfg.lm_eval_model = f"{cfg.base_model},peft={folder},tokenizer={folder}"
