import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformers_api.api.http import strict_json
from transformers_api.errors import InvalidRequest

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_python_writes_is_read_back(value):
    assert strict_json.parse(json.dumps(value).encode()) == value
    assert strict_json.parse(json.dumps(value, ensure_ascii=False).encode()) == value


@given(values)
def test_what_is_dumped_is_read_back(value):
    assert strict_json.parse(strict_json.dump(value)) == value


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        pytest.param(b'{"a": 1, "a": 2}', "'a' twice", id="duplicate key"),
        pytest.param(b'{"a": NaN}', "NaN", id="NaN"),
        pytest.param(b'{"a": -Infinity}', "Infinity", id="infinity"),
        pytest.param(b'{"a": 1e999}', "too large", id="overflowing number"),
        pytest.param(b'{"a": ' + b"9" * 6000 + b"}", "64 bits", id="huge integer"),
        pytest.param(b'{"a": 9223372036854775808}', "64 bits", id="65 bits"),
        pytest.param(b'{"a": "\\ud83d"}', "surrogate", id="half a surrogate pair"),
        pytest.param(b'{"\\ude00": 1}', "surrogate", id="half a pair in a name"),
        pytest.param(b'{"\\ude00": 1, "\\ude00": 2}', "twice", id="half a pair in a name, twice"),
        pytest.param(b"[" * 100_000, "deep", id="bottomless lists"),
        pytest.param(b'{"a":' * 65 + b"1" + b"}" * 65, "deep", id="65 levels"),
        pytest.param('{"a": 1}'.encode("utf-16"), "UTF-8", id="UTF-16"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), "not valid JSON", id="UTF-16 without mark"),
        pytest.param(b'{"a": "\xff"}', "UTF-8", id="not UTF-8"),
        pytest.param(b'{"a": "\xed\xa0\x80"}', "UTF-8", id="encoded surrogate"),
        pytest.param(b"{'a': 1}", "not valid JSON", id="single quotes"),
        pytest.param(b'{"a": 1} x', "not valid JSON", id="more after the end"),
        pytest.param(b'"' + b'\\"' * 100_000, "not valid JSON", id="a string without an end"),
        pytest.param(b'{"a": "\n"}', "not valid JSON", id="control character"),
    ],
)
def test_anything_else_is_refused(raw, complaint):
    with pytest.raises(InvalidRequest, match=complaint) as caught:
        strict_json.parse(raw)
    caught.value.message.encode()  # it can be sent


def test_what_is_allowed_stays_allowed():
    assert strict_json.parse(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert strict_json.parse(b'{"a": "\\ud83d\\ude00 \\\\ud83d"}') == {"a": "😀 \\ud83d"}
    assert strict_json.parse(b'["]]]]", "{[[["]') == ["]]]]", "{[[["]
    nested = b"[" * 64 + b"]" * 64
    assert json.loads(nested) == strict_json.parse(nested)
