"""`dpace bench --server` against the engines' own servers: what they report over HTTP is what our decoding counts."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import tenacity
from llamacpp import serving

from dpace.config import BenchConfig, ExportConfig, RespondConfig
from dpace.measure.results import ServerRow, read_results
from dpace.measure.servers import bench_servers
from dpace.metrics import Acceptance
from dpace.prompts.prompts import Prompt
from dpace.publish.export import export
from dpace.respond.answering import write_responses
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, encode_chat
from tests.integration.test_engines import python_of
from tests.support.files import make_prompts, write_prompts
from tests.support.models import decode_whole, make_target, make_tokenizer, write_target_gguf

ASKED = {"speculative.n_max": 1, "speculative.p_min": 0.99}
"""Fields of a request that llama.cpp's documentation has, and that b11549 does not read."""


@contextmanager
def vllm(python: str, target: str, drafter: Path, num_draft_tokens: int) -> Iterator[str]:
    """The address of vLLM's server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    speculative = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": num_draft_tokens}
    options = f"--model {target} --port {port} --dtype float32 --max-model-len 256 --max-num-seqs 2 --enforce-eager"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *options.split()]
    command += ["--speculative-config", json.dumps(speculative)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    ask = tenacity.Retrying(wait=tenacity.wait_fixed(1), stop=tenacity.stop_after_delay(600))
    with subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True) as process:
        try:
            ask(lambda: process.poll() is not None or httpx.get(f"{address}/health", timeout=2).raise_for_status())
            assert process.poll() is None, "vLLM ended; its log is above"
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def measure(
    target: Target, prompts: list[Prompt], address: str, plain: str | None, folder: Path, count: int
) -> ServerRow:
    """The row of a server with a drafter; all prompts in one."""
    prompts = [replace(prompt, set="all") for prompt in prompts]
    config = BenchConfig(temperatures=(0.0,), max_new_tokens=count, server=(address,), plain_server=plain)
    (row,) = bench_servers(ChatTokenizer("target", target.tokenizer), prompts, config, folder).rows
    return row


def answers(folder: Path) -> list[dict]:
    """What the server with a drafter answered to each prompt's first turn."""
    records = [json.loads(line) for line in next(folder.glob("servers-*.jsonl")).read_text().splitlines()[1:]]
    return [record["turns"][0]["drafter"] for record in records]


@pytest.mark.parametrize("engine", ["llama.cpp", pytest.param("vllm", marks=pytest.mark.slow)])
def test_servers_report_what_we_count(
    engine,
    language_target,
    language_folder,
    language_drafter_folder,
    language_drafter,
    language_prompts,
    target_gguf,
    tmp_path,
):
    prompts = make_prompts(language_prompts[50:56])
    if engine == "vllm":
        served = vllm(python_of("vllm"), str(language_folder), language_drafter_folder, 5)
        with served as address:
            row = measure(language_target, prompts, address, None, tmp_path, 40)
    else:
        names = {"drafter": "x", "target": "x", "output": str(tmp_path / "gguf"), "target_gguf": str(target_gguf)}
        drafter = str(export(language_drafter_folder, language_target, ExportConfig(to="gguf", **names)))
        served = serving(target_gguf, drafter=drafter, num_draft_tokens=5)
        with served as address, serving(target_gguf) as plain:
            row = measure(language_target, prompts, address, plain, tmp_path, 40)
        assert row.num_same_text == row.control_same_text == row.num_responses == 6
    encoded = [encode_chat(language_target, prompt.turns[0]) for prompt in prompts]
    ours = decode_whole(language_target, language_drafter, encoded, max_new_tokens=40)
    assert any(out.accepted_lengths[-1] == out.emitted_lengths[-1] for out in ours)  # the text ends inside a draft
    assert [answer["token_ids"] for answer in answers(tmp_path)] == [out.token_ids for out in ours]
    # llama.cpp's weights have 16 bits, so a near tie may end another way: one verification more or less for a prompt.
    counts = [answer["counts"]["num_verifications"] for answer in answers(tmp_path)]
    assert all(abs(count - len(out.widths)) <= 1 for count, out in zip(counts, ours, strict=True))
    assert row.num_verifications == sum(counts)
    assert row.tau[0] == pytest.approx(Acceptance.pooled([out.acceptance for out in ours]).tau, rel=0.05)


def test_llamacpp_drafts_as_many_tokens_as_its_server_was_started_with(
    language_folder, random_drafter_gguf, language_prompts, target_gguf, run_line, tmp_path
):
    """And as many as no request asks for."""
    drafter = tmp_path / "drafter.gguf"
    drafter.write_bytes(random_drafter_gguf)
    prompts = write_prompts(tmp_path / "prompts.jsonl", language_prompts[:4])
    heldout = write_prompts(tmp_path / "heldout.jsonl", language_prompts[50:52])
    command = f"bench --target {language_folder} --prompts.path {prompts} --prompts.heldout-path {heldout}"
    command += f" --output {tmp_path / 'out'} --temperatures 0 --bench.max-new-tokens 24"
    options = {"drafter": str(drafter)}
    with (
        serving(target_gguf) as plain,
        serving(target_gguf, num_draft_tokens=1, **options) as one,
        serving(target_gguf, num_draft_tokens=4, **options) as four,
    ):
        command += f" --plain-server {plain} --server {one} {four}"
        assert f"{four} drafted" in run_line(f"{command} --depths 4 1", 1).err
        run_line(f"{command} --depths 1 4")
        body = {"prompt": [5, 6, 7], "n_predict": 16, "temperature": 0, "cache_prompt": False}
        asked = [httpx.post(f"{four}/completion", json=body | more).json()["timings"] for more in ({}, ASKED)]
    drafted = [row.num_drafted / row.num_verifications for row in read_results(tmp_path / "out" / "servers.json").rows]
    assert drafted[0] <= 1 and 2 < drafted[1] <= 4
    assert asked[0]["draft_n"] == asked[1]["draft_n"] > 0


def test_llamacpp_answers_as_this_process_does(tmp_path):
    """A target with random weights, whose texts a small error would change; in fp32, with keys and values in f32."""
    target = make_target("qwen3")
    target.tokenizer = make_tokenizer()
    texts = [f"w{i} w{7 * i % 50}" for i in range(12)]
    prompts = [Prompt(text, "s", [[{"role": "user", "content": text}]] * (1 + i % 2)) for i, text in enumerate(texts)]
    config = RespondConfig(max_new_tokens=24, batch_size=4)
    own = write_responses(target, prompts, tmp_path / "here" / "responses.jsonl", config)
    with serving(write_target_gguf(target, tmp_path / "target.gguf"), is_exact=True) as address:
        path = tmp_path / "there" / "responses.jsonl"
        assert write_responses(target, prompts, path, replace(config, server=(address,))) == own
