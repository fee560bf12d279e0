"""Numbers of files that strangers send: as torch, numpy and safetensors wrote them, or refused."""

from __future__ import annotations

import io
import os
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save

from transformers_api.checkpoints.headers.tensor_file import read_tensors
from transformers_api.errors import ModelLoadFailed

MOST = 1 << 20
MATRIX = torch.arange(12, dtype=torch.float32).view(3, 4)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_torch_has_the_numbers_that_torch_reads(dtype):
    whole = MATRIX.to(dtype)
    value = {"a": whole, "turned": whole.T, "row": whole[1:2, 1:], "J": {3: whole}, "n": 4}
    tensors, kind = read_tensors(saved({**value, "list": [5, 6]}), MOST)
    assert kind == "pt"
    for name, expected in (("a", whole), ("turned", whole.T), ("row", whole[1:2, 1:])):
        assert numpy.array_equal(tensors[name], expected.float().numpy())
    assert numpy.array_equal(tensors["J.3"], whole.float().numpy())
    assert (tensors["n"].item(), tensors["list"].tolist()) == (4, [5, 6])


def test_modules_and_parameters_are_read_as_tensors():
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
    tensors, _ = read_tensors(saved(layers.state_dict()), MOST)
    assert numpy.array_equal(tensors["1.weight"], layers[1].weight.detach().numpy())
    assert sorted(tensors) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_archives_and_safetensors_are_known_by_their_first_bytes():
    file = io.BytesIO()
    numpy.savez(file, W_enc=MATRIX.numpy())
    for data, kind in ((file.getvalue(), "npz"), (save({"W_enc": MATRIX}), "safetensors")):
        tensors, own = read_tensors(data, MOST)
        assert own == kind
        assert numpy.array_equal(tensors["W_enc"], MATRIX.numpy())


def test_names_alone_may_not_take_the_time_of_numbers():
    names = {f"{number}.weight": number for number in range(200_000)}
    with pytest.raises(ModelLoadFailed, match="a huge one"):
        read_tensors(saved(names), 64 << 20)
    header = (2 << 20).to_bytes(8, "little") + b"{" + b" " * (2 << 20)
    with pytest.raises(ModelLoadFailed, match="its header has more than 1048576 bytes"):
        read_tensors(header, 64 << 20)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil-was-here",)


def repickled(change):
    """A file of torch with another pickle or other numbers."""
    source, file = zipfile.ZipFile(io.BytesIO(saved({"a": MATRIX}))), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            data = change(name, source.read(name))
            if data is not None:
                archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: saved({"a": Evil()}), "which is no weight"),
        (lambda: saved([MATRIX]), "it holds no dict"),
        (lambda: saved({"a": torch.zeros(3, dtype=torch.complex64)}), "ComplexFloatStorage"),
        (lambda: saved({"a": torch.zeros(1).expand(1 << 20)}), "have more than"),
        (lambda: saved({str(i): MATRIX for i in range(2000)}), "have more than"),
        (lambda: saved({"a": torch.zeros(1 << 19)}), "unpacked"),
        (lambda: repickled(lambda name, data: b"" if "data/" in name else data), "numbers"),
        (lambda: repickled(lambda name, data: data[:9] if "pkl" in name else data), "not a sound"),
        (lambda: repickled(lambda name, data: None if "data/" in name else data), "not a sound"),
        (lambda: b"PK nothing", "not a sound archive"),
        (lambda: b"nothing", "too few"),
    ],
)
def test_what_is_no_sound_file_is_refused(data, message):
    with pytest.raises(ModelLoadFailed, match=message):
        read_tensors(data(), MOST)
    assert not os.path.exists("/tmp/evil-was-here")
