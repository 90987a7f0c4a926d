import json

import pytest
import torch

from models.store import StoreError, read_config, read_tensors, weights_digest, write_model


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "m", {"kind": "generator", "name": "m"}, {"model.safetensors": {"w": torch.ones(3)}})
    return tmp_path / "m"


def test_round_trip_upcasts_once(folder):
    config = read_config(folder, "generator")
    tensors = read_tensors(folder, "model.safetensors", config["files"])
    assert tensors["w"].dtype == torch.float32
    assert tensors["w"].tolist() == [1, 1, 1]


def test_a_changed_file_is_refused(folder):
    config = read_config(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match="digest"):
        read_tensors(folder, "model.safetensors", config["files"])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_paths_outside_the_folder_are_refused(folder, name):
    with pytest.raises(StoreError, match="outside"):
        read_tensors(folder, name, {name: "0" * 64})


def test_only_safetensors_are_read(folder):
    with pytest.raises(StoreError, match=r"only \.safetensors"):
        read_tensors(folder, "model.pt", {"model.pt": "0" * 64})


def test_missing_and_malformed_files_are_named(folder):
    with pytest.raises(StoreError, match=r"gone\.safetensors does not exist"):
        read_tensors(folder, "gone.safetensors", {"gone.safetensors": "0" * 64})
    with pytest.raises(StoreError, match="expected 'ensemble'"):
        read_config(folder, "ensemble")
    (folder / "config.json").write_text("{")
    with pytest.raises(StoreError, match="not JSON"):
        read_config(folder)
    (folder / "config.json").write_text(json.dumps({"kind": "generator"}))
    with pytest.raises(StoreError, match="files"):
        read_config(folder)


def test_the_weights_digest_ignores_order():
    assert weights_digest({"a": "1", "b": "2"}) == weights_digest({"b": "1", "a": "2"})
    assert weights_digest({"a": "1"}) != weights_digest({"a": "2"})
