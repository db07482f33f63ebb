"""Every YAML file can be composed, begins with its command, and contains valid arguments."""

import inspect
import re
import shlex

import lightning as L
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from recipes.arguments import with_config_names
from recipes.bind import check_arguments
from recipes.build import _SHORTHANDS, SECTIONS, build_callbacks
from recipes.launch import config_dir, config_groups
from recipes.seq2seq.attention import ATTENTION_KINDS
from recipes.seq2seq.data import Seq2SeqData
from recipes.seq2seq.decode import Decoding
from recipes.seq2seq.model import Seq2SeqTransformer
from recipes.seq2seq.schedules import check_schedule
from recipes.seq2seq.task import Seq2SeqTask

FILES = sorted(config_dir().rglob("*.yaml"))
COMMANDS = ("train", "evaluate", "predict", "inspect", "calibrate", "compare")
OPTIONS = [
    f"{group}={file.stem}" for group in config_groups() for file in sorted((config_dir() / group).glob("*.yaml"))
]


def composed(command: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(command, list(overrides))


def name(file) -> str:
    return str(file.relative_to(config_dir()))


def test_config_files_are_found():
    assert {name(file) for file in FILES} >= {f"{command}.yaml" for command in COMMANDS}
    assert set(config_groups()) == {
        "callbacks",
        "data",
        "decoding",
        "experiment",
        "logger",
        "model",
        "paths",
        "schedule",
        "trainer",
    }


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_file_begins_with_the_command_that_launches_it(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    command = re.fullmatch(r"# sparse-attn (\w+)(.*)", first)
    assert command, first
    optional = re.sub(r"\[.*?\]", "", command[2])
    # Arguments without a key, such as the folder of compare, are left out: Hydra cannot read them.
    given = [argument for argument in shlex.split(optional) if "=" in argument]
    overrides = [argument for argument in given if not argument.startswith("hydra.run.dir=")]
    assert composed(command[1], *with_config_names(command[1], overrides))
    group = file.parent.name
    if group in config_groups() and group not in ("paths", "trainer"):
        assert f"{group}={file.stem}" in first


@pytest.mark.parametrize("command", COMMANDS)
def test_self_comes_first_so_that_groups_and_experiments_override_it(command):
    assert OmegaConf.load(config_dir() / f"{command}.yaml").defaults[0] == "_self_"


@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_every_key_is_an_argument_of_its_function(option):
    cfg = composed("train", *([option] if option else []))
    assert set(cfg) == set(SECTIONS)
    for key in ("path", "language"):
        if key in cfg.data.keys():  # noqa: SIM118 - "in cfg" is false for a key without a value
            cfg.data[key] = "x"
    cfg.paths.output_dir = "x"  # Hydra sets this key only in a run
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for section, function in {"data": Seq2SeqData, "model": Seq2SeqTransformer}.items():
        check_arguments(
            function, section, {k: v for k, v in settings[section].items() if k not in _SHORTHANDS[section]}
        )
    check_arguments(Decoding, "decoding", settings["decoding"])
    for section in ("optimizer", "loss"):
        check_arguments(Seq2SeqTask, section, settings[section])
    check_arguments(check_schedule, "schedule", settings["schedule"])
    check_schedule(**settings["schedule"])
    check_arguments(L.Trainer, "trainer", settings["trainer"])
    build_callbacks(settings["callbacks"])
    for node in settings["logger"].values():
        inspect.signature(get_class(node.pop("_target_"))).bind(save_dir="x", **node)


def test_optimizer_and_loss_have_the_same_defaults_in_config_and_python():
    cfg = composed("train")
    defaults = {key: parameter.default for key, parameter in inspect.signature(Seq2SeqTask).parameters.items()}
    for key, value in {**cfg.optimizer, **cfg.loss}.items():
        assert value == defaults[key], key


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_one_key_sets_all_three_kinds_of_attention_and_one_kind_can_differ(kind):
    model = composed("train", f"model.attention={kind}", "model.cross_attention=softmax").model
    assert (model.encoder_attention, model.decoder_attention, model.cross_attention) == (kind, kind, "softmax")


def test_the_file_names_of_g2p2020_are_those_of_the_shared_task():
    data = composed("train", "experiment=g2p2020", "data.path=/x y", "data.language=kor").data
    assert (data.train, data.val, data.test) == tuple(
        f"/x y/{split}/kor_{split}.tsv" for split in ("train", "dev", "test")
    )
    assert data.normalization == "NFD"


def test_seed_reaches_the_data():
    assert composed("train", "seed=0").data.seed == 0
    assert composed("train", "seed=11").data.seed == 11
