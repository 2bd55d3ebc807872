"""Answers of running servers are those of this process, whatever the servers and the processes suffer."""

import threading
import time
from dataclasses import replace

import pytest

from dpace.config import RespondConfig
from dpace.decode.loop import generate_plain
from dpace.respond import from_servers
from dpace.respond.answering import write_responses
from dpace.respond.in_process import generate_responses
from dpace.respond.responses import read_meta, read_responses
from dpace.servers.transport import Address
from dpace.system.ledger import register_files
from dpace.target.chat import ChatTokenizer, encode_chat
from tests.support.files import make_prompts
from tests.support.models import EOS
from tests.support.stub_server import PAGES, StubServer, pages
from tests.unit.respond.test_responses import make_small

CONFIG = RespondConfig(max_new_tokens=8, batch_size=4, retry_seconds=20.0)
SEEDS = {"vllm": "seed", "llama.cpp": "seed", "sglang": "sampling_seed"}


PROMPTS = [
    replace(prompt, turns=prompt.turns * (1 + (i % 4 == 3)))
    for i, prompt in enumerate(make_prompts(f"w{i} w{(7 * i) % 50}" for i in range(10)))
]
"""Every fourth has two turns."""


class Stub(StubServer):
    """Answers in one engine's words with what the target itself says; `fault` gives the reply of a failing request."""

    model = threading.Lock()  # of all stubs: they have one model

    def __init__(self, target, engine="llama.cpp", fault=lambda *_: None, *, rush=None):
        super().__init__(pages(PAGES[engine]), self.answer)
        self.target, self.engine = target, engine
        self.fault, self.rush = fault, rush

    def answer(self, request):
        body = request.body
        prompt = body.get("prompt") or body["input_ids"]
        sampling = body.get("sampling_params", body)
        length = sampling.get("max_tokens") or sampling.get("max_new_tokens") or sampling["n_predict"]
        with self.lock:
            fault = self.fault(prompt, length)
        if self.rush and length > 1:
            self.rush.wait(5)  # until as many requests are here
        if fault:
            return request.send(*fault)
        with self.model:
            config = replace(CONFIG, max_new_tokens=length, temperature=sampling["temperature"])
            (tokens,) = generate_responses(self.target, [prompt], config, [sampling[SEEDS[self.engine]]])
        request.send(self.words(tokens))

    def shown(self, tokens):
        return tokens

    def words(self, tokens):
        reason = "stop" if tokens[-1] == EOS else "length"
        shown = self.shown(tokens)
        if self.engine == "vllm":
            choice = {"token_ids": shown, "finish_reason": reason, "stop_reason": None}
            return {"model": "m", "choices": [choice], "usage": {"completion_tokens": len(tokens)}}
        if self.engine == "sglang":
            meta = {"completion_tokens": len(tokens), "finish_reason": {"type": reason, "matched": EOS}}
            return {"output_ids": shown, "meta_info": meta}
        kind = {"stop": "eos", "length": "limit"}[reason]
        return {"tokens": shown, "stop": True, "stop_type": kind, "tokens_predicted": len(tokens)}


@pytest.fixture(scope="module")
def target():
    return make_small(seed=3)


@pytest.fixture
def answer(target, tmp_path):
    """Let servers answer; the target here has no weights."""
    chat = ChatTokenizer("", target.tokenizer, stop_token_ids=[EOS], context=64)

    def answer(*stubs, prompts=PROMPTS, name="r", **options):
        config = replace(CONFIG, server=tuple(stub.url for stub in stubs), **options)
        return write_responses(chat, prompts, tmp_path / f"{name}.jsonl", config)

    return answer


@pytest.fixture
def start(target, monkeypatch):
    monkeypatch.setattr(from_servers, "FIRST_WAIT", 0.01)
    running = []

    def make(*args, **options) -> Stub:
        running.append(Stub(target, *args, **options))
        return running[-1]

    yield make
    for stub in running:
        stub.close()


@pytest.fixture(scope="module")
def own(target, tmp_path_factory):
    """The answers of this process, by temperature; some of them end early."""
    folder = tmp_path_factory.mktemp("own")
    found = {}
    for temperature in (0.0, 1.0):
        config = replace(CONFIG, temperature=temperature)
        found[temperature] = write_responses(target, PROMPTS, folder / f"{temperature}" / "responses.jsonl", config)
    assert {one.token_ids[-1] == EOS for responses in found.values() for one in responses} == {False, True}
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_plain_decoding_with_the_prompts_seed(temperature, target, own):
    """So they do not depend on the batch."""
    seeds = []
    for response, prompt in zip(own[temperature], PROMPTS, strict=True):
        assert response.token_ids[: response.response_spans[0][0]] == encode_chat(target, prompt.turns[0])
        assert [m["role"] for m in response.messages] == ["user", "assistant"] * len(prompt.turns)
        conversation = from_servers.Conversation(target, prompt, CONFIG)
        for start, end in response.response_spans:
            seeds.append(conversation.seed)
            options = {"max_new_tokens": 8, "temperature": temperature, "seed": seeds[-1]}
            expected = generate_plain(target, response.token_ids[:start], **options).token_ids
            assert response.token_ids[start:end] == expected
            conversation.num_answers += 1
    assert len(set(seeds)) == len(seeds) == sum(len(prompt.turns) for prompt in PROMPTS)


@pytest.mark.parametrize("engine", PAGES)
def test_servers_give_what_this_process_gives(engine, start, answer, own, tmp_path):
    """Also sampled, since each prompt has its seed; several servers share the prompts, and none is asked twice."""
    stubs = [start(engine), start(engine)]
    assert answer(*stubs, temperature=1.0) == own[1.0]
    counts = [len(stub.requests) for stub in stubs]
    assert min(counts) > 1
    assert answer(*stubs, temperature=1.0) == own[1.0]
    assert counts == [len(stub.requests) for stub in stubs]
    meta = read_meta(tmp_path / "r.jsonl")
    assert meta["source"] == "servers" and meta["servers"] == [engine] and meta["complete"]


@pytest.mark.parametrize("engine", PAGES)
def test_a_stop_token_may_be_named_and_other_tokens_may_not_be_missing(engine, start, answer, own, capsys):
    stub = start(engine)
    stub.shown = lambda tokens: [token for token in tokens if token != EOS]
    assert answer(stub) == own[0.0]
    lacking = own[0.0][2].token_ids[own[0.0][2].response_spans[0][0] :]
    stub.shown = lambda tokens: [] if tokens == lacking else tokens
    assert answer(stub, name="two") == [one for one in own[0.0] if one.id != "2"]
    assert "prompt 2 is left out: given without its tokens" in capsys.readouterr().err


def test_requests_at_once_are_bounded_by_the_batch_size(start, answer):
    stub = start(rush=threading.Barrier(4))
    prompts = [prompt for prompt in PROMPTS if len(prompt.turns) == 1]
    assert len(answer(stub, prompts=prompts)) == len(prompts) == 8
    assert stub.most_running == 4


def test_a_server_that_is_busy_is_asked_again(start, answer, own):
    cut = ({}, 200, {"Content-Length": "99"})
    faults = iter([None, *(({}, status) for status in (429, 503, 500, 502)), cut])
    stub = start(fault=lambda *_: next(faults, None))
    assert answer(stub, batch_size=1) == own[0.0]
    assert next(faults, None) is None


def test_the_time_to_ask_again_begins_with_the_failure(start, answer, own):
    """A request may take longer before it breaks off, once."""
    stub = start()
    stub.fault = lambda *_: time.sleep(0.4) or ({}, 503) if len(stub.requests) == 1 else None
    assert answer(stub, batch_size=1, retry_seconds=0.3) == own[0.0]


def test_a_server_that_dies_leaves_its_prompts_to_the_others(start, answer, own):
    dying = start()
    dying.fault = lambda *_: len(dying.requests) > 2 and ({}, 503) or None
    assert answer(dying, start("vllm"), retry_seconds=0.1) == own[0.0]


def test_without_any_server_the_call_ends_and_the_same_call_goes_on(start, answer, own, tmp_path):
    stub, path = start(), tmp_path / "r.jsonl"
    stub.fault = lambda *_: len(stub.requests) > 5 and ({}, 503) or None
    with pytest.raises(ValueError, match=r"refuses \(503\).*asked again for 0.1 seconds; finished answers are kept"):
        answer(stub, retry_seconds=0.1)
    assert 0 < len(read_responses(path)) < len(PROMPTS) and read_meta(path)["complete"] is False
    assert answer(start("sglang")) == own[0.0]


@pytest.mark.parametrize("status", [400, 500])
def test_a_prompt_that_a_server_cannot_answer_is_left_out(status, start, answer, own, capsys):
    bad = own[0.0][4].token_ids[: own[0.0][4].response_spans[0][0]]
    stub = start(fault=lambda prompt, _: ({"error": "too odd"}, status) if prompt == bad else None)
    options = {"retry_seconds": 0.3, "batch_size": 1}
    found = answer(stub, **options)
    assert found == [one for one in own[0.0] if one.id != "4"]
    assert f"prompt 4 is left out: {stub.url}/completion refuses ({status}): " in capsys.readouterr().err
    assert answer(stub, **options) == found, "where it is the only one left, too"
    stub.fault = lambda *_: None
    assert answer(stub) == own[0.0], "the same call asks it again"


def test_answers_that_are_cut_or_end_elsewhere_are_left_out(start, answer):
    stub = start("sglang")
    for num_told, reason, said in (
        (1, {"type": "length"}, "no prompt was answered: cut by the server"),
        (1, {"type": "stop", "matched": 5}, "not known to be a stop token"),
        (2, {"type": "stop", "matched": 5}, "not known to be a stop token"),  # the second one would be the target's
    ):
        meta = {"completion_tokens": num_told, "finish_reason": reason}
        stub.words = lambda _, meta=meta: {"output_ids": [5], "meta_info": meta}
        with pytest.raises(ValueError, match=said):
            answer(stub, prompts=PROMPTS[:2])


def test_the_key_is_sent_and_is_neither_shown_nor_kept(start, answer, tmp_path, monkeypatch, capsys):
    """Also where a server repeats it."""
    key = "sk-verysecretkey123"
    monkeypatch.setenv("DPACE_API_KEY", key)
    stub = start(fault=lambda prompt, _: (f"{'x ' * 140}{key}", 400) if prompt == [4, 8, 20, 5] else None)
    monkeypatch.setitem(PAGES["llama.cpp"], "/props", {"model_alias": f"m {key}"})
    assert len(answer(stub)) == len(PROMPTS) - 1
    assert {request.headers.get("Authorization") for request in stub.requests} == {f"Bearer {key}"}
    shown = "".join(path.read_text() for path in tmp_path.iterdir()) + capsys.readouterr().err
    assert "***" in shown and "sk-" not in shown
    stub.fault = lambda *_: (key, 401)
    with pytest.raises(ValueError, match=r'refuses \(401\): "\*\*\*"; set DPACE_API_KEY'):
        answer(stub)
    monkeypatch.setenv("DPACE_API_KEY", f"{key}\nX: y")
    with pytest.raises(ValueError, match="DPACE_API_KEY has characters that no key has; set it to the key alone$"):
        Address("http://x")


def test_what_killed_ranks_left_is_collected_once(target, own, tmp_path):
    """Files of three ranks, of which one was appended already and one ends with a torn line."""
    path = tmp_path / "responses.jsonl"
    write_responses(target, PROMPTS, path, CONFIG)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    for rank, text in enumerate(["".join(lines[2:4]), "".join(lines[4:6]) + lines[6][:30], "".join(lines[6:8])]):
        register_files(tmp_path, f"responses.rank-{rank}.jsonl")
        (tmp_path / f"responses.rank-{rank}.jsonl").write_text(text)
    (tmp_path / "responses.rank-mine.jsonl").write_text("of somebody else")
    assert write_responses(target, PROMPTS, path, CONFIG) == own[0.0]
    assert [file.name for file in tmp_path.glob("*rank*")] == ["responses.rank-mine.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": []}', '{"id": "0"}'])
def test_lines_of_ranks_are_not_trusted(line, target, tmp_path):
    """They are checked before anything is merged."""
    path = tmp_path / "responses.jsonl"
    write_responses(target, PROMPTS[:1], path, CONFIG)
    register_files(tmp_path, "responses.rank-0.jsonl")
    (tmp_path / "responses.rank-0.jsonl").write_text(f"{line}\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"responses.rank-0.jsonl:1: .*; "):
        write_responses(target, PROMPTS, path, CONFIG)
    assert path.read_bytes() == before
