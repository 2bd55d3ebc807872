"""`dpace serve`: texts, streams, waiting, refusals and ends, over HTTP on this machine."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import psutil
import pytest
import tenacity
import uvicorn

from dpace.config import RespondConfig
from dpace.decode import Decoder, generate_plain
from dpace.measure.results import read_results
from dpace.metrics import LEAST_TAU
from dpace.recipes import RECIPES
from dpace.respond.responses import read_responses
from dpace.serving import service
from dpace.serving.learner import Learner, find_taken, read_rounds
from dpace.system.ledger import read_jsonl
from dpace.target.chat import encode_chat
from dpace.verbs.serve import ServeConfig, make_learner
from tests.support.files import write_prompts

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "w3 w51"}], "max_tokens": 24, "temperature": 0}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def serve(language_target, language_drafter):
    """Start a server in this process, and give a client of it."""
    started = []

    def start(drafter=language_drafter, max_waiting: int = 32, api_key: str = "", learner=None) -> httpx.Client:
        app = service.Service(lambda: Decoder(language_target, drafter), max_waiting, api_key)
        app.learner = learner
        server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="critical", lifespan="off"))
        client = httpx.Client(base_url=f"http://127.0.0.1:{server.config.port}", timeout=60)
        thread = threading.Thread(target=server.run)
        started.append((client, server, thread))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        return client

    yield start
    for client, server, thread in started:
        client.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def learn(serve, language_folder, language_target, tmp_path, monkeypatch):
    """Start a server that learns in the folder `kept`, with a short recipe; give a client and the service."""
    recipe = tmp_path / "laptop.yaml"
    recipe.write_text(
        "drafter: {num_layers: 1, block_size: 4, causal: true, selector: markov_head, selector_width: 8}\n"
        "train: {learning_rate: 0.01, batch_size: 8, num_anchors: 16}\n"
        "bench: {temperatures: [0.0], widths: [auto], max_new_tokens: 8, num_prompts: 2}\n"
    )
    monkeypatch.setitem(RECIPES, "laptop", recipe)
    learners = []

    def start(**options) -> tuple[httpx.Client, Learner]:
        config = ServeConfig(target=str(language_folder), learn=str(tmp_path / "kept"), **options)
        learners.append(make_learner(config, language_target))
        return serve(None, learner=learners[-1]), learners[-1]

    yield start
    for started in learners:
        started.close()


@pytest.fixture
def slow(monkeypatch):
    """Steps that take a while; gives a list that grows by each."""
    taken = []
    decode = service.stream

    def stream(*args, **options):
        for piece in decode(*args, **options):
            taken.append(piece)
            time.sleep(0.05)
            yield piece

    monkeypatch.setattr(service, "stream", stream)
    return taken


def read(response: httpx.Response) -> tuple[str, list[int], str]:
    """Text, tokens and end of an answer in one piece, or of a stream, which ends as OpenAI's do."""
    lines = response.raise_for_status().text.replace("data: ", "").split("\n\n")
    assert lines[1:][-2:] in ([], ["[DONE]", ""])
    choices = [json.loads(line)["choices"][0] for line in lines[:-2] or lines]
    parts = [choice.get("delta") or choice.get("message") or {"content": choice["text"]} for choice in choices]
    assert not any("role" in part for part in parts[1:])
    tokens = [token for choice in choices for token in choice["token_ids"]]
    return "".join(part["content"] for part in parts), tokens, choices[-1]["finish_reason"]


@pytest.mark.parametrize("is_drafter", [True, False])
def test_eight_clients_at_once_get_the_text_of_plain_decoding(serve, language_target, language_drafter, is_drafter):
    """Greedy and with a seed, whole and in events, from messages, text and tokens; none lost or mixed."""
    client = serve(language_drafter if is_drafter else None)

    def ask(number: int) -> int:
        messages = [{"role": "user", "content": f"w{number} w{51 + number % 3}"}]
        token_ids = encode_chat(language_target, messages)
        options = {"temperature": number % 2, "seed": number}
        tokens = generate_plain(language_target, token_ids, max_new_tokens=24, **options).token_ids
        prompt = token_ids if number % 4 else language_target.tokenizer.decode(token_ids)
        body = {**options, "max_tokens": 24, "stream": number % 5 < 2}
        body |= {"messages": messages} if number % 3 else {"prompt": prompt}
        response = client.post(CHAT if number % 3 else TEXT, json=body)
        text = language_target.tokenizer.decode(tokens, skip_special_tokens=True)
        assert read(response) == (text, tokens, "stop" if tokens[-1] == 1 else "length")
        return int(response.headers["x-dpace-waiting"])

    with ThreadPoolExecutor(8) as pool:
        assert 1 <= max(pool.map(ask, range(24))) < 8


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_stop_text_ends_the_answer_before_it(serve, is_streamed):
    """Also where it begins in one piece and ends in another, and of two the first."""
    client = serve()
    whole = read(client.post(CHAT, json=ASK))[0]
    stop = whole[len(whole) // 2 :][:5]
    text, _, end = read(client.post(CHAT, json=ASK | {"stop": [whole[-3:], stop], "stream": is_streamed}))
    assert text == whole[: whole.index(stop)] and end == "stop"


def test_a_client_that_leaves_frees_the_machine(serve, slow):
    """In the middle of a stream, and while it waits for a whole answer."""
    client = serve(None)
    with client.stream("POST", CHAT, json=ASK | {"stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=ASK, timeout=0.2)
    time.sleep(0.2)
    taken = len(slow)
    time.sleep(0.2)
    assert 0 < taken == len(slow) and client.post(CHAT, json=ASK).headers["x-dpace-waiting"] == "0"


def test_more_than_may_wait_are_refused(serve, slow):
    client = serve(max_waiting=1)
    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(lambda _: client.post(CHAT, json=ASK).status_code, range(3))) == [200, 200, 429]


REFUSED = {
    "[]": "an object",
    '{"messages": 5}': "`messages` is 5, expected a list",
    '{"prompt": [64]}': "has the token 64",
    '{"prompt": "w1", "max_tokens": 256}': "prompt of 1 tokens the text may have 257, over .* 256",
    '{"max_tokens": 0}': "max_tokens is 0, expected greater",
    '{"n": 2}': "n is 2, expected 1",
    '{"logit_bias": {"5": 1}}': "logit_bias is 1",
    '{"bset_of": 1}': "no key 'bset_of'",
}


def test_what_cannot_be_done_is_refused_with_the_reason(serve):
    """And what would change nothing is taken; a page is only for those with the key."""
    client = serve(api_key="key")
    assert client.get("/health").status_code == 200 and client.get("/metrics").status_code == 401
    client.headers["Authorization"] = "Bearer key"
    assert client.post("/load_model").status_code == 404
    assert client.post(TEXT, content=b" " * (service.MAX_BYTES + 1)).status_code == 413
    for body, reason in REFUSED.items():
        response = client.post(TEXT, content=body)
        assert response.status_code == 400 and re.search(reason, response.json()["error"]["message"])
    assert client.post(CHAT, json=ASK | {"n": 1, "logit_bias": {}, "presence_penalty": 0.0, "user": "me"}).is_success


def test_bench_measures_it_as_vllm(serve, language_folder, language_prompts, run_line, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", language_prompts[:20])
    command = f"bench --target {language_folder} --prompts.path {prompts} --output {tmp_path} --num-prompts 2"
    command += f" --bench.max-new-tokens 24 --server {serve().base_url} --plain-server {serve(None).base_url}"
    run_line(command)
    for row in read_results(tmp_path / "servers.json").rows:
        assert row.tau[0] > 1 and row.num_same_text == row.control_same_text == row.num_responses == 2


def test_sigterm_lets_answers_under_way_end(endless_folder):
    port = str(free_port())
    command = [sys.executable, "-m", "dpace.cli", "serve", "--target", str(endless_folder), "--port", port]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ThreadPoolExecutor(1) as pool:
        wait = tenacity.Retrying(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(120))
        wait(httpx.get, f"{address}/health")
        asked = pool.submit(httpx.post, address + CHAT, json=ASK | {"max_tokens": 240}, timeout=60)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert len(read(asked.result())[1]) == 240
        assert process.wait(60) == 143 and "Traceback" not in process.stderr.read()


def ask_all(client: httpx.Client, texts: list[str], **options) -> None:
    """Ask for greedy answers of at most 24 tokens."""
    for text in texts:
        body = ASK | {"messages": [{"role": "user", "content": text}]} | options
        client.post(CHAT, json=body).raise_for_status()


def wait_for(is_there) -> None:
    wait = tenacity.Retrying(retry=tenacity.retry_if_result(lambda found: not found))
    wait.copy(wait=tenacity.wait_fixed(0.02), stop=tenacity.stop_after_delay(120))(is_there)


def test_a_drafter_is_learned_from_what_was_asked(
    learn, language_folder, language_target, language_prompts, run_line, monkeypatch, capsys
):
    """It takes its place, texts stay, and the folder is one that other verbs take, as the page shows."""
    client, kept = learn()
    ask_all(client, language_prompts)
    wait_for(lambda: find_taken(kept.folder) and kept.process is None)
    assert "round-1: " in capsys.readouterr().err
    drafters = []
    decode = service.stream

    def stream(target, drafter, *args, **options):
        drafters.append(drafter)
        return decode(target, drafter, *args, **options)

    monkeypatch.setattr(service, "stream", stream)
    ask_all(client, ["w3 w51 w4"])
    answers = read_responses(kept.path)
    for response in [*answers[:8], answers[-1]]:
        [[start, _]] = response.response_spans
        prompt, tokens = response.token_ids[:start], response.token_ids[start:]
        assert generate_plain(language_target, prompt, max_new_tokens=24).token_ids == tokens
    assert len(drafters) == 1 and drafters[0] is not None
    metrics = dict(line.split() for line in client.get("/metrics").text.splitlines())
    assert metrics["dpace:answers_kept"] == str(len(answers)) and metrics["dpace:rounds_taken"] == "1"
    assert float(metrics["dpace:heldout_tau"]) > LEAST_TAU
    kept.close()
    run_line(f"bench {kept.folder}/recipe.yaml")
    run_line(f"train {kept.folder}/recipe.yaml")
    run_line(f"export {kept.folder}/round-1 --target {language_folder} --to vllm --output {kept.folder}-vllm")
    run_line(f"report {kept.folder}")


def test_what_is_kept(learn):
    """Whole answers to chats, once for each prompt, that were not asked to be forgotten; the oldest go first."""
    client, kept = learn()

    def asked() -> list[str]:
        return [row["messages"][0]["content"] for _, row in read_jsonl(kept.path)]

    ask_all(client, ["w3 w51", "w3 w51", "w7 w52"])
    ask_all(client, ["w4"], store=False)
    client.post(CHAT, json=ASK | {"messages": [{"role": "user", "content": "w5"}]}, headers={"store": "false"})
    client.post(TEXT, json={"prompt": "w6", "max_tokens": 8})
    begun = [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w53"}]
    assert client.post(CHAT, json=ASK | {"messages": begun}).is_success
    question = {"messages": [{"role": "user", "content": "w8 w52"}], "store": False}
    stop = read(client.post(CHAT, json=ASK | question))[0][2:5]
    ask_all(client, ["w8 w52"], stop=stop)
    assert asked() == ["w3 w51", "w7 w52"] and len(kept.heldout) == 2
    kept.max_bytes = kept.path.stat().st_size
    ask_all(client, ["w9 w53"])
    assert asked()[-1] == "w9 w53" and "w3 w51" not in asked() and len(kept.heldout) == len(asked())


def test_an_answer_without_room_is_given(learn, monkeypatch, capsys):
    """It is not kept, which is said, and no half of a line stays."""
    client, kept = learn()

    def fail(path, rows):
        path.write_bytes(path.read_bytes() + b"{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    ask_all(client, ["w3 w51"])
    with monkeypatch.context() as full:
        full.setattr("dpace.serving.learner.append_lines", fail)
        ask_all(client, ["w7 w52"])
    assert "not kept: OSError: [Errno 28]" in capsys.readouterr().err
    ask_all(client, ["w7 w52"])
    assert len(read_responses(kept.path)) == len(kept.heldout) == 2


def test_a_request_stops_the_round(learn, language_prompts, slow):
    """And at the end of the service it is lost, with nothing else; other answers do not come into the folder."""
    client, kept = learn()
    ask_all(client, language_prompts)
    assert kept.process
    process = psutil.Process(kept.process.pid)
    with client.stream("POST", CHAT, json=ASK | {"stream": True}) as response:
        next(response.iter_lines())
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
    wait_for(lambda: process.status() != psutil.STATUS_STOPPED)
    kept.close()
    assert not process.is_running() and len(read_responses(kept.path)) == 60 and not read_rounds(kept.folder)
    with pytest.raises(ValueError, match="was made by"):
        Learner(replace(kept.recipe, respond=RespondConfig()), 64, kept.target)


def test_a_drafter_that_is_not_better_is_not_taken(learn, language_prompts, language_drafter_folder):
    """One that did not learn is as good as the one that it started from."""
    RECIPES["laptop"].write_text("train: {max_steps: 1, learning_rate: 1.0e-12}")
    client, kept = learn(drafter=str(language_drafter_folder))
    ask_all(client, language_prompts)
    wait_for(lambda: read_rounds(kept.folder) and kept.process is None)
    [row] = read_rounds(kept.folder)
    assert row["tau"] == row["tau_before"] and find_taken(kept.folder) is None
    assert kept.recipe.drafter.init == str(language_drafter_folder) and not (kept.folder / "round-1").exists()


def test_the_end_of_a_server_that_learns(language_folder, language_prompts, tmp_path):
    """Nothing that was kept is lost, only the user can read it, no process stays, and the next start goes on."""
    kept, port = tmp_path / "kept", str(free_port())
    command = [sys.executable, "-m", "dpace.cli", "serve", "--target", str(language_folder), "--port", port]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    wait = tenacity.Retrying(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(120))
    for num_kept, number, code in ((40, signal.SIGKILL, -9), (41, signal.SIGTERM, 143)):
        with subprocess.Popen([*command, "--learn", str(kept)], stderr=subprocess.PIPE, text=True) as process:
            wait(client.get, "/health")
            ask_all(client, language_prompts[:num_kept])
            rounds = psutil.Process(process.pid).children()
            process.send_signal(number)
            assert process.wait(60) == code
            assert "Traceback" not in process.stderr.read()
        assert rounds and len(read_responses(kept / "responses.jsonl")) == num_kept
        psutil.wait_procs(rounds, 20)
        assert not any(learning.is_running() for learning in rounds)
    assert {path.stat().st_mode & 0o077 for path in [kept, *kept.rglob("*")]} == {0}
    client.close()


@pytest.mark.slow
def test_the_client_of_openai(serve):
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=f"{serve().base_url}/v1", api_key="any")
    options = {"model": client.models.list().data[0].id, **ASK}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = list(client.chat.completions.create(**options, stream=True))
    assert whole == "".join(part.choices[0].delta.content for part in parts) and parts[-1].usage.total_tokens > 24
    with pytest.raises(BadRequestError, match="n is 2"):
        client.chat.completions.create(**options, n=2)
    client.close()
