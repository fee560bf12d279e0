from __future__ import annotations

from pathlib import Path

import pytest

from transformers_api.config.described import described
from transformers_api.config.settings import SettingError, Settings


def test_every_setting_has_a_default_that_needs_no_environment():
    settings = Settings.from_env({})
    assert (settings.host, settings.port) == ("127.0.0.1", 5000)
    assert settings.default_model == "smollm2-135m-instruct"
    assert settings.auto_load
    assert settings.preload_model


@pytest.mark.parametrize(
    ("environ", "name", "value"),
    [
        ({"PORT": "8000"}, "port", 8000),
        ({"API_PORT": "8000"}, "port", 8000),
        ({"API_PORT": "8000", "PORT": "9000"}, "port", 9000),
        ({"PORT": " "}, "port", 5000),
        ({"DEVICE": "CUDA:1"}, "default_device", "cuda:1"),
        ({"AUTO_LOAD": "No"}, "auto_load", False),
        ({"MODEL_ALLOW_LIST": "a, b,,"}, "model_allow_list", ("a", "b")),
        (
            {"ALLOWED_ORIGINS": "http://a:3000,https://b"},
            "cors_allow_origins",
            ("http://a:3000", "https://b"),
        ),
        ({"CKPT_DIR": "/srv/store"}, "model_store", Path("/srv/store")),
        ({"KV_CACHE_GIB": "0.5"}, "kv_cache_gib", 0.5),
        ({"API_KEYS_FILE": "/etc/keys"}, "api_keys_file", Path("/etc/keys")),
        ({"TRUSTED_PROXIES": "1"}, "trusted_proxies", 1),
        ({"REDIS_URL": "rediss://:x@a:6380/1"}, "redis_url", "rediss://:x@a:6380/1"),
        ({}, "inspected_per_min", 10),
        ({"RATE_LIMIT_PER_MIN": "0"}, "inspected_per_min", 0),
    ],
)
def test_values_come_from_the_environment_by_name_or_by_alias(environ, name, value):
    assert getattr(Settings.from_env(environ), name) == value


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "eighty", "a whole number from 0 to 65535"),
        ("PORT", "70000", "a whole number from 0 to 65535"),
        ("DRAIN_S", "nan", "a number from 0 to 86400"),
        ("KV_CACHE_GIB", "inf", "a number"),
        ("DTYPE", "int3", "one of auto, float32, bfloat16, float16"),
        ("DEFAULT_DEVICE", "tpu", "auto, cpu, cuda, cuda:N or mps"),
        ("DEFAULT_DEVICE", "cpu:1", "auto, cpu, cuda, cuda:N or mps"),
        ("AUTO_LOAD", "maybe", "true or false"),
        ("CORS_ALLOW_ORIGINS", "https://.*good.example", "exact origins"),
        ("CORS_ALLOW_ORIGINS", "*", "exact origins"),
        ("CORS_ALLOW_ORIGINS", "good.example", "exact origins"),
        ("CORS_ALLOW_ORIGINS", "null", "exact origins"),
        ("TRUSTED_PROXIES", "10.0.0.0/8", "a whole number from 0 to 16"),
        ("QUANTIZATION", "int3", "one of auto, stored, gguf, none, int8, int4"),
        ("KV_CACHE_DTYPE", "int4", "one of auto, int8"),
        ("RATE_LIMIT_TOKENS_PER_MIN", "0", "a whole number from 1"),
    ],
)
def test_a_bad_value_is_one_line_with_name_value_and_what_is_allowed(name, value, expected):
    with pytest.raises(SettingError) as caught:
        Settings.from_env({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not allowed")
    assert expected in message
    assert "\n" not in message


def test_quantization_needs_the_native_kernels():
    with pytest.raises(SettingError, match=r"^QUANTIZATION=int8 is not allowed: it needs NATIVE_"):
        Settings.from_env({"QUANTIZATION": "int8", "NATIVE_KERNELS": "false"})
    settings = Settings.from_env({"QUANTIZATION": "int8", "NATIVE_KERNELS": "true"})
    assert settings.quantization == "int8"


@pytest.mark.parametrize("without", [{"NATIVE_KERNELS": "false"}, {"NATIVE_ISA": "none"}])
def test_an_int8_cache_needs_the_native_kernels(without):
    message = r"^KV_CACHE_DTYPE=int8 is not allowed: it needs NATIVE_KERNELS=true$"
    with pytest.raises(SettingError, match=message):
        Settings.from_env({"KV_CACHE_DTYPE": "int8", **without})
    assert Settings.from_env({"KV_CACHE_DTYPE": "int8"}).kv_cache_dtype == "int8"
    assert Settings.from_env({"KV_CACHE_DTYPE": "auto", **without}).kv_cache_dtype == "auto"


def test_keys_are_in_one_place():
    shared = {"API_KEYS_REDIS": "true", "REDIS_URL": "redis://a:6379/0"}
    assert Settings.from_env(shared).needs_key
    with pytest.raises(SettingError, match=r"^API_KEYS_REDIS=true is not allowed: it needs REDIS_"):
        Settings.from_env({"API_KEYS_REDIS": "true"})
    with pytest.raises(SettingError, match=r"^API_KEYS_REDIS=true is not allowed: API_KEYS_FILE"):
        Settings.from_env(shared | {"API_KEYS_FILE": "keys"})


@pytest.mark.parametrize("value", ["localhost:6379", "http://secret@a", "redis://secret@a:port"])
def test_a_bad_value_that_may_hold_a_password_is_not_repeated(value):
    with pytest.raises(SettingError, match=r"^REDIS_URL=\*\*\* is not allowed") as caught:
        Settings.from_env({"REDIS_URL": value})
    assert "secret" not in str(caught.value)


def test_keys_open_downloads_where_others_can_reach_the_server():
    assert not Settings(host="0.0.0.0").downloads_allowed
    assert Settings(host="0.0.0.0", api_keys_file=Path("keys")).downloads_allowed


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
    ],
)
def test_downloads_are_allowed_by_default_only_for_this_machine(host, expected):
    assert Settings.from_env({"HOST": host}).downloads_allowed is expected
    assert Settings.from_env({"HOST": host, "ALLOW_DOWNLOAD": "true"}).downloads_allowed
    assert not Settings.from_env({"HOST": host, "ALLOW_DOWNLOAD": "false"}).downloads_allowed


def test_there_is_a_thread_for_every_request_that_runs_or_waits_and_some_for_the_rest():
    assert Settings(max_inflight=3, max_queue=5).threads == 3 + 5 + 32


def test_every_setting_is_described():
    rows = described()
    assert len(rows) == len(Settings.__dataclass_fields__)
    assert all(help_ for _, _, _, help_ in rows)
