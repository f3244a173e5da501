"""`axolotl-dskd serve`: the command that a real vLLM is started with in other tests."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from axolotl_dskd.commands.cli import main
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.tokenizers import teacher_position_limit
from axolotl_dskd.training.opening import training_run
from axolotl_dskd.types import Needs
from tests.support import tiny, two_teachers


def serve(
    folder: Path, server: dict[str, Any] | None, *arguments: str, dtype: str = "float32"
) -> Result:
    teacher: dict[str, Any] = {"base_model": str(folder / "teacher"), "dtype": dtype}
    if server is not None:
        teacher["server"] = server
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.base_config(folder, dskd={"teacher": teacher})))
    return CliRunner().invoke(main, ["serve", str(path), *arguments])


def test_it_prints_a_command_for_every_server(
    pair_folder: Path, monkeypatch: pytest.MonkeyPatch, validated: Any
):
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    server = {"urls": ["http://a:8001", "http://b:8002"], "api_key_env": "TEACHER_KEY"}
    result = serve(pair_folder, server, "--python", "there/python", "--", "--enforce-eager")
    assert result.exit_code == 0, result.output
    assert "sesame" not in result.output
    first, second = (shlex.split(line) for line in result.stdout.splitlines())
    assert first[:2] == ["VLLM_API_KEY=$TEACHER_KEY", "there/python"]
    assert first[-5:] == ["--host", "a", "--port", "8001", "--enforce-eager"]
    assert second[-5:] == ["--host", "b", "--port", "8002", "--enforce-eager"]
    assert int(first[first.index("--max-model-len") + 1]) % 64 == 0
    refused = serve(pair_folder, server, "--run")
    assert "http://a:8001 is not this machine" in refused.output


def test_a_server_of_log_probabilities_is_one_that_writes(pair_folder: Path, validated: Any):
    server = {"url": "http://a:8001", "gives": "logprobs", "top_k": 40}
    (command,) = serve(pair_folder, server).stdout.splitlines()
    assert "--max-logprobs 40" in command
    assert "pooling" not in command


@pytest.mark.skipif(torch.cuda.is_available(), reason="then servers here have a GPU, too")
def test_a_server_elsewhere_runs_in_the_dtype_of_a_gpu(pair_folder: Path, validated: Any):
    """The command may be printed on a machine without one."""
    server = {"urls": ["http://a", "http://127.0.0.1:1"]}
    there, here = serve(pair_folder, server, dtype="auto").stdout.splitlines()
    assert "--dtype bfloat16" in there
    assert "--dtype float32" in here


def test_a_program_that_is_not_there_is_named(pair_folder: Path, validated: Any):
    server = {"url": "http://127.0.0.1:1"}
    result = serve(pair_folder, server, "--run", "--python", "nopython")
    assert result.exit_code == 1
    assert "no program 'nopython'. Name the python" in result.output


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_there_is_room_for_answers_that_are_yet_to_be_written(
    pair_folder: Path, validated: Any, source: str
):
    """They may be longer than the data's own, and training finds that out before it begins."""
    teacher = {"base_model": str(pair_folder / "teacher"), "server": {"url": "http://a"}}
    writer = {"vllm": {"url": "http://b"}}
    block = {"teacher": teacher, "samples": {"from": source, "engine": writer}}
    path = pair_folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.base_config(pair_folder, dskd=block)))
    result = CliRunner().invoke(main, ["serve", str(path)])
    command = shlex.split(result.stdout.splitlines()[-1])
    room = int(command[command.index("--max-model-len") + 1])
    config = DSKDConfig.model_validate(block)
    assert room == teacher_position_limit(config)
    process = SimpleNamespace(device=None, local_main_process_first=None)
    trainer = SimpleNamespace(
        accelerator=process,
        student=SimpleNamespace(is_sharded=False),
        args=SimpleNamespace(process_index=0),
    )
    run = training_run(trainer, 0, config, Needs())
    assert (run.longest_written, run.writes) == (room, source == "student")
    assert training_run(trainer, 0, config, Needs(), evaluated=[]).longest_written == 0


def test_https_asks_who_encrypts(pair_folder: Path, validated: Any):
    """vLLM would speak plain HTTP on that port."""
    refused = serve(pair_folder, {"url": "https://a"})
    assert refused.exit_code == 1
    assert "--ssl-certfile FILE --ssl-keyfile FILE" in refused.output
    encrypted = serve(pair_folder, {"url": "https://a"}, "--", "--ssl-certfile", "x")
    assert "--host a --port 443 --ssl-certfile x" in encrypted.stdout
    behind = serve(pair_folder, {"url": "https://a"}, "--", "--host", "127.0.0.1", "--port", "8000")
    assert behind.stdout.strip().endswith("--host 127.0.0.1 --port 8000")


def test_run_becomes_the_server_with_its_key(
    pair_folder: Path, monkeypatch: pytest.MonkeyPatch, validated: Any
):
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    became: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: became.extend(arguments))
    server = {"url": "http://127.0.0.1:8001", "api_key_env": "TEACHER_KEY"}
    result = serve(pair_folder, server, "--run")
    assert result.exit_code == 0, result.output
    program, command, environment = became
    assert (program, command[0]) == ("python", "python")
    assert shlex.join(command) in result.stdout
    assert environment["VLLM_API_KEY"] == "sesame"


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_server_that_writes_has_the_model_of_the_configuration(
    pair_folder: Path, validated: Any, source: str
):
    """Not another revision, nor the model without its tokenizer or adapter."""
    folder, engine = str(pair_folder / source), {"vllm": {"url": "http://c"}}
    ours = {"revision": "v2", "tokenizer": folder, "trust_remote_code": True}
    teacher = {"base_model": str(pair_folder / "teacher")} | (ours if source == "teacher" else {})
    theirs: dict[str, Any] = {
        "revision_of_model": "v2",
        "tokenizer_config": str(pair_folder / "tokenizer"),
        "trust_remote_code": True,
    }
    shutil.copytree(folder, pair_folder / "tokenizer")
    block = {"teacher": teacher, "samples": {"from": source, "engine": engine}}
    config = tiny.base_config(pair_folder, dskd=block, **(theirs if source == "student" else {}))
    path = pair_folder / "writes.yaml"
    path.write_text(yaml.safe_dump(config))
    command = CliRunner().invoke(main, ["serve", str(path)]).stdout
    where = ours["tokenizer"] if source == "teacher" else theirs["tokenizer_config"]
    assert f"--revision v2 --tokenizer {where} " in command
    assert "--trust-remote-code" in command
    block["teacher"] = {**teacher, "adapter": "me/mine"}
    path.write_text(yaml.safe_dump(config))
    adapted = CliRunner().invoke(main, ["serve", str(path)])
    assert ("would write without dskd.teacher.adapter" in adapted.output) == (source == "teacher")
    engine["vllm"]["model"] = "mine"
    path.write_text(yaml.safe_dump(config))
    assert "--served-model-name mine" in CliRunner().invoke(main, ["serve", str(path)]).stdout


def test_it_prints_the_command_of_the_server_that_writes(pair_folder: Path, validated: Any):
    engine = {"vllm": {"url": "http://c:8003", "model": "student"}}
    path = pair_folder / "writes.yaml"
    lora = {"adapter": "lora", "lora_r": 12, "lora_alpha": 8, "lora_target_linear": True}
    for samples, adapter, flags, variables in (
        ("student", {}, ["--port", "8003"], ["VLLM_SERVER_DEV_MODE=1"]),
        (
            "student",
            lora,
            ["--enable-lora", "--max-lora-rank", "16"],
            ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"],
        ),
        ("teacher", {}, ["--port", "8003"], []),
    ):
        block = {
            "teacher": {"base_model": str(pair_folder / "teacher")},
            "samples": {"from": samples, "engine": engine},
        }
        path.write_text(yaml.safe_dump(tiny.base_config(pair_folder, dskd=block, **adapter)))
        result = CliRunner().invoke(main, ["serve", str(path), "--python", "there/python"])
        assert result.exit_code == 0, result.output
        words = shlex.split(result.stdout)
        assert words[: len(variables) + 1] == [*variables, "there/python"]
        assert words[words.index("--model") + 1] == str(pair_folder / samples)
        assert words[-len(flags) :] == flags


def test_without_a_server_it_says_what_to_add(pair_folder: Path, validated: Any):
    result = serve(pair_folder, None)
    assert result.exit_code == 1
    assert "server: {url: http://127.0.0.1:8000}" in result.output


def test_of_several_teachers_one_is_named(pair_folder: Path, validated: Any):
    two_teachers.save(pair_folder)
    block = two_teachers.block(pair_folder)
    block["teachers"]["chat"]["server"] = {"url": "http://a:8001"}
    path = pair_folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.base_config(pair_folder, dskd=block)))
    result = CliRunner().invoke(main, ["serve", str(path), "--teacher", "chat"])
    assert result.exit_code == 0, result.output
    assert str(pair_folder / "second") in shlex.split(result.stdout)
    for arguments, said in (
        ([], "say --teacher"),
        (["--teacher", "math"], "server"),
    ):
        refused = CliRunner().invoke(main, ["serve", str(path), *arguments])
        assert refused.exit_code == 1
        assert said in refused.output
