"""An objective that does not work for two tokenizers is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.ranks import launch


@pytest.mark.parametrize("command", ["preprocess", "train"])
@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("token_kd", "token_kd compares distributions over one vocabulary"),
        ({"name": "dual_space", "alignment": "positions"}, "needs identical vocabularies"),
    ],
    ids=["token_kd", "positions"],
)
def test_a_pair_is_refused_before_rows_are_prepared_or_weights_loaded(
    pair_folder: Path, command: str, objective: object, said: str
):
    for weights in pair_folder.glob("*/model.safetensors"):
        weights.unlink()
    block = {"teacher": {"base_model": str(pair_folder / "teacher")}, "objective": objective}
    path = pair_folder / "config.yml"
    path.write_text(yaml.safe_dump(tiny.base_config(pair_folder, dskd=block)))
    ((result,),) = launch(1, [{"do": "command", "name": command, "config": str(path)}])
    assert said in result["error"]
    assert not (pair_folder / "prepared").exists()
