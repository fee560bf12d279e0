from __future__ import annotations

import pytest

from transformers_api.serving.models.weight_fidelity import weight_fidelity

TYPES = {"Q4_K": 900, "Q6_K": 90, "F32": 10}
SCALES = "exact, scales in half precision"


@pytest.mark.parametrize(
    ("types", "quantization", "dtype", "kept"),
    [
        (TYPES, "gguf", "bfloat16",
         {"Q4_K": SCALES, "Q6_K": "int8, less than 1 % off", "F32": "exact"}),
        (TYPES, "none", "float32", {"Q4_K": "exact", "Q6_K": "exact", "F32": "exact"}),
        (TYPES, "none", "bfloat16", {**dict.fromkeys(TYPES, "bfloat16"), "F32": "exact"}),
        (TYPES, "int4", "bfloat16", {**dict.fromkeys(TYPES, "int4, rounded anew"), "F32": "exact"}),
        ({"BF16": 5, "F16": 9}, "none", "bfloat16", {"F16": "bfloat16", "BF16": "exact"}),
        ({"MXFP4": 5, "IQ1_S": 9}, "gguf", "float32",
         {"IQ1_S": "int8, less than 1 % off", "MXFP4": "exact"}),
        ({"F32": 900, "Q8_0": 90}, "gguf", "bfloat16", {"F32": "bfloat16", "Q8_0": "exact"}),
        ({}, "gguf", "float32", {}),
    ],
)  # fmt: skip
def test_each_type_of_a_file_says_what_is_kept_of_it(types, quantization, dtype, kept):
    made = weight_fidelity(types, quantization, dtype)
    assert made == kept
    assert list(made) == sorted(types, key=lambda name: -types[name])
