import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.results import read_results
from dpace.measure.servers import GROUPS_PER_WORKER, bench_servers
from dpace.prompts.prompts import Prompt
from dpace.report.cells import with_interval
from dpace.report.page import servers
from dpace.servers.apis import LlamacppServer, connect
from dpace.target.chat import ChatTokenizer, encode_chat

ACCEPTED = [2, 0, 1]
"""Accepted lengths of every fake response: 3 verifications, 6 tokens after the first."""
NUM_TOKENS = 1 + sum(ACCEPTED) + len(ACCEPTED)


class Fake(BaseHTTPRequestHandler):
    """Speaks one engine's dialect; a response is made from the prompt, so that both sides give the same."""

    def log_message(self, *_):
        pass

    def _send(self, text: str, kind="application/json", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        found = self.server.pages.get(self.path)
        if self.path == "/metrics" and "/v1/models" in self.server.pages:
            found = self.metrics() if self.server.drafts else "vllm:prompt_tokens_total 5.0"
        self._send(*((found,) if found else ("{}", "application/json", 404)))

    def metrics(self) -> str:
        n = self.server.num_requests
        reach = [sum(a > k for a in ACCEPTED) for k in range(3)]
        label = '{engine="0",model_name="m"}'
        lines = ["# TYPE vllm:spec_decode_num_drafts_total counter"]
        lines += [f"vllm:spec_decode_num_drafts_total{label} {float(n * len(ACCEPTED))}"]
        lines += [f"vllm:spec_decode_num_accepted_tokens_total{label} {float(n * sum(ACCEPTED))}"]
        for position, count in enumerate(reach):
            pair = f'{{engine="0",model_name="m",position="{position}"}}'
            lines += [f"vllm:spec_decode_num_accepted_tokens_per_pos_total{pair} {float(n * count)}"]
            lines += [f"vllm:spec_decode_num_accepted_tokens_per_pos_created{pair} 1.7e+09"]
        return "\n".join(lines) + "\n"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body))
        if self.server.refusal:
            return self._send(json.dumps({"error": self.server.refusal}), status=400)
        prompt = body.get("prompt") or body["input_ids"]
        tokens = [(sum(prompt) + i + self.server.shift) % 50 for i in range(NUM_TOKENS)]
        with self.server.lock:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        threading.Event().wait(0.02)
        with self.server.lock:
            self.server.running -= 1
            self.server.num_requests += 1
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in self.server.events(tokens, self.server.drafts))
        self._send(events + "data: [DONE]\n\n", "text/event-stream")


def vllm_events(tokens, drafts):
    for part in (tokens[:1], tokens[1:4], tokens[4:]):
        yield {"choices": [{"text": "x", "token_ids": part}]}
    yield {"choices": [], "usage": {"completion_tokens": len(tokens)}}


def sglang_events(tokens, drafts):
    for end in (1, 4, len(tokens)):
        meta = {"completion_tokens": end}
        if drafts:
            meta |= {"spec_verify_ct": len(ACCEPTED), "spec_accept_histogram": [1, 1, 1]}
        yield {"text": "x", "output_ids": tokens[:end], "meta_info": meta}


def llamacpp_events(tokens, drafts):
    for token in tokens:
        yield {"content": "x", "tokens": [token], "stop": False}
    timings = {"predicted_n": len(tokens)}
    if drafts:
        timings |= {"draft_n": 9, "draft_n_accepted": sum(ACCEPTED)}
    yield {"content": "", "tokens": [], "stop": True, "timings": timings}


DIALECTS = {
    "vllm": ({"/version": '{"version": "0.32.0"}', "/v1/models": '{"data": [{"id": "m"}]}'}, vllm_events),
    "sglang": ({"/get_server_info": '{"version": "0.5"}'}, sglang_events),
    "llama.cpp": ({"/props": '{"total_slots": 1}'}, llamacpp_events),
}


@pytest.fixture
def start():
    running = []

    def make(engine: str, *, drafts: bool = False):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
        server.daemon_threads = True
        server.pages, server.events = DIALECTS.get(engine, ({}, None))
        server.drafts, server.bodies, server.num_requests, server.shift = drafts, [], 7, 0
        server.lock, server.running, server.most_running, server.refusal = threading.Lock(), 0, 0, None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        server.url = f"http://127.0.0.1:{server.server_port}"
        return server

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


def prompts(count=3, turns=1):
    words = "one two three four".split()
    return [
        Prompt(f"p{i}", "s", [[{"role": "user", "content": f"{words[i % 4]} {t}"}] for t in range(turns)])
        for i in range(count)
    ]


@pytest.fixture
def chat(language_target):
    return ChatTokenizer("target", language_target.tokenizer)


@pytest.mark.parametrize("engine", DIALECTS)
@pytest.mark.parametrize("concurrency", [1, 2])
def test_every_dialect_gives_the_same_numbers(engine, concurrency, start, chat, tmp_path):
    """Pooled accepted lengths 2, 0, 1: tau is 2, whoever reports it and however."""
    drafter, plain = start(engine, drafts=True), start(engine)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(concurrency,), max_new_tokens=9)
    results = bench_servers(chat, drafter.url, plain.url, prompts(), config, tmp_path)
    (row,) = results.rows
    assert row.tau == 2.0 and row.num_verifications == 3 * len(ACCEPTED)
    assert row.num_same_text == row.num_responses == 3
    if engine != "llama.cpp":
        assert row.histogram[:3] == [3, 3, 3] and row.reach_rate[:2] == pytest.approx([2 / 3, 1 / 3])
    assert drafter.most_running == plain.most_running == concurrency
    for server in (drafter, plain):
        sent = [body.get("prompt") or body["input_ids"] for _, body in server.bodies[1:]]  # the first is a warm-up
        assert sorted(sent) == sorted(encode_chat(chat, prompt.turns[0]) for prompt in prompts())
    assert read_results(tmp_path / "servers.json") == results
    shown, tau = shown_row(tmp_path), with_interval(row.tau, row.tau_interval)
    assert [shown[name] for name in ("set", "T", "at once", "tau [95 %]")] == ["s", "0", str(concurrency), tau]


def shown_row(folder):
    """The first row of the page's table, by heading."""
    headings, row, *_ = servers(read_results(folder / "servers.json")).rows
    return dict(zip(headings, row, strict=True))


def test_another_text_is_found(start, chat, tmp_path):
    drafter, plain = start("sglang", drafts=True), start("sglang")
    drafter.shift = 1
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1,))
    assert bench_servers(chat, drafter.url, plain.url, prompts(), config, tmp_path).rows[0].num_same_text == 0


def test_later_turns_see_the_plain_servers_answers(start, chat, tmp_path):
    drafter, plain = start("vllm", drafts=True), start("vllm")
    drafter.shift = 1
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1,))
    bench_servers(chat, drafter.url, plain.url, prompts(1, turns=2), config, tmp_path)
    (_, _, ours), (_, _, theirs) = ([body["prompt"] for _, body in server.bodies] for server in (drafter, plain))
    first = encode_chat(chat, prompts(1)[0].turns[0])
    assert ours == theirs and len(ours) > len(first) + NUM_TOKENS


def test_an_interrupted_call_goes_on(start, chat, tmp_path):
    drafter, plain = start("llama.cpp", drafts=True), start("llama.cpp")
    config = BenchConfig(temperatures=(0.0, 1.0), concurrencies=(1,))
    whole = bench_servers(chat, drafter.url, plain.url, prompts(), config, tmp_path)
    (path,) = tmp_path.glob("servers-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:20])  # killed while it wrote
    count = len(drafter.bodies)
    again = bench_servers(chat, drafter.url, plain.url, prompts(), config, tmp_path)
    assert len(drafter.bodies) == count + 3  # a warm-up and the two that were lost
    assert [row.histogram for row in again.rows] == [row.histogram for row in whole.rows]
    assert [row.num_responses for row in again.rows] == [3, 3]


def test_without_a_plain_server_there_is_no_speedup(start, chat, tmp_path):
    drafter = start("vllm", drafts=True)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1,))
    (row,) = bench_servers(chat, drafter.url, None, prompts(), config, tmp_path).rows
    assert row.tau == 2.0 and row.decode_speedup is None and shown_row(tmp_path)["verdict"] == "no baseline"


def test_each_prompt_has_its_own_seed(start, chat, tmp_path):
    """And the same one on both sides."""
    sides = [start("vllm", drafts=True), start("vllm")]
    config = BenchConfig(temperatures=(1.0,), concurrencies=(1,), max_new_tokens=9, seed=7)
    results = bench_servers(chat, *(side.url for side in sides), prompts(), config, tmp_path)
    for side in sides:
        assert [body["seed"] for _, body in side.bodies[1:]] == [7, 8, 9]  # the first is a warm-up
    assert results.prompt_seeds and results.seed == 7


def test_a_server_that_drafts_nothing_has_no_tau(start, chat, tmp_path):
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1,))
    (row,) = bench_servers(chat, start("vllm").url, None, prompts(), config, tmp_path).rows
    assert row.tau is None and shown_row(tmp_path)["tau [95 %]"] == "-"


def test_groups_keep_servers_busy(start, chat, tmp_path):
    server = start("sglang", drafts=True)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(2,))
    bench_servers(chat, server.url, None, prompts(2 * GROUPS_PER_WORKER + 1), config, tmp_path)
    groups = [json.loads(line) for line in next(tmp_path.glob("servers-*.jsonl")).read_text().splitlines()[1:]]
    assert [len(group["ids"]) for group in groups] == [2 * GROUPS_PER_WORKER, 1]


def test_errors_name_the_server_and_the_way_out(start, chat, tmp_path):
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1,))
    with pytest.raises(ValueError, match=r"nothing answers at http://127.0.0.1:9/props .*start the server"):
        connect("http://127.0.0.1:9/")
    with pytest.raises(ValueError, match="neither vLLM nor SGLang nor llama.cpp"):
        connect(start("none").url)
    server = start("vllm")
    server.refusal = "prompt is too long"
    with pytest.raises(ValueError, match=r"completions refuses \(400\): .*prompt is too long"):
        bench_servers(chat, server.url, None, prompts(), config, tmp_path)


def test_the_verb_wants_the_server_for_a_baseline(capsys):
    assert main(["bench", "--plain-server", "http://127.0.0.1:9"]) == 1
    assert "--bench.server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "predicted", "drafted", "accepted", "expected"),
    [
        ("eos", 25, 30, 18, (6, 18)),  # the last draft went on after the end
        ("eos", 25, 35, 18, (7, 17)),  # its last token was the end: no bonus token
        ("limit", 25, 35, 18, (6, 18)),
        ("eos", 25, 33, 18, (6, 18)),  # drafts of different lengths tell nothing
    ],
)
def test_llamacpp_verifications_without_a_bonus_token_are_counted(stop, predicted, drafted, accepted, expected):
    timings = {"predicted_n": predicted, "draft_n": drafted, "draft_n_accepted": accepted}
    counts = LlamacppServer("http://x").read({"stop": True, "stop_type": stop, "timings": timings}).counts
    assert counts is not None and (counts.num_verifications, counts.num_accepted) == expected
