"""The `dskd:` block through Axolotl's own validation: defaults, bounds, refusals and messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from axolotl_dskd.config import (
    CacheConfig,
    DatasetSamplesConfig,
    DSKDConfig,
    DualSpaceConfig,
    ObjectiveConfig,
    ProjectorConfig,
    RouteConfig,
    ServerConfig,
    StudentSamplesConfig,
    StudentWriterConfig,
    TeacherConfig,
    TeacherSamplesConfig,
    VirtualAttentionConfig,
)
from tests.support import tiny

Validated = Callable[[dict[str, Any]], Any]
README = Path(__file__).parents[2] / "README.md"


def test_three_lines_are_a_complete_configuration(pair_folder: Path, validated: Validated):
    config = DSKDConfig.of(validated(tiny.base_config(pair_folder)))
    assert config is not None
    assert config == DSKDConfig(teacher=TeacherConfig(base_model=str(pair_folder / "teacher")))
    objective = config.objective
    assert isinstance(objective, DualSpaceConfig)
    assert (objective.temperature, config.kd_ratio) == (2.0, 0.5)
    assert (objective.divergence, objective.alignment) == ("skewed_reverse_kl", "auto")
    assert config.teacher.trust_remote_code is False


@pytest.mark.parametrize("name", sorted(ObjectiveConfig.known))
def test_a_name_alone_is_an_objective_with_its_defaults(
    name: str, pair_folder: Path, validated: Validated
):
    teacher = {"base_model": str(pair_folder / "teacher")}
    block = {"teacher": teacher, "objective": name, "samples": "dataset"}
    config = DSKDConfig.of(validated(tiny.base_config(pair_folder, dskd=block)))
    assert config is not None
    assert config.objective == ObjectiveConfig.known[name](name=name)


def test_a_run_without_a_block_is_not_ours(pair_folder: Path, validated: Validated):
    cfg = validated(tiny.base_config(pair_folder, dskd=None, plugins=None))
    assert DSKDConfig.of(cfg) is None


BLOCKS: list[type[BaseModel]] = [
    DSKDConfig,
    RouteConfig,
    TeacherConfig,
    CacheConfig,
    ServerConfig,
    ProjectorConfig,
    DatasetSamplesConfig,
    StudentSamplesConfig,
    TeacherSamplesConfig,
    VirtualAttentionConfig,
    StudentWriterConfig,
    *ObjectiveConfig.known.values(),
]


def fields(model: type[BaseModel]) -> dict[str, Any]:
    """The keys that a user may write, without an objective's name."""
    keys = {field.alias or name: field for name, field in model.model_fields.items()}
    return {key: field for key, field in keys.items() if key != "name"}


@pytest.mark.parametrize("model", BLOCKS)
def test_every_field_has_a_description(model: type[BaseModel]):
    assert all(field.description for field in fields(model).values())


@pytest.mark.parametrize("model", BLOCKS)
def test_the_readme_names_every_key_with_its_default(model: type[BaseModel]):
    text = README.read_text()
    for name, field in fields(model).items():
        default = field.default
        if isinstance(default, bool):
            assert f"{name}: {str(default).lower()}" in text, name
        elif isinstance(default, float):
            assert f"{name}: {default}" in text or f"{name}: {default:.1e}" in text.replace(
                "e-3", "e-03"
            ), name
        elif isinstance(default, str):
            assert f"{name}: {default}" in text, name
        else:
            assert f"{name}:" in text, name


SEVERAL = {"teacher": None, "teachers": {"a": {"base_model": "x"}, "b": {"base_model": "y"}}}

WRONG = {
    "unknown key": ({"temprature": 1.0}, "temprature"),
    "unknown teacher key": ({"teacher": {"base_model": "x", "base_modl": "y"}}, "base_modl"),
    "temperature": ({"objective": {"temperature": 0.0}}, "greater than 0"),
    "kd_ratio": ({"kd_ratio": 1.5}, "less than or equal to 1"),
    "divergence": ({"objective": {"divergence": "kl"}}, "forward_kl"),
    "alignment": ({"objective": {"alignment": "greedy"}}, "cma"),
    "chunk_tokens": ({"chunk_tokens": 0}, "greater than or equal to 1"),
    "projector rate": ({"objective": {"projector": {"learning_rate": -1.0}}}, "greater than 0"),
    "js_beta": ({"objective": {"js_beta": 1.0}}, "less than 1"),
    "a policy that is drawn otherwise": (
        {"objective": "policy", "samples": {"from": "student", "temperature": 0.7}},
        "own distribution",
    ),
    "nothing to distil": (
        {"objective": {"student_space_weight": 0.0, "teacher_space_weight": 0.0}},
        "both 0, so kd_ratio",
    ),
    "unknown objective": ({"objective": "dualspace"}, "Did you mean dual_space"),
    "a key of another objective": (
        {"objective": {"name": "uld", "alignment": "cma"}},
        "alignment",
    ),
    "an objective without a name": ({"objective": ["uld"]}, "Write a name"),
    "an objective that is no module": ({"objective": "no.such.module"}, "cannot be imported"),
    "a module without an objective": ({"objective": "json.decoder"}, "defines 0 subclasses"),
    "a key that moved": (
        {"alignment": "cma", "projector": {"init": "random"}},
        r"objective:\n    name: dual_space\n    alignment: cma",
    ),
    "samples": ({"samples": "students"}, "dataset"),
    "virtual attention": ({"virtual_attention": {"block": 4}}, "virtual_attention.block"),
    "virtual attention of no kind": ({"virtual_attention": {"groups": "words"}}, "kmeans"),
    "a key of other samples": ({"samples": {"from": "teacher", "share": 0.5}}, "share"),
    "an engine without an address": (
        {"samples": {"from": "student", "engine": {"vllm": {}}}},
        "vllm.url",
    ),
    "a teacher that is brought up to date": (
        {
            "samples": {
                "from": "teacher",
                "engine": {"vllm": {"url": "http://x", "sync": "weights"}},
            }
        },
        "sync",
    ),
    "a teacher that shall draw where a server writes": (
        {
            "samples": {
                "from": "student",
                "teacher_mix": 0.2,
                "engine": {"vllm": {"url": "http://x"}},
            }
        },
        "engine is a vLLM",
    ),
    "a teacher that shall draw and is elsewhere": (
        {
            "teacher": {"base_model": "x", "server": {"url": "http://a"}},
            "samples": {"from": "student", "teacher_mix": 0.2},
        },
        r"layers of dskd\.teacher are a server's",
    ),
    "a teacher that draws alone": (
        {"samples": {"from": "student", "teacher_mix": 1.0}},
        "less than 1",
    ),
    "a divergence of what nobody writes": (
        {"objective": {"divergence_written": "reverse_kl"}},
        "but all rows are references",
    ),
    "no share": ({"samples": {"from": "student", "share": 0.0}}, "greater than 0"),
    "answers without a teacher": (
        {"samples": "student", "kd_ratio": 0.0},
        "what the student writes is none",
    ),
    "no teacher": ({"teacher": None}, "needs either `teacher.* found neither"),
    "one teacher and several": (
        {"teachers": {"a": {"base_model": "x"}}, "route": {"field": "task"}},
        "either `teacher.* found both",
    ),
    "teachers without a route": (
        {"teacher": None, "teachers": {"a": {"base_model": "x"}}},
        "says which teacher a row asks",
    ),
    "a route without teachers": ({"route": {"field": "task"}}, "belong together"),
    "a route of two kinds": (SEVERAL | {"route": {"field": "t", "datasets": {}}}, "one of both"),
    "a data set without teacher": (
        SEVERAL | {"route": {"datasets": {"other": "a"}}},
        "no teacher for the data set '.*rows.jsonl'",
    ),
    "a name that no metric can have": (
        {"teacher": None, "teachers": {"a/b": {"base_model": "x"}}, "route": {"field": "t"}},
        "should match pattern",
    ),
    "a name that checkpoints have": (
        {
            "teacher": None,
            "teachers": {"virtual_attention": {"base_model": "x"}},
            "route": {"field": "t"},
        },
        "another name",
    ),
    "a key of one of several teachers": (
        {"teacher": None, "teachers": {"a": {"base": "x"}}, "route": {"field": "t"}},
        r"teachers.a.base",
    ),
    "a comparison with what says too little": (
        {
            "teacher": {"base_model": "x", "server": {"url": "http://a", "gives": "logprobs"}},
            "objective": "chunk_likelihood",
            "evaluation": {"teacher": True},
        },
        r"dskd\.teacher\.server gives log-probabilities",
    ),
    "a comparison that is neither": ({"evaluation": {"teacher": "yes"}}, "auto"),
    "two quantisations": (
        {"teacher": {"base_model": "x", "load_in_4bit": True, "load_in_8bit": True}},
        "Set one of them",
    ),
    "a quantised teacher in shards": (
        {"teacher": {"base_model": "x", "load_in_4bit": True, "shard": "full"}},
        "Use shard: none",
    ),
    "a cached teacher in shards": (
        {"teacher": {"base_model": "x", "cache": {"path": "y"}, "shard": "full"}},
        "axolotl-dskd cache write",
    ),
    "a served teacher that is quantised here": (
        {"teacher": {"base_model": "x", "server": {"url": "http://a"}, "load_in_4bit": True}},
        "so load_in_4bit can do nothing here",
    ),
    "a server without an address": ({"teacher": {"base_model": "x", "server": {}}}, "either url"),
    "a server that is no address": (
        {"teacher": {"base_model": "x", "server": {"url": "127.0.0.1:8000"}}},
        "no address of a server",
    ),
    "quantised adapter": (
        {"teacher": {"base_model": "x", "load_in_4bit": True, "adapter": "y"}},
        "merge-lora",
    ),
    "jinja without template": (
        {"teacher": {"base_model": "x", "chat_template": "jinja"}},
        "chat_template_jinja is empty",
    ),
    "template twice": (
        {"teacher": {"base_model": "x", "chat_template": "chatml", "chat_template_jinja": "{}"}},
        "Remove one of them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_block_is_refused_in_words(pair_folder: Path, validated: Validated, case: str):
    block, message = WRONG[case]
    block = {"teacher": {"base_model": str(pair_folder / "teacher")}, **block}
    with pytest.raises(ValueError, match=message):
        validated(tiny.base_config(pair_folder, dskd=block))


REFUSED = {
    "rl": {"rl": "dpo"},
    "reward_model": {"reward_model": True},
    "batch_flattening": {"batch_flattening": True},
    "relora": {"relora": True},
    "streaming": {"streaming": True},
    "skip_prepare_dataset": {"skip_prepare_dataset": True},
    "processor_type": {"processor_type": "AutoProcessor"},
    "warmup_steps": {
        "deepspeed": "zero2.json",
        "dskd": {
            "teacher": {"base_model": "x"},
            "objective": {"projector": {"warmup_steps": 3}},
        },
    },
    "fsdp_config": {"fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "fsdp_version": {"fsdp_version": 1, "fsdp_config": {"offload_params": True}},
    "fsdp": {"fsdp": ["full_shard"]},
    "tensor_parallel_size": {"tensor_parallel_size": 2},
    "tensor_parallel_size: 2`": {"tensor_parallel_size": "2"},
    "context_parallel_size": {"context_parallel_size": 2},
    "trainer_cls": {"trainer_cls": "my.Trainer"},
    "pretraining_dataset": {"pretraining_dataset": "some/text"},
    "answers_every: 2": {
        "metric_for_best_model": "eval_dskd/rouge_l",
        "dskd": {
            "teacher": {"base_model": "x"},
            "evaluation": {"answers": 4, "answers_every": 2},
        },
    },
    "evaluation.answers`": {"metric_for_best_model": "dskd/rouge_l_sampled"},
    "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    "axolotl.integrations.kd.KDPlugin": {
        "plugins": ["axolotl_dskd.DSKDPlugin", "axolotl.integrations.kd.KDPlugin"]
    },
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_combine_is_refused_before_anything_loads(pair_folder: Path, key: str):
    from axolotl_dskd.config import DSKDArgs

    config = tiny.base_config(pair_folder, **REFUSED[key])
    with pytest.raises(ValueError, match=rf"does not combine with `dskd:`:\n- .*{key}"):
        DSKDArgs.model_validate(config)


@pytest.mark.parametrize(
    ("metric", "evaluation"),
    [
        ("eval_dskd/rouge_l", {"answers": 4}),
        ("eval_dskd/bits_per_byte", {"answers": 4, "answers_every": 2}),
    ],
)
def test_a_metric_that_every_evaluation_measures_may_pick_a_checkpoint(
    pair_folder: Path, metric: str, evaluation: dict[str, int]
):
    from axolotl_dskd.config import DSKDArgs

    config = tiny.base_config(pair_folder, metric_for_best_model=metric)
    config["dskd"]["evaluation"] = evaluation
    DSKDArgs.model_validate(config)


def test_every_metric_that_is_made_of_answers_is_known_to_the_refusals():
    from axolotl_dskd.config.refusals import _OF_ANSWERS
    from axolotl_dskd.evaluation.answers import Answered, means

    assert means([Answered("", "", "", "", 0.5, 0.5)]).keys() == set(_OF_ANSWERS)


def test_other_ways_of_accelerates_are_not_refused(pair_folder: Path, validated: Validated):
    keys = {"dispatch_batches": False, "split_batches": True}
    assert validated(tiny.base_config(pair_folder, accelerator_config=keys)).dskd


def test_the_refusals_reach_users_through_axolotl(pair_folder: Path, validated: Validated):
    with pytest.raises(ValueError, match=r"batch_flattening.*sample_packing: true"):
        validated(tiny.base_config(pair_folder, batch_flattening=True))


@pytest.mark.parametrize("key", ["dskdd", "dsdk", "dkd"])
def test_a_misspelt_block_does_not_train_without_a_teacher(
    pair_folder: Path, validated: Validated, key: str
):
    config = tiny.base_config(pair_folder)
    config[key] = config.pop("dskd")
    with pytest.raises(ValueError, match=rf"no `dskd:` block\. Did you mean it by `{key}:`"):
        validated(config)


@pytest.mark.parametrize("block", [True, "Qwen/Qwen2.5-7B-Instruct", ["teacher"]])
def test_what_is_no_block_is_refused_in_words(pair_folder: Path, validated: Validated, block: Any):
    with pytest.raises(ValueError, match=re.escape(f"`dskd:` is {block!r}, not a block")):
        validated(tiny.base_config(pair_folder, dskd=block))


def test_a_key_of_the_block_at_top_level_is_refused(pair_folder: Path, validated: Validated):
    with pytest.raises(ValueError, match=r"unknown key 'dskd_temperature'.*under `dskd:`"):
        validated(tiny.base_config(pair_folder, dskd_temperature=1.0))


def test_inference_and_merging_need_no_teacher(pair_folder: Path, validated: Validated):
    import shutil

    shutil.rmtree(pair_folder / "teacher")
    for elsewhere in ({"merge_lora": True}, {"inference": True}, {}):
        cfg = validated(tiny.base_config(pair_folder, **elsewhere))
        assert DSKDConfig.of(cfg) is not None


@pytest.mark.parametrize("key", ["base_model", "tokenizer", "adapter"])
def test_a_path_that_is_not_there_is_named_before_weights_load(pair_folder: Path, key: str):
    from axolotl_dskd.data.tokenizers import load_teacher_tokenizer

    paths = {"base_model": str(pair_folder / "teacher"), key: "./no/such/folder"}
    config = DSKDConfig(teacher=TeacherConfig(**paths))
    with pytest.raises(ValueError, match=rf"dskd\.teacher\.{key}: there is no \./no/such/folder"):
        load_teacher_tokenizer(config)


def test_the_home_folder_is_expanded():
    assert TeacherConfig(base_model="~/teacher").base_model == str(Path("~/teacher").expanduser())


@pytest.mark.parametrize(
    ("written", "size"),
    [("50GB", 50 * 10**9), ("200GiB", 200 << 30), ("1.5 tb", 15 * 10**11), (4096, 4096)],
)
def test_the_caches_size_is_read_as_people_write_it(written: str | int, size: int):
    assert CacheConfig.model_validate({"path": "x", "max_size": written}).max_size == size


@pytest.mark.parametrize(
    "written", ["many", "GB", "-5GB", "5 GB more", "5GB more", "5 bananas", 0, True]
)
def test_a_size_that_is_none_is_refused(written: str | int):
    with pytest.raises(ValueError, match=r"max_size: .* is no size"):
        CacheConfig.model_validate({"path": "x", "max_size": written})


def test_a_password_in_a_url_is_refused():
    server = {"urls": ["http://a:8000/v1/", "https://me:sesame@b"]}
    for mistaken in (server, {"url": server["urls"]}, {"urls": server["urls"][1]}):
        with pytest.raises(ValueError) as raised:
            TeacherConfig.model_validate({"base_model": "x", "server": mistaken})
        assert "sesame" not in str(raised.value)  # pydantic repeats what it was given
        assert ("put a key into an environment variable" in str(raised.value)) == (
            mistaken is server
        )
    server["urls"].pop()
    config = TeacherConfig.model_validate({"base_model": "x", "server": server})
    assert config.server is not None
    assert config.server.addresses == ["http://a:8000"]


def test_a_port_that_is_none_is_no_address():
    with pytest.raises(ValueError, match="is no address of a server"):
        ServerConfig(url="http://a:99999")


def test_a_key_comes_without_its_line_break_and_is_never_repeated(monkeypatch: pytest.MonkeyPatch):
    config = ServerConfig(url="http://a", api_key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "sesame\n")
    assert config.api_key == "sesame"
    monkeypatch.setenv("SOME_KEY", "ses\name")
    with pytest.raises(ValueError, match="SOME_KEY holds characters") as raised:
        _ = config.api_key
    assert "ses" not in str(raised.value)


def test_a_key_that_is_not_in_the_environment_is_said():
    config = ServerConfig(url="http://a", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="NO_SUCH_KEY, which is not set"):
        _ = config.api_key


def test_max_memory_without_a_device_map_is_refused():
    with pytest.raises(ValueError, match="does nothing without a device_map"):
        TeacherConfig.model_validate({"base_model": "x", "max_memory": {0: "10GiB"}})


def test_two_objectives_of_one_name_are_refused():
    with pytest.raises(TypeError, match=r"config\.objectives\.chunks has one of that name"):
        type(
            "Gold",
            (ObjectiveConfig,),
            {"__module__": "elsewhere", "__annotations__": {"name": str}, "name": "gold"},
        )
    assert ObjectiveConfig.known["gold"].__module__ == "axolotl_dskd.config.objectives.chunks"


def test_a_module_without_a_dot_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lonely_objective.py").write_text(
        "from axolotl_dskd.config import ObjectiveConfig\n"
        "class Lonely(ObjectiveConfig):\n"
        "    name: str = 'lonely'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    block = {"teacher": {"base_model": "x"}, "objective": "lonely_objective"}
    assert DSKDConfig.model_validate(block).objective.name == "lonely_objective"
    del ObjectiveConfig.known["lonely"]


def test_names_in_a_route_that_no_data_set_has_are_refused(pair_folder: Path, validated: Validated):
    rows = str(pair_folder / "rows.jsonl")
    block = SEVERAL | {"route": {"datasets": {rows: "a", "rows.json": "b"}}}
    with pytest.raises(ValueError, match=r"names rows\.json, which is neither the path nor"):
        validated(tiny.base_config(pair_folder, dskd=block))


def test_several_teachers_are_as_many_configurations_of_one():
    block = SEVERAL | {"route": {"field": "task"}, "kd_ratio": 0.3}
    config = DSKDConfig.model_validate(block)
    each = config.each()
    assert list(each) == ["a", "b"]
    assert each["b"] == DSKDConfig.model_validate({"teacher": {"base_model": "y"}, "kd_ratio": 0.3})
    assert DSKDConfig.model_validate(config.model_dump()) == config
    assert config.choose("b") == (1, "b", each["b"])
    with pytest.raises(ValueError, match=r"asks c, but dskd\.teachers has a, b"):
        DSKDConfig.model_validate(SEVERAL | {"route": {"datasets": {"rows.jsonl": "c"}}})
    for name in (None, "c"):
        with pytest.raises(ValueError, match="--teacher a or --teacher b"):
            config.choose(name)


def test_a_subset_goes_by_its_name_before_its_path():
    route = RouteConfig(datasets={"hub/mix": "a", "code": "b"})
    assert route.of_dataset({"path": "hub/mix", "name": None}) == "a"
    assert route.of_dataset({"path": "hub/mix", "name": "code"}) == "b"
    route.check_datasets([{"path": "hub/mix", "name": ["code", "prose"]}])
