"""Tables of text in the experiment trackers that the trainer has open.

They are reached through Hugging Face's own callbacks, which open them (wandb, trackio, MLflow,
Comet, TensorBoard). Knows rows of plain values; not what they are about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import integrations

LOG = get_logger(__name__)

#: Plain values by column, the same columns in each row of a table.
Rows = Sequence[dict[str, Any]]


class Tables:
    """Sends tables to all trackers that are open; none is open on any rank but the first.

    Args:
        callbacks: the trainer's, of this moment.
    """

    def __init__(self, callbacks: Callable[[], Sequence[Any]]) -> None:
        self._callbacks = callbacks
        self._refused: set[str] = set()

    def __call__(self, name: str, step: int, rows: Rows) -> None:
        """Log a table. A tracker that refuses it is named in a warning, once: no training ends
        for that.

        Args:
            name: of the table, the same each time.
            step: it is of, from 1.
            rows: of the table; without any nothing is logged.
        """
        if not rows:
            return
        for callback in self._callbacks():
            for kind, log in _LOGS.items():
                if not isinstance(callback, kind):
                    continue
                try:
                    log(callback, name, step, rows)
                except Exception as error:
                    self._refuse(kind.__name__.removesuffix("Callback"), name, error)

    def _refuse(self, tracker: str, name: str, error: Exception) -> None:
        if tracker not in self._refused:
            self._refused.add(tracker)
            LOG.warning(f"{tracker} does not take the table {name}: {error!r}. Training goes on.")


def _columns(rows: Rows) -> dict[str, list[Any]]:
    return {column: [row[column] for row in rows] for column in rows[0]}


def _to_wandb(wandb: Any, name: str, step: int, rows: Rows) -> None:
    """Also trackio's, which has the same calls."""
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    wandb.log({name: table, "train/global_step": step})  # the callback's own axis


def _wandb(callback: Any, name: str, step: int, rows: Rows) -> None:
    if callback._initialized and callback._wandb.run is not None:
        _to_wandb(callback._wandb, name, step, rows)


def _trackio(callback: Any, name: str, step: int, rows: Rows) -> None:
    if callback._initialized:
        _to_wandb(callback._trackio, name, step, rows)


def _mlflow(callback: Any, name: str, step: int, rows: Rows) -> None:
    if callback._initialized and callback._ml_flow.active_run() is not None:
        # Rows are appended to the file where there is one.
        callback._ml_flow.log_table(data=_columns(rows), artifact_file=f"{name}.json")


def _comet(callback: Any, name: str, step: int, rows: Rows) -> None:
    if callback._experiment is not None:
        for row in rows:
            about = {column: str(value) for column, value in row.items()}
            callback._experiment.log_text(_markdown([row]), step=step, metadata=about)


def _tensorboard(callback: Any, name: str, step: int, rows: Rows) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(name, _markdown(rows), step)


def _markdown(rows: Rows) -> str:
    def line(values: Sequence[Any]) -> str:
        cells = (str(v).replace("&", "&amp;").replace("<", "&lt;") for v in values)
        cells = (cell.replace("|", "&#124;").replace("\n", "<br>") for cell in cells)
        return f"| {' | '.join(cells)} |"

    rule = "|" + "---|" * len(rows[0])
    return "\n".join([line(list(rows[0])), rule, *(line(list(row.values())) for row in rows)])


_LOGS: dict[type, Callable[[Any, str, int, Rows], None]] = {
    integrations.WandbCallback: _wandb,
    integrations.TrackioCallback: _trackio,
    integrations.MLflowCallback: _mlflow,
    integrations.CometCallback: _comet,
    integrations.TensorBoardCallback: _tensorboard,
}
