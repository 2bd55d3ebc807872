import json
import threading
from dataclasses import replace

import pytest
import yaml

from dpace.cli import main
from dpace.config import BenchConfig
from dpace.measure.break_even import compare_servers
from dpace.measure.results import read_results
from dpace.measure.servers import GROUPS_PER_WORKER, bench_servers
from dpace.metrics import MIN_PROMPTS
from dpace.prompts.prompts import Prompt
from dpace.report.cells import with_interval
from dpace.report.page import servers
from dpace.servers.apis import LlamacppServer, connect
from dpace.target.chat import ChatTokenizer, encode_chat
from tests.support.files import write_prompts
from tests.support.stub_server import PAGES, StubServer, pages

ACCEPTED = [2, 0, 1]
"""Accepted lengths of every fake response: 3 verifications, 6 tokens after the first."""
NUM_TOKENS = 1 + sum(ACCEPTED) + len(ACCEPTED)


class Fake(StubServer):
    """Speaks one engine's dialect; a response is made from the prompt, so that both sides give the same."""

    def __init__(self, engine: str, *, drafts: bool = False, tells: bool = False, version: str = "1"):
        super().__init__(self.page, self.answer)
        self.engine, self.drafts, self.tells, self.version = engine, drafts, tells, version
        self.shift = 0
        self.accepted = ACCEPTED

    @property
    def bodies(self) -> list[dict]:
        return [request.body for request in self.requests]

    def page(self, request):
        if request.path == "/metrics":
            return request.send(self.metrics().encode())
        known = PAGES.get(self.engine, {})
        pages({**known, "/version": {"version": self.version}} if self.engine == "vllm" else known)(request)

    def metrics(self) -> str:
        if not self.drafts:
            return "vllm:prompt_tokens_total 5.0"
        n = 7 + len(self.requests)
        counters = [("drafts", "", len(ACCEPTED)), ("accepted_tokens", "", sum(ACCEPTED))]
        for position in range(3):
            count = sum(accepted > position for accepted in ACCEPTED)
            counters.append(("accepted_tokens_per_pos", f',position="{position}"', count))
        lines = ["# TYPE vllm:spec_decode_num_drafts_total counter"]
        for name, label, count in counters:
            for end, value in (("total", float(n * count)), ("created", 1.7e9)):
                lines += [f'vllm:spec_decode_num_{name}_{end}{{engine="0"{label}}} {value}']
        return "\n".join(lines) + "\n"

    def answer(self, request):
        prompt = request.body.get("prompt") or request.body["input_ids"]
        tokens = [(sum(prompt) + i + self.shift) % 50 for i in range(NUM_TOKENS)]
        threading.Event().wait(0.02)
        events = list(EVENTS[self.engine](tokens, self.drafts))
        if self.tells and (request.body.get("stream_options") or {}).get("include_usage"):
            shorter = sum(prompt) % 2  # requests differ in what is accepted
            accepted = [max(0, count - shorter) for count in self.accepted]
            histogram = [accepted.count(n) for n in range(4)]
            spec = {"num_spec_steps": 3, "num_accepted_draft_tokens": sum(accepted), "acceptance_histogram": histogram}
            events[-1]["metrics"] = {"speculative_decoding": spec}
        events = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        request.send(f"{events}data: [DONE]\n\n".encode())


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


EVENTS = {"vllm": vllm_events, "sglang": sglang_events, "llama.cpp": llamacpp_events}
GREEDY = BenchConfig(temperatures=(0.0,), concurrencies=(1,))


@pytest.fixture
def start():
    running = []

    def make(engine: str, **options) -> Fake:
        running.append(Fake(engine, **options))
        return running[-1]

    yield make
    for server in running:
        server.close()


def test_no_more_requests_are_said_to_be_open_than_were(start, chat, tmp_path):
    drafter = start("vllm", drafts=True)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(1, 32), max_new_tokens=9)
    results = bench_servers(chat, drafter.url, start("vllm").url, prompts(), config, tmp_path)
    assert [row.concurrency for row in results.rows] == [1, 3] and drafter.most_running == 3


def test_a_dry_run_counts_the_prompts_that_would_be_sent(recipe, capsys):
    assert main(["bench", str(recipe), "--server", "http://127.0.0.1:9", "--num-prompts", "1", "--dry-run"]) == 0
    assert "prompts: 1, sent to the server" in capsys.readouterr().out


def prompts(count=3, turns=1):
    words = "one two three four".split()
    return [
        Prompt(f"p{i}", "s", [[{"role": "user", "content": f"{words[i % 4]} {t}"}] for t in range(turns)])
        for i in range(count)
    ]


@pytest.fixture
def recipe(language_folder, language_prompts, tmp_path):
    """Of eight held-out prompts."""
    write_prompts(tmp_path / "prompts.jsonl", language_prompts[:4])
    write_prompts(tmp_path / "heldout.jsonl", language_prompts[50:58])
    path = tmp_path / "recipe.yaml"
    files = {"path": str(tmp_path / "prompts.jsonl"), "heldout_path": str(tmp_path / "heldout.jsonl")}
    bench = {"max_new_tokens": 200}
    path.write_text(yaml.safe_dump({"target": str(language_folder), "prompts": files, "bench": bench}))
    return path


@pytest.fixture
def chat(language_target):
    return ChatTokenizer("target", language_target.tokenizer)


@pytest.mark.parametrize("engine", EVENTS)
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
        sent = [body.get("prompt") or body["input_ids"] for body in server.bodies[1:]]  # the first is a warm-up
        assert sorted(sent) == sorted(encode_chat(chat, prompt.turns[0]) for prompt in prompts())
    assert read_results(tmp_path / "servers.json") == results
    shown, tau = shown_row(tmp_path), with_interval(row.tau, *row.tau_interval)
    assert [shown[name] for name in ("set", "T", "at once", "tau [95 %]")] == ["s", "0", str(concurrency), tau]


def shown_row(folder):
    """The first row of the page's table, by heading."""
    headings, row, *_ = servers(read_results(folder / "servers.json")).rows
    return dict(zip(headings, row, strict=True))


def test_later_turns_see_the_plain_servers_answers(start, chat, tmp_path):
    drafter, plain = start("vllm", drafts=True), start("vllm")
    drafter.shift = 1
    (row,) = bench_servers(chat, drafter.url, plain.url, prompts(1, turns=2), GREEDY, tmp_path).rows
    assert row.num_same_text == 0
    (_, _, ours), (_, _, theirs) = ([body["prompt"] for body in server.bodies] for server in (drafter, plain))
    first = encode_chat(chat, prompts(1)[0].turns[0])
    assert ours == theirs and len(ours) > len(first) + NUM_TOKENS


@pytest.mark.parametrize("count", [4, 6])
def test_turns_are_drawn_with_their_prompt(count, start, chat, tmp_path):
    """Of four prompts, six requests are no six prompts; with six prompts there is an interval."""
    drafter, plain = start("vllm", drafts=True), start("vllm")
    some = [replace(prompt, turns=prompt.turns[: 1 + number % 2]) for number, prompt in enumerate(prompts(count, 2))]
    config = replace(GREEDY, concurrencies=(2,))
    (row,) = bench_servers(chat, drafter.url, plain.url, some, config, tmp_path).rows
    assert row.num_responses == count * 3 // 2 and row.decode_speedup is not None
    assert (None in row.decode_speedup_interval) is (count < MIN_PROMPTS)


def test_an_interrupted_call_goes_on_and_a_finished_one_says_that_it_asks_nothing(start, chat, tmp_path, capsys):
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
    assert "nothing is asked" not in capsys.readouterr().err
    bench_servers(chat, drafter.url, plain.url, prompts(), config, tmp_path)
    assert f"nothing is asked: {path} has all answers" in capsys.readouterr().err


@pytest.mark.parametrize(("drafts", "tau"), [(True, 2.0), (False, None)])
def test_one_server_has_no_speedup_and_no_tau_unless_it_drafts(drafts, tau, start, chat, tmp_path):
    (row,) = bench_servers(chat, start("vllm", drafts=drafts).url, None, prompts(), GREEDY, tmp_path).rows
    assert row.tau == tau and row.decode_speedup is None
    shown = shown_row(tmp_path)
    assert shown["verdict"] == "no baseline" and (shown["tau [95 %]"] == "-") is not drafts


def test_each_prompt_has_its_own_seed(start, chat, tmp_path):
    """And the same one on both sides."""
    sides = [start("vllm", drafts=True), start("vllm")]
    config = BenchConfig(temperatures=(1.0,), concurrencies=(1,), max_new_tokens=9, seed=7)
    results = bench_servers(chat, *(side.url for side in sides), prompts(), config, tmp_path)
    for side in sides:
        assert [body["seed"] for body in side.bodies[1:]] == [7, 8, 9]  # the first is a warm-up
    assert results.prompt_seeds and results.seed == 7


def test_groups_keep_servers_busy(start, chat, tmp_path):
    server = start("sglang", drafts=True)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(2,))
    bench_servers(chat, server.url, None, prompts(2 * GROUPS_PER_WORKER + 1), config, tmp_path)
    groups = [json.loads(line) for line in next(tmp_path.glob("servers-*.jsonl")).read_text().splitlines()[1:]]
    assert [len(group["ids"]) for group in groups] == [2 * GROUPS_PER_WORKER, 1]


def test_vllm_tells_the_acceptance_of_each_request(start, chat, tmp_path):
    """`--per-request-spec-decode-metrics`: an interval over prompts with several requests at once, and by context."""
    drafter, plain = start("vllm", drafts=True, tells=True), start("vllm")
    config = BenchConfig(temperatures=(0.0,), concurrencies=(4,), max_new_tokens=9)
    results = bench_servers(chat, drafter.url, plain.url, prompts(8), config, tmp_path)
    (row,) = results.rows
    assert row.num_verifications == 24 and sum(row.histogram) == 24 and None not in row.tau_interval
    expected = [3 + sum(ACCEPTED) - 2 * (sum(encode_chat(chat, p.turns[0])) % 2) for p in prompts(8)]
    assert [r.num_emitted for r in row.responses] == expected and row.tau == pytest.approx(sum(expected) / 24)
    (found,) = results.break_even
    assert found.concurrency == 4 and found.drafter == "vllm" and found.break_even[0] > 0
    assert found.break_even[0] == pytest.approx(found.tau[0] / found.speedup[0])
    without = tmp_path / "without"
    quiet = bench_servers(chat, start("vllm", drafts=True).url, plain.url, prompts(8), config, without)
    assert quiet.rows[0].tau == 2.0 and quiet.rows[0].tau_interval == (None, None) and quiet.break_even == []


@pytest.mark.parametrize(("engine", "key"), [("vllm", "cache_salt"), ("sglang", "extra_key"), ("llama.cpp", None)])
def test_cold_and_warm_rows(engine, key, start, chat, tmp_path):
    """Cold: no prompt was sent with this salt before. Warm: each was sent once, and the second answer counts."""
    server = start(engine, drafts=True)
    config = BenchConfig(temperatures=(0.0,), concurrencies=(2,), prefixes=("cold", "warm"))
    results = bench_servers(chat, server.url, None, prompts(), config, tmp_path)
    assert [row.prefix for row in results.rows] == ["cold", "warm"]
    assert [row.num_verifications for row in results.rows] == [9, 9]
    sent = server.bodies[1:]  # the first is a warm-up
    assert len(sent) == 3 * 3
    if key:
        salts = [body[key] for body in sent]
        assert len(set(salts)) == 6 and all(salts.count(salt) == 1 for salt in salts[:3])
        assert sorted(salts[3:6]) == sorted(salts[6:])
    else:
        assert [body["cache_prompt"] for body in sent] == [False] * 6 + [True] * 3
    assert [cells[3] for cells in servers(results).rows[1:]] == ["2", "2, warm"]


def test_two_versions_of_an_engine_are_compared(start, recipe, tmp_path, capsys):
    """Through the command line: bench twice, then one report with the verdict."""
    plain = start("vllm")
    for version, accepted in (("0.31", [2, 2, 2]), ("0.32", [2, 1, 1])):
        server = start("vllm", drafts=True, tells=True, version=version)
        server.accepted = accepted
        flags = f"--server {server.url} --plain-server {plain.url} --concurrencies 2 --temperatures 0"
        assert main(["bench", str(recipe), "--output", str(tmp_path / version), *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert "Break-even" in printed and "below 1k" in printed
    assert main(["report", str(tmp_path / "0.31"), str(tmp_path / "0.32")]) == 0
    page = (tmp_path / "0.31" / "report.md").read_text()
    assert "## From vllm 0.31 to vllm 0.32" in page and "| accepts less |" in page
    before, after = (read_results(tmp_path / version / "servers.json") for version in ("0.31", "0.32"))
    taus = [results.rows[0].tau for results in (before, after)]
    assert f"| {100 * (taus[1] / taus[0] - 1):+.1f} % [" in page
    (upgrade,) = compare_servers(before, after)
    assert upgrade.tau_gain[2] < 0 and upgrade.speed_ratio[0] > 0
    fewer = replace(after, rows=[replace(after.rows[0], responses=after.rows[0].responses[:3])])
    (on_three,) = compare_servers(before, fewer)
    assert on_three.tau_gain[1:] == (None, None) and not compare_servers(before, replace(after, rows=[]))
    assert compare_servers(before, replace(after, target="other")) == [], "of another target"
    older = replace(after, rows=[replace(after.rows[0], responses=None)])
    assert compare_servers(before, older) == [], "servers.json of an older version has no responses"


def test_errors_name_the_server_and_the_way_out(start, chat, tmp_path):
    with pytest.raises(ValueError, match=r"nothing answers at http://127.0.0.1:9/props .*start the server"):
        connect("http://127.0.0.1:9/")
    with pytest.raises(ValueError, match="neither vLLM nor SGLang nor llama.cpp"):
        connect(start("none").url)
    server = start("vllm")
    server.post = lambda request: request.send({"error": "prompt is too long"}, 400)
    with pytest.raises(ValueError, match=r"completions refuses \(400\): .*prompt is too long"):
        bench_servers(chat, server.url, None, prompts(), GREEDY, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        "--plain-server http://127.0.0.1:9",
        "--prefixes warm",
        "--server http://127.0.0.1:9 --verify-rules speculative",
        "--server http://127.0.0.1:9 --drafters folder",
        "--server http://127.0.0.1:9 --widths auto",
    ],
)
def test_the_verb_wants_the_server_for_its_flags_and_those_only(flags, recipe, capsys):
    assert main(["bench", str(recipe), *flags.split()]) == 1
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
