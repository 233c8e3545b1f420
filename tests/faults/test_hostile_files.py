"""Files that would run code if they were unpickled: each is refused, in words, and the code does not run."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tiny_scripts
import torch

from modeling_uc2 import UC2Config, UC2ForPreTraining
from uc2.convert_checkpoint import CheckpointError
from uc2.convert_checkpoint import main as convert_main
from uc2.data_error import DataError
from uc2.region_import import import_regions
from uc2.safe_decoding import DecodingError, loads_msgpack, loads_npz, loads_pickle

lmdb = pytest.importorskip("lmdb")
msgpack = pytest.importorskip("msgpack")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """The folder that must not come into being; that it would is checked first."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "proof")))
    assert (tmp_path / "proof").exists()
    path = tmp_path / "trap"
    yield path
    assert not path.exists()


@pytest.mark.parametrize("ending", [".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_converted_checkpoint(tmp_path, trap, ending, zipped):
    file, config = tmp_path / f"model{ending}", tmp_path / "config.json"
    torch.save({"roberta.a": Hostile(trap)}, file, _use_new_zipfile_serialization=zipped)
    config.write_text(json.dumps({"num_attention_heads": 2}))
    words = ["--checkpoint", file, "--config", config, "--head", "vqa", "--output_dir", tmp_path / "out"]
    with pytest.raises(CheckpointError, match=f"model{ending}.*more than tensors"):
        convert_main([str(word) for word in words])


def test_model_folder(tmp_path, trap):
    """Weights as a pickle, in a folder that `from_pretrained` reads."""
    sizes = {"vocab_size": 20, "region_feature_size": 12, "num_region_classes": 4}
    UC2ForPreTraining(UC2Config(**tiny_scripts.SIZES, **sizes)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.bias": Hostile(trap)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        UC2ForPreTraining.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_checkpoint_to_resume(tiny_corpus, tmp_path, trap, name):
    """As if somebody had sent a checkpoint to go on from."""
    script = tiny_scripts.vqa(tiny_corpus, tmp_path)
    checkpoint = tmp_path / "sent"
    shutil.copytree(script.undisturbed() / "checkpoint-6", checkpoint)
    (checkpoint / "checkpoint_files.json").unlink()
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Hostile(trap)}, checkpoint / name)
    assert script.run("resumed", resume_from_checkpoint=checkpoint, max_steps=8) == 1
    said = script.said("resumed")
    assert "error: a checkpoint holds more than tensors and numbers" in said and "Traceback" not in said


def test_lmdb_values(tmp_path, trap):
    for format, content in {
        "volta_lmdb": pickle.dumps({"features": Hostile(trap)}),
        "uniter_lmdb": msgpack.packb(
            {"features": {b"nd": True, b"type": b"O", b"kind": b"O", b"data": pickle.dumps(Hostile(trap))}}
        ),
    }.items():
        path = tmp_path / format
        with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
            transaction.put(b"a", content)
        with pytest.raises(DataError, match=f"{format}, row 1"):
            import_regions(format, [path], tmp_path / "store")


def test_numpy_files(tmp_path, trap):
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "a.npy", np.array([Hostile(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="a.npy.*only numbers"):
        import_regions("npz", [folder], tmp_path / "store")
    np.savez(folder / "b.npz", features=np.array([Hostile(trap)], dtype=object))
    assert loads_npz((folder / "b.npz").read_bytes()) == {}
    (folder / "a.npy").write_bytes(pickle.dumps(Hostile(trap)))
    with pytest.raises(DataError, match="a.npy"):
        import_regions("npz", [folder], tmp_path / "store")


def test_decoders(trap):
    for content in (pickle.dumps(Hostile(trap)), b"cos\nsystem\n(S'true'\ntR.", pickle.dumps(print)):
        with pytest.raises(DecodingError, match="only plain data"):
            loads_pickle(content)
    extension = msgpack.packb(msgpack.ExtType(1, pickle.dumps(Hostile(trap))))
    assert not isinstance(loads_msgpack(extension), Hostile)


def test_yaml_settings(tmp_path, trap, capsys):
    from run_vqa import main

    file = tmp_path / "settings.yaml"
    file.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{trap}']")
    with pytest.raises(SystemExit):
        main([str(file)])
    assert "settings.yaml cannot be read" in capsys.readouterr().err
