"""Files of weights as people bring them, and as an attacker would."""

import argparse
import contextlib
import io
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from models.state_dicts import (
    StateDictDamaged,
    StateDictError,
    StateDictMissing,
    StateDictUnsafe,
    StateDictUnsupported,
    read_state_dict,
)


def tiny() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def saved(path: Path, what: object, **options: object) -> Path:
    torch.save(what, path, **options)
    return path


def assert_same(state, network=None):
    expected = (network or tiny()).state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pt_round_trip(tmp_path, zipped):
    path = saved(tmp_path / "m.pt", tiny().state_dict(), _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path))


def test_safetensors(tmp_path):
    save_file(dict(tiny().state_dict()), tmp_path / "m.safetensors")
    state = read_state_dict(tmp_path / "m.safetensors")
    assert {n: t.tolist() for n, t in state.items()} == {
        n: t.tolist() for n, t in tiny().state_dict().items()
    }


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_ema"])
def test_one_level_is_unwrapped(tmp_path, entry):
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    saved_by_a_script = {"epoch": 7, entry: tiny().state_dict(), "optimizer": optimizer}
    assert_same(read_state_dict(saved(tmp_path / "m.pt", saved_by_a_script)))


def test_a_named_entry_is_taken(tmp_path):
    other = {name: tensor + 1 for name, tensor in tiny().state_dict().items()}
    path = saved(tmp_path / "m.pt", {"model": other, "best": tiny().state_dict()})
    assert_same(read_state_dict(path, entry="best"))
    with pytest.raises(StateDictUnsupported, match="no entry 'worst'; it has model, best"):
        read_state_dict(path, entry="worst")


def averaged(state):
    """The names that `torch.optim.swa_utils.AveragedModel` saves."""
    return {"n_averaged": torch.tensor(4), **{f"module.{name}": t for name, t in state.items()}}


def parallel(state):
    """The names that `DataParallel` and `DistributedDataParallel` save."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


@pytest.mark.parametrize("wrap", [averaged, parallel, lambda state: parallel(averaged(state))])
def test_prefixes_of_wrappers_come_off(tmp_path, wrap):
    assert_same(read_state_dict(saved(tmp_path / "m.pt", wrap(tiny().state_dict()))))


def test_prefixes_of_compiled_networks_come_off(tmp_path):
    whole = {f"_orig_mod.{name}": t for name, t in tiny().state_dict().items()}
    assert_same(read_state_dict(saved(tmp_path / "whole.pt", whole)))
    part = {name.replace("0.", "0._orig_mod."): t for name, t in tiny().state_dict().items()}
    assert_same(read_state_dict(saved(tmp_path / "part.pt", part)))


def test_a_network_with_a_part_called_module_keeps_it(tmp_path):
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert_same(read_state_dict(saved(tmp_path / "m.pt", network.state_dict())), network)


class Bomb:
    """Writes a canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["whole", "entry", "beside"])
def test_a_pickle_bomb_does_not_go_off(tmp_path, zipped, where):
    bomb: object = Bomb(tmp_path / "canary")
    content = {
        "whole": bomb,
        "entry": {"model": bomb},
        "beside": {**tiny().state_dict(), "x": bomb},
    }
    path = saved(tmp_path / "m.pt", content[where], _use_new_zipfile_serialization=zipped)
    with pytest.raises(StateDictUnsafe):
        read_state_dict(path)
    assert not (tmp_path / "canary").exists()


def test_a_plain_pickle_bomb_does_not_go_off(tmp_path):
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(StateDictError):
        read_state_dict(tmp_path / "m.pt")
    assert not (tmp_path / "canary").exists()


def unsafe_contents():
    options = argparse.Namespace(lr=0.1)
    state = tiny().state_dict()
    return {
        "module": tiny(),
        "reference": {"model": state, "optimizer": {}, "args": options},
        "module_in_dict": {"epoch": 3, "model": tiny()},
        "own_entry": {"args": options, "net": state},
        "flat": {**state, "args": options},
        "ordered": OrderedDict(state_dict=state, args=options),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", list(unsafe_contents()))
def test_the_two_lines_of_advice_work(tmp_path, monkeypatch, zipped, kind):
    path = tmp_path / "parts.pt"
    torch.save(unsafe_contents()[kind], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(StateDictUnsafe) as refused:
        read_state_dict(path)
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in lines[1:]), {"torch": torch})
    assert_same(read_state_dict(tmp_path / "parts-weights.pt"))


@pytest.mark.slow  # importing torch.jit takes seconds
@pytest.mark.filterwarnings("ignore")  # what makes such files is deprecated
def test_torchscript_is_refused_with_advice(tmp_path):
    torch.jit.trace(tiny().eval(), torch.zeros(1, 4)).save(tmp_path / "m.pt")
    with pytest.raises(StateDictUnsafe, match=re.escape("torch.jit.load")):
        read_state_dict(tmp_path / "m.pt")


def test_sparse_and_quantized_tensors_are_refused(tmp_path):
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(StateDictUnsupported, match="a is a sparse_coo tensor"):
        read_state_dict(saved(tmp_path / "s.pt", {"a": sparse}))
    with pytest.raises(StateDictUnsupported, match="a is a meta|a is a strided"):
        read_state_dict(saved(tmp_path / "m.pt", {"a": torch.empty(3, device="meta")}))


def test_a_small_file_cannot_claim_a_large_memory(tmp_path):
    huge = torch.zeros(1).expand(1 << 40)  # 4 TiB in 4 bytes
    path = saved(tmp_path / "m.pt", {"a": huge})
    assert path.stat().st_size < 4096
    with pytest.raises(StateDictDamaged, match="claims 4398046511104 bytes"):
        read_state_dict(path)
    less = saved(tmp_path / "less.pt", {"a": torch.zeros(1).expand(500)})
    with pytest.raises(StateDictDamaged, match="a claims 2000 bytes; the file does not hold"):
        read_state_dict(less)
    many = {f"w{i}": (shared := torch.zeros(100_000)) if i == 0 else shared for i in range(20)}
    with pytest.raises(StateDictDamaged, match="bytes of weights"):
        read_state_dict(saved(tmp_path / "many.pt", many))


def test_tied_weights_are_read(tmp_path):
    weight = torch.ones(50, 50)
    state = read_state_dict(saved(tmp_path / "m.pt", {"a": weight, "b": weight}))
    assert torch.equal(state["a"], state["b"])


def test_a_compressed_container_is_refused(tmp_path):
    saved(tmp_path / "m.pt", {"a": torch.zeros(1_000_000)})
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as source,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.namelist():
            target.writestr(part, source.read(part))
    with pytest.raises(StateDictUnsupported, match="compressed"):
        read_state_dict(tmp_path / "z.pt")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({}, "no named tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, r"there are also 'epoch' \(int\)"),
        ({3: torch.zeros(1)}, "names are not text"),
        ({"best": {"a": torch.zeros(1)}}, r"also 'best' \(dict\)"),
    ],
)
def test_other_content_is_named(tmp_path, content, sentence):
    with pytest.raises(StateDictUnsupported, match=sentence):
        read_state_dict(saved(tmp_path / "m.pt", content))


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(StateDictMissing, match="cannot be opened"):
        read_state_dict(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(StateDictDamaged):
        read_state_dict(tmp_path / "text.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(StateDictDamaged):
        read_state_dict(tmp_path / "empty.safetensors")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(StateDictUnsupported, match="torch.save"):
        read_state_dict(tmp_path / "other.pt")


def original(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(tiny().state_dict(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), zipped=st.booleans())
def test_damaged_files_are_refused_by_name(tmp_path, data, zipped):
    content = bytearray(original(zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    (tmp_path / "m.pt").write_bytes(content[:cut])
    with contextlib.suppress(StateDictError):
        read_state_dict(tmp_path / "m.pt")


def test_real_files_are_read(real_data, tmp_path):
    mobilenet = read_state_dict(real_data / "weights" / "mobilenet_v2.pth")
    assert mobilenet["classifier.1.weight"].shape == (1000, 1280)
    shutil.copy(real_data / "weights" / "squeezenet1_1.pth", tmp_path / "s.pth")
    assert read_state_dict(tmp_path / "s.pth")["classifier.1.weight"].shape == (1000, 512, 1, 1)
