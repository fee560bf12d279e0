"""Files of directions: read as those who write them meant, and refused where they are not sound."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile

import gguf
import numpy
import pytest
from safetensors.numpy import save

from transformers_api.checkpoints.headers.direction_file import (
    read_directions,
    write_control_vector,
)
from transformers_api.errors import ModelLoadFailed

ROWS = numpy.random.default_rng(0).normal(size=(3, 20)).astype(numpy.float32)
LAYERS = (1, 2, 5)
MOST = 1 << 20


def npz(**arrays):
    file = io.BytesIO()
    numpy.savez_compressed(file, **arrays)
    return file.getvalue()


def control_vector(tmp_path, architecture="controlvector", dtype=numpy.float32):
    """As repeng writes it, by the gguf package."""
    writer = gguf.GGUFWriter(tmp_path / "vector.gguf", architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(LAYERS))
    for layer, row in zip(LAYERS, ROWS, strict=True):
        writer.add_tensor(f"direction.{layer}", row.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (tmp_path / "vector.gguf").read_bytes()


def refusal(data):
    with pytest.raises(ModelLoadFailed) as refused:
        read_directions(data, MOST)
    return str(refused.value)


def test_a_control_vector_of_the_gguf_package_is_read(tmp_path):
    directions = read_directions(control_vector(tmp_path), MOST)
    assert (directions.kind, directions.layers, directions.hint) == ("gguf", LAYERS, "llama")
    assert (directions.rows == ROWS).all()


def test_a_control_vector_of_ours_is_read_by_the_gguf_package(tmp_path):
    path = tmp_path / "ours.gguf"
    path.write_bytes(write_control_vector(ROWS, LAYERS, "llama"))
    reader = gguf.GGUFReader(path)
    assert reader.fields["controlvector.layer_count"].contents() == 3
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{n}" for n in LAYERS]
    for tensor, row in zip(reader.tensors, ROWS, strict=True):
        assert (tensor.data == row).all()
    assert (read_directions(path.read_bytes(), MOST).rows == ROWS).all()


def test_layer_0_has_no_place_in_a_control_vector():
    with pytest.raises(ModelLoadFailed, match="no direction for layer 0"):
        write_control_vector(ROWS, (0, 1, 2), "llama")


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16, numpy.float64])
def test_archives_and_safetensors_are_read_in_every_precision(dtype):
    rows = ROWS.astype(dtype)
    layers = numpy.array(LAYERS)
    named = {f"direction.{layer}": row for layer, row in zip(LAYERS, rows, strict=True)}
    for data in (
        npz(vector=rows, layers=layers),
        npz(**named),
        save({"vector": rows, "layers": layers}),
        save(named),
    ):
        directions = read_directions(data, MOST)
        assert directions.layers == LAYERS
        assert (directions.rows == rows.astype(numpy.float32)).all()


def test_one_direction_is_for_any_layer_and_rows_alone_for_the_first():
    assert read_directions(npz(vector=ROWS[0]), MOST).layers is None
    assert read_directions(save({"vector": ROWS}), MOST).layers == (0, 1, 2)


def test_half_precision_of_training_is_widened_exactly(tmp_path):
    wide = ROWS.view(numpy.uint32) & 0xFFFF0000
    header = b'{"vector":{"dtype":"BF16","shape":[3,20],"data_offsets":[0,120]}}'
    data = struct.pack("<Q", len(header)) + header + (wide >> 16).astype("<u2").tobytes()
    assert (read_directions(data, MOST).rows == wide.view(numpy.float32)).all()


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(capsys):
    assert "type object" in refusal(npz(vector=numpy.array([Harmful()], object)))
    assert "the file" in refusal(pickle.dumps(Harmful()))
    assert capsys.readouterr().out == ""


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_does():
    assert "max 1024 of 1048576" in refusal(npz(vector=numpy.zeros(1 << 20)))


def test_an_array_that_claims_more_than_its_bytes_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
        head = head.ljust(117) + b"\n"
        start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head))
        archive.writestr("vector.npy", start + head + b"1234")
    assert "shape [1000000000000]" in refusal(file.getvalue())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npz(vector=ROWS, layers=numpy.array([1, 1, 2])), "differ from each other"),
        (npz(vector=ROWS, layers=numpy.array([1, 2])), "3 rows for 2 layers"),
        (npz(vector=ROWS, layers=numpy.array([1.5, 2, 3])), "layers has the type float64"),
        (npz(vector=ROWS[None]), "it must be"),
        (npz(vector=ROWS[:0]), "it must be"),
        (npz(vector=numpy.array([1, numpy.nan])), "must be finite"),
        (npz(vector=numpy.array([1, 1e300])), "must be finite"),
        (npz(other=ROWS), "neither a tensor vector nor any direction.N; there are: other"),
        (npz(**{"direction.1": ROWS[0], "direction.2": ROWS[1, :5]}), "different shapes"),
        (save({"vector": ROWS.astype(numpy.int8)}), "vector has the type I8"),
        (npz(vector=ROWS)[:100], "not a sound archive"),
        (b"PK\x03\x04nonsense", "not a sound archive"),
        (b"GGUF" + bytes(40), "not a sound GGUF file"),
        (b"nonsense that is long enough", "the file"),
    ],
)
def test_what_is_not_sound_is_refused_by_what_is_wrong(data, reason):
    message = refusal(data)
    assert reason in message
    assert "/tmp" not in message


def test_another_kind_of_gguf_file_is_refused_by_its_kind(tmp_path):
    assert "holds a llama, not a controlvector" in refusal(control_vector(tmp_path, "llama"))


def packed(shape="(4,)", packing=zipfile.ZIP_DEFLATED, harm=None):
    """An archive with one vector, whose packed bytes may be harmed from a place on."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117)
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n" + bytes(16)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("vector.npy", array)
    data = bytearray(file.getvalue())
    if harm is not None:
        start = data.index(b"vector.npy") + len(b"vector.npy") + harm
        data[start : start + 4] = b"\xff" * 4
    return bytes(data)


def test_whatever_fails_inside_an_archive_is_a_refusal():
    assert read_directions(packed(), MOST).rows.shape == (1, 4)
    for data in (
        packed(harm=0),
        packed(harm=9),
        packed("(True, 4)"),
        packed("(0, 10000000000000)"),
    ):
        assert "not a sound archive" in refusal(data)
    for packing in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        assert "numpy never uses" in refusal(packed(packing=packing))


def test_rows_and_layers_are_as_many_as_layers_can_be():
    for rows in (1025, 1 << 16):
        assert f"there are {rows} rows (max 1024)" in refusal(npz(vector=numpy.ones((rows, 1))))
    assert len(read_directions(npz(vector=numpy.ones((1024, 1))), MOST).rows) == 1024
    for layer in (-1, 1024, 2**64 - 1):
        layers = numpy.array([layer], numpy.int64 if layer < 0 else numpy.uint64)
        assert "layers must be in [0, 1023]" in refusal(npz(vector=ROWS[:1], layers=layers))
    assert "layers must be" in refusal(npz(**{"direction.9999": ROWS[0]}))
