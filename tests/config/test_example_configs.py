"""The example configs, as Axolotl's own schema and our block read them. No model is loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from axolotl_dskd.config import PLUGIN_NAME, DSKDConfig

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "example_configs").glob("*.yaml"))
Validate = Callable[[dict[str, Any]], Any]


def teachers(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The keys of its teacher, or of each of several."""
    block = config["dskd"]
    return list(block["teachers"].values()) if "teachers" in block else [block["teacher"]]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    """One example config's file."""
    return request.param


@pytest.fixture
def config(path: Path, tmp_path: Path) -> dict[str, Any]:
    """Its content; teachers that a demo makes first stand in a temporary folder."""
    config = yaml.safe_load(path.read_text())
    for teacher in teachers(config):
        for key in ("base_model", "tokenizer", "adapter"):
            if str(teacher.get(key, "")).startswith("."):
                teacher[key] = str(tmp_path)
    return config


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Validate:
    """Axolotl's validation as on a 24 GB card, without asking this machine or the hub."""
    import torch
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    # Where there is a GPU, Axolotl 0.21 looks for a flash-attn build, on the hub if need be.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_86"}
    environment = {"torch_version": str(torch.__version__).split("+")[0]}

    def run(config: dict[str, Any]) -> Any:
        cfg = DictDefault(copy.deepcopy(config))
        prepare_plugins(cfg)
        return validate_config(cfg, capabilities=gpu, env_capabilities=environment)

    return run


def header(path: Path) -> str:
    """The comments that the file opens with."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Where `kept` lacks or changes what `given` says; a size may be kept as a number of bytes."""
    if isinstance(given, dict):
        return [
            line
            for key, value in given.items()
            for line in (
                lost(value, kept[key], f"{where}.{key}")
                if isinstance(kept, dict) and key in kept
                else [f"{where}.{key} is gone"]
            )
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            line
            for i, (ours, theirs) in enumerate(zip(given, kept, strict=True))
            for line in lost(ours, theirs, f"{where}[{i}]")
        ]
    if isinstance(given, str) and isinstance(kept, int):
        given = TypeAdapter(ByteSize).validate_python(given)
    return [] if given == kept else [f"{where} is {kept!r}, not {given!r}"]


def test_there_are_example_configs():
    assert PATHS


def test_axolotl_accepts_the_config_and_keeps_every_value_of_it(
    config: dict[str, Any], validate: Validate
):
    assert not lost(config, validate(config).to_dict())


def test_every_top_level_key_is_a_field_of_axolotl_or_ours(
    config: dict[str, Any], validate: Validate
):
    from axolotl.integrations.config import merge_input_args

    validate(config)  # registers the plugin, whose field is merged in
    schema, _ = merge_input_args()
    known = set(schema.model_fields) | {f.alias for f in schema.model_fields.values() if f.alias}
    assert not set(config) - known


def test_the_block_parses_and_the_plugin_is_named(config: dict[str, Any]):
    assert config["plugins"] == [PLUGIN_NAME]
    parsed = DSKDConfig.of(config)
    assert parsed is not None
    assert parsed.uses_teacher


@pytest.mark.parametrize("block", ["dskd", "teacher"])
def test_a_misspelt_key_in_the_block_is_refused(
    config: dict[str, Any], validate: Validate, block: str
):
    where = config["dskd"] if block == "dskd" else teachers(config)[0]
    where["temperatur"] = 1.0
    with pytest.raises(ValueError, match="temperatur"):
        validate(config)


def test_without_the_two_blocks_it_is_plain_fine_tuning(config: dict[str, Any], validate: Validate):
    plain = {key: value for key, value in config.items() if key not in ("plugins", "dskd")}
    validated = validate(plain).to_dict()
    assert not lost(plain, validated)
    assert not validated.get("plugins")
    assert not validated.get("dskd")


def test_the_file_opens_with_its_memory_and_its_launch_command(path: Path):
    text = header(path)
    assert "memory" in text.lower()
    assert f"axolotl train {path.relative_to(ROOT)}" in text


def test_the_lines_of_a_memory_table_add_up_to_its_total(path: Path):
    rows = re.findall(r"^#   (\s*\S.*?)  +(\d+\.\d+)$", header(path), flags=re.MULTILINE)
    if not rows:
        pytest.skip("states its memory without a table")
    *parts, (last, total) = rows
    assert last == "total"
    # Each line is rounded to 0.01 GB, the total to 0.1.
    rounding = 0.05 + 0.005 * len(parts)
    assert sum(float(number) for _, number in parts) == pytest.approx(float(total), abs=rounding)
