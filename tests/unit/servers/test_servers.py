"""`dpace bench --server`: what servers report becomes rows, beside what was measured here and in training."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from dpace.config import BenchConfig
from dpace.measure.records import PLAIN
from dpace.measure.results import ServedAnswer, ServedRecord, read_results, write_results
from dpace.measure.servers import CONTROL, DRAFTER, bench_servers, make_rows
from dpace.report.sections import depths_note, served_verdict, servers
from dpace.servers.apis import Counts, LlamacppServer
from dpace.servers.transport import Address
from dpace.target.chat import ChatTokenizer, encode_chat
from tests.support.files import make_prompts, write_prompts
from tests.support.models import make_tokenizer
from tests.support.rows import make_compare, make_row, make_served, make_servers
from tests.support.stub_server import PAGES, StubServer, pages

ACCEPTED = [2, 0, 1]
"""Accepted lengths of every fake response: 3 verifications, 6 tokens after the first."""
NUM_TOKENS = 1 + sum(ACCEPTED) + len(ACCEPTED)
COUNTERS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0"}} {:.1f}
vllm:spec_decode_num_drafts_total{{engine="1"}} 2.0e+00
vllm:spec_decode_num_drafts_created{{engine="0"}} 1.7e+09
vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {:.1f}
vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {:.1f}
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} 5.0
"""
SALTS = {"vllm": "cache_salt", "sglang": "extra_key"}
GREEDY = BenchConfig(temperatures=(0.0,), max_new_tokens=9, seed=7)
PROMPTS = make_prompts(f"w{i} w0" for i in range(8))


def events(engine: str, tokens: list[int], depth: int):
    """A response in an engine's words, those that are read; 0 without drafts."""
    if engine == "vllm":
        for part in (tokens[:1], tokens[1:4], tokens[4:]):
            yield {"choices": [{"token_ids": part}]}
        yield {"choices": [{"finish_reason": "length"}], "usage": {"completion_tokens": len(tokens)}}
    elif engine == "sglang":
        spec = {"spec_verify_ct": len(ACCEPTED)} if depth else {}
        for end in (1, 4, len(tokens)):
            reason = {"type": "length"} if end == len(tokens) else None
            meta = {"completion_tokens": end, "finish_reason": reason, **spec}
            yield {"output_ids": tokens[:end], "meta_info": meta}
    else:
        for token in tokens:
            yield {"tokens": [token]}
        spec = {"draft_n": len(ACCEPTED) * depth, "draft_n_accepted": sum(ACCEPTED)} if depth else {}
        yield {"stop": True, "timings": {"predicted_n": len(tokens), **spec}}


class Fake(StubServer):
    """Speaks one engine's dialect; a response is made from the prompt, so that both sides give the same."""

    def __init__(self, engine: str, *, drafts: bool = False, depth: int = 3):
        super().__init__(self.page, self.answer)
        self.engine = engine
        self.depth = depth if drafts else 0

    @property
    def bodies(self) -> list[dict]:
        return [request.body for request in self.requests]

    def page(self, request):
        if request.path != "/metrics":
            return pages(PAGES[self.engine])(request)
        count = 3 * len(self.requests)
        said = COUNTERS.format(count, count, self.depth * count)
        request.send(said.encode() if self.depth else b"vllm:prompt_tokens_total 5.0")

    def answer(self, request):
        prompt = request.body.get("prompt") or request.body["input_ids"]
        said = list(events(self.engine, [(sum(prompt) + i) % 50 for i in range(NUM_TOKENS)], self.depth))
        request.send("".join(f"data: {json.dumps(event)}\n\n" for event in said).encode() + b"data: [DONE]\n\n")


@pytest.fixture
def start():
    running = []

    def make(engine: str, **options) -> Fake:
        running.append(Fake(engine, **options))
        return running[-1]

    yield make
    for server in running:
        server.close()


@pytest.fixture
def pair(start):
    """A server with a drafter and one without."""
    return lambda engine="vllm": (start(engine, drafts=True), start(engine))


CHAT = ChatTokenizer("target", make_tokenizer())


@pytest.fixture
def measure(tmp_path):
    """The rows of servers."""

    def rows(drafter: Fake, plain: Fake | None, prompts, config=GREEDY):
        asked = replace(config, server=(drafter.url,), plain_server=plain and plain.url)
        return bench_servers(CHAT, prompts, asked, tmp_path).rows

    return rows


@pytest.mark.parametrize("engine", PAGES)
def test_every_dialect_gives_the_same_numbers(engine, pair, measure, tmp_path):
    """Pooled accepted lengths 2, 0, 1: tau is 2, whoever reports it and however. Each prompt has a seed of its own."""
    drafter, plain = pair(engine)
    (row,) = measure(drafter, plain, PROMPTS[:3])
    assert row.tau[0] == 2.0 and row.num_verifications == 3 * len(ACCEPTED)
    assert row.num_drafted == (None if engine == "sglang" else 3 * row.num_verifications)
    assert row.num_same_text == row.control_same_text == row.num_responses == 3
    expected = [(encode_chat(CHAT, prompt.turns[0]), 7 + i) for i, prompt in enumerate(PROMPTS[:3])]
    for server, num_passes in ((drafter, 1), (plain, 2)):
        sent = server.bodies[1:]  # the first is a warm-up
        seeds = [body.get("seed") or body["sampling_params"]["sampling_seed"] for body in sent]
        asked = [body.get("prompt") or body["input_ids"] for body in sent]
        assert sorted(zip(asked, seeds, strict=True)) == sorted(num_passes * expected)
        if engine in SALTS:  # no prompt is in a server's cache, also not the second time
            assert len({body[SALTS[engine]] for body in sent}) == len(sent)
        else:
            assert not any(body["cache_prompt"] for body in sent)
    results = read_results(tmp_path / "servers.json")
    assert results.rows == [row] and results.seed == 7
    shown = servers(results).rows[0]
    assert shown["tau [95 %]"] == "2.00" and shown["same text (control)"] == "3/3 (3)"


def test_later_turns_see_earlier_answers_and_are_drawn_with_their_prompt(pair, measure):
    """Of four prompts, six requests are no six prompts: there is no interval."""
    drafter, plain = pair()
    prompts = [replace(prompt, turns=prompt.turns * (1 + i % 2)) for i, prompt in enumerate(PROMPTS[:4])]
    (row,) = measure(drafter, plain, prompts)
    assert row.num_same_text == row.control_same_text == row.num_responses == 6
    assert row.tau == (2.0, None, None)
    ours, theirs = ([body["prompt"] for body in server.bodies[1:]] for server in (drafter, plain))
    assert theirs == [token_ids for token_ids in ours for _ in range(2)]
    assert len(ours[2]) > len(ours[1]) + NUM_TOKENS


def test_an_interrupted_call_goes_on_and_a_finished_one_asks_nothing(pair, measure, tmp_path):
    drafter, plain = pair("llama.cpp")
    config = replace(GREEDY, temperatures=(0.0, 1.0))
    measure(drafter, plain, PROMPTS[:3], config)
    (path,) = tmp_path.glob("servers-*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:20])  # killed while it wrote
    count = len(drafter.bodies)
    again = measure(drafter, plain, PROMPTS[:3], config)
    assert len(drafter.bodies) == count + 3  # a warm-up and the two that were lost
    assert [(row.num_responses, row.num_verifications) for row in again] == [(3, 9), (3, 9)]
    measure(drafter, plain, PROMPTS[:3], config)
    assert len(drafter.bodies) == count + 3


@pytest.mark.parametrize(("drafts", "tau", "verdict"), [(False, None, "not known"), (True, 2.0, "no tau here")])
def test_one_server_has_no_texts_to_compare_and_no_tau_unless_it_drafts(drafts, tau, verdict, start, measure, tmp_path):
    """vLLM's counters tell what one prompt has added."""
    (row,) = measure(start("vllm", drafts=drafts), None, PROMPTS)
    assert row.tau[0] == tau
    assert row.num_same_text is row.control_same_text is row.plain_tokens_per_second is None
    assert row.tokens_per_second > 0
    (shown,) = servers(read_results(tmp_path / "servers.json")).rows
    assert shown["verdict"] == verdict and shown["same text (control)"] == "-"
    assert shown["tok/s (plain)"].endswith(" (-)")


@pytest.mark.parametrize(
    ("known", "events"),
    [
        (
            {"/api/version": {"version": "1"}, "/api/ps": {"models": [{"name": "m"}]}},
            [{"response": "w7"}, {"response": " w8", "done_reason": "length"}],
        ),
        (
            {"/v1/models": {"data": [{"id": "m"}]}},
            [{"choices": [{"text": "w7"}]}, {"choices": [{"text": " w8", "finish_reason": "length"}]}],
        ),
    ],
    ids=["ollama", "openai"],
)
def test_a_server_that_gives_text_alone_is_measured_by_speed_and_text(known, events, bench, run_line, tmp_path):
    """It gets the text of the prompt's tokens, and its answer has the tokens of the target's tokenizer."""
    mark = b"" if "/api/ps" in known else b"data: "
    answer = b"".join(mark + json.dumps(event).encode() + b"\n" for event in events)
    server = StubServer(pages(known), lambda request: request.send(answer))
    asked = f"{bench} --temperatures 0 --respond.max-new-tokens 12 --server {server.url}"
    printed, _ = run_line(f"{asked} --output {tmp_path} --plain-server {server.url}")
    (row,) = read_results(tmp_path / "servers.json").rows
    assert row.num_same_text == row.num_responses == 6 and row.tau[0] is None
    assert "tells no accepted drafts" in " ".join(printed.split())
    (path,) = tmp_path.glob("servers-*.jsonl")
    (turn,) = json.loads(path.read_text().splitlines()[-1])["turns"]
    assert turn[PLAIN]["token_ids"] == CHAT.tokenizer.encode("w7 w8")
    assert all(re.fullmatch(r"ask( w\d+)+ answer", request.body["prompt"]) for request in server.requests)
    known["/v1/models"] = known["/api/ps"] = {"data": [], "models": [{"name": "a"}, {"name": "b"}]}
    assert "expected 1: load it" in run_line(f"{asked} --output {tmp_path}/2", 1).err
    server.close()


def served(name: str, accepted: list[int], seconds: float, texts=([1, 2, 3],) * 3) -> ServedRecord:
    """A prompt with these accepted lengths, and the texts of the drafter's side and of both passes of the other."""
    answers = [ServedAnswer(token_ids=text, decode_seconds=seconds, counts=None) for text in texts]
    answers[0] = replace(answers[0], counts=Counts(len(accepted), sum(accepted)))
    turn = dict(zip((DRAFTER, PLAIN, CONTROL), answers, strict=True))
    return ServedRecord(set="s", id=name, temperature=0.0, turns=[turn])


def test_equal_texts_are_counted_beside_the_plain_servers_second_pass():
    texts = [1, 2], [1, 3], [1, 3]
    (row,) = make_rows([served(str(number), [1], 1.0, texts) for number in range(6)], {})
    assert (row.num_same_text, row.control_same_text) == (0, 6)


def test_the_table_judges_the_speed_beside_tau():
    """Of rates, also where nothing is known of tau here; without a plain server there is no verdict."""
    records = [served(str(number), [1, 0], 0.5) for number in range(8)]
    for record in records:
        record.turns[0][DRAFTER] = replace(record.turns[0][DRAFTER], decode_seconds=1.0)
    (row,) = make_rows(records, {})
    assert row.decode_speedup == pytest.approx((0.5,) * 3)
    shown = servers(make_servers(row, make_served())).rows
    assert [(cells["verdict"], cells["speed"]) for cells in shown] == [("no tau here", "slower"), ("not known", "-")]


def measured(*names: str) -> dict[tuple[float, str, str], list[int]]:
    """What this process emitted for prompts: four tokens in two verifications each."""
    return {(0.0, "s", name): [4, 2] for name in names}


def test_tau_here_is_that_of_the_prompts_that_both_have():
    records = [served(str(number), [1, 0], 0.5) for number in range(8)]
    (row,) = make_rows(records, measured(*"2345679", "other"))
    assert row.tau == (1.5, 1.5, 1.5) and row.tau_here == (2.0, 2.0, 2.0)
    assert row.tau_over_here == pytest.approx((-0.25,) * 3) and served_verdict(row) == "accepts less"
    (row,) = make_rows(records, measured("1", "2"))
    assert row.tau_here == (2.0, None, None) and served_verdict(row) == "too few prompts"
    for here in (measured("other"), {(1.0, "s", "1"): [4, 2]}, {(0.0, "t", "1"): [4, 2]}):
        (row,) = make_rows(records, here)
        assert row.tau_here == row.tau_over_here == (None, None, None) and served_verdict(row) == "no tau here"


def test_a_prompt_without_verifications_or_times_leaves_out_what_follows_from_them():
    (row,) = make_rows([served("0", [2, 0], 1.0), served("1", [], 3.0)], measured("0", "1"))
    assert row.tau[0] == 2.0 and row.num_verifications == 2 and row.tokens_per_second == 4 / 4
    (row,) = make_rows([served("0", [2, 0], 0.0)], {})
    assert row.tokens_per_second is None, "all tokens came at once"


def test_an_answer_without_drafts_counts_a_token_a_pass():
    """llama.cpp says nothing of drafts where there were none."""
    drafted = served("0", [2, 0], 1.0)
    (sides,) = drafted.turns
    plain = replace(drafted, id="1", turns=[{**sides, DRAFTER: sides[PLAIN]}])  # three tokens
    (row,) = make_rows([drafted, plain], {})
    assert (row.tau[0], row.num_verifications) == ((4 + 2) / 4, 4)
    (row,) = make_rows([plain], {})
    assert row.tau[0] is row.num_verifications is None, "nothing says that it drafts"


@pytest.fixture
def bench(language_folder, language_prompts, tmp_path) -> str:
    """The command for six held-out prompts."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", language_prompts[:4])
    heldout = write_prompts(tmp_path / "heldout.jsonl", language_prompts[50:56])
    return f"bench --target {language_folder} --prompts.path {prompts} --prompts.heldout-path {heldout}"


def test_the_verb_shows_tau_served_here_and_in_training(
    pair, bench, language_drafter_folder, run_line, tmp_path, monkeypatch
):
    """No proxy is asked, and the server's key is sent and not kept. Answers are as long as those of training."""
    out = tmp_path / "out"
    drafter = shutil.copytree(language_drafter_folder, out / "drafter")
    (drafter / "trainer_state.json").unlink()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("DPACE_API_KEY", "secret")
    server, plain = pair()
    common = f"{bench} --output {out} --temperatures 0 --respond.max-new-tokens 12"
    asked = f"{common} --server {server.url} --plain-server {plain.url}"

    def said(line: str) -> str:
        return " ".join("".join(run_line(line)).split())

    def reason(results) -> str:
        write_results(out / "results.json", results)
        return said(asked)

    first = said(asked)
    assert f"tau here is not known: {out}/results.json has no results of `dpace bench`; run" in first
    assert "tau in training, on validation responses: -" in first
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer secret"}
    assert not any("secret" in text for text in (first, *(path.read_text() for path in out.glob("servers*"))))
    log = [{"step": step, "eval_tau": tau} for step, tau in enumerate((1.25, 1.5, 1.4))]
    (drafter / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    said(f"{common} --widths full")
    number = len(server.bodies)
    again = said(asked)
    assert len(server.bodies) == number and "settings of this call" not in again, "its answers are kept"
    assert "not known" not in again and "tau in training, on validation responses: 1.50" in again
    here, found = read_results(out / "results.json"), read_results(out / "servers.json")
    (row,) = found.rows
    assert found.tau_in_training == 1.5 and row.tau_here == here.rows[0].tau
    assert row.tau_over_here[0] == pytest.approx(2.0 / row.tau_here[0] - 1)
    assert "was measured with max_new_tokens 7, not 12; give both" in reason(replace(here, max_new_tokens=7))
    assert "has whole drafts of 2 drafters" in reason(replace(here, rows=[*here.rows, make_row(drafter="b")]))
    assert "has no results of `dpace bench`" in reason(make_compare())


def test_what_a_server_calls_itself_is_a_text_without_its_key(start, bench, run_line, tmp_path, monkeypatch):
    monkeypatch.setenv("DPACE_API_KEY", "secret")
    server = start("llama.cpp")

    def page(request):
        said = ["\ud800", request.headers["Authorization"]]
        request.send({"model_alias": said, "build_info": said})

    server.get = page
    out = tmp_path / "out"
    printed = run_line(f"{bench} --output {out} --temperatures 0 --bench.max-new-tokens 12 --server {server.url}")
    printed += run_line(f"report {out}")
    shown = "".join([*printed, *(path.read_text() for path in out.iterdir())])
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--plain-server http://h:9", "--bench.server names 0 servers and --bench.depths 0 depths"),
        ("--verify-rules speculative --server http://127.0.0.1:9", "--bench.verify-rules is not read"),
        ("--server http://h:9 --depths 1 3", "names 1 servers and --bench.depths 2 depths; name one"),
        (
            "--server http://h:9 --depths 3@1.5",
            "bench.depths is '3@1.5', expected a valid integer or NUMBER@P with a p-min P below 1, or",
        ),
    ],
)
def test_the_verb_says_which_flags_want_the_server_or_are_not_for_it(flags, said, bench, run_line):
    assert said in run_line(f"{bench} {flags}", 1).err


def test_the_verb_compares_depths(start, bench, run_line, tmp_path):
    """A server for each; one that drafts more than was said is refused, unless n-grams draft too."""
    plain, *drafters = (start("llama.cpp", drafts=bool(depth), depth=depth) for depth in (0, 1, 3))
    urls = " ".join(server.url for server in drafters)
    command = f"{bench} --output {tmp_path} --temperatures 0 --respond.max-new-tokens 12 --plain-server {plain.url}"
    said = run_line(f"{command} --server {urls} --depths 3 1", 1).err
    assert f"{drafters[1].url} drafted 9 tokens in 3 verifications, expected at most 1 in each" in said
    printed, said = run_line(f"{command} --server {urls} --depths 1 1+ngram-simple")
    assert "tau here" not in printed + said and re.search(r"1\+ngram-simple .* 3\.00? ", printed), printed
    results = read_results(tmp_path / "servers.json")
    assert [(row.depth, row.num_drafted, row.num_responses) for row in results.rows] == [
        ("1", 18, 6),
        ("1+ngram-simple", 54, 6),
    ]
    assert results.hardware and results.drafter_sha256 is None
    best = depths_note(results.rows)
    assert f"best depth: {best}" in " ".join(printed.split()) and best.startswith("heldout (T=0) ")
    run_line(f"report {tmp_path}")
    assert f"best depth: {best}" in (tmp_path / "report.html").read_text()


def test_the_best_depth_is_the_fastest_that_is_clearly_faster():
    def rows(name: str, **speedups):
        return [make_served(set=name, depth=depth[1:], decode_speedup=ends) for depth, ends in speedups.items()]

    pays = rows("code", d1=(1.2, 1.1, 1.3), d3=(1.5, 0.9, 2.1), d7=(1.3, 1.2, 1.4))
    loses = rows("notes", d1=(0.9, 0.8, 0.95), d3=(1.1, 0.9, 1.3))
    assert depths_note(pays + loses) == "code (T=0) 7, 1.30 [1.20, 1.40] times as fast; notes (T=0) none: do not draft"
    assert depths_note(rows("few", d1=(1.5, None, None))) == "few (T=0) too few prompts"


@pytest.mark.parametrize(
    ("stop", "drafted", "expected"),
    [
        ("eos", 42, (6, 18)),  # the last draft went on after the end
        ("eos", 35, (7, 17)),  # its last token was the end: no bonus token
        ("limit", 35, (6, 18)),
        ("eos", 33, (6, 18)),  # drafts of different lengths tell nothing
    ],
)
def test_llamacpp_verifications_without_a_bonus_token_are_counted(stop, drafted, expected):
    timings = {"predicted_n": 25, "draft_n": drafted, "draft_n_accepted": 18}
    counts = LlamacppServer(Address("http://x"), 50).read({"stop": True, "stop_type": stop, "timings": timings}).counts
    assert counts == Counts(*expected, drafted)
