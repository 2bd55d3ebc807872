"""Plain decoding with compiled steps as a second baseline; what is compiled is in test_batch.py and tests/gpu."""

from dataclasses import replace

import pytest
import torch

from dpace.config import BenchConfig
from dpace.decode import Decoder, generate_plain
from dpace.measure.benchmark import bench, decode_compiled
from dpace.measure.results import CompiledBaseline, read_results
from dpace.report.sections import speeds
from tests.support.files import make_prompts
from tests.support.models import make_drafter, make_target, make_tokenizer
from tests.support.rows import make_bench, make_row

PROMPTS = make_prompts(f"w{i} w51" for i in range(3))
CONFIG = BenchConfig(max_new_tokens=12, temperatures=(0.0, 1.0), widths=("full",), compiled="always")


@pytest.fixture
def target():
    target = make_target("qwen3", max_position_embeddings=512, num_hidden_layers=3)
    target.tokenizer = make_tokenizer()
    return target


@pytest.fixture
def drafters(target):
    return {"d": make_drafter(target, num_features=1)}


@pytest.fixture
def lengths(monkeypatch):
    """Nothing is compiled; the longest lengths that were asked for are."""
    found = []
    generate = Decoder.generate

    def counted(self, token_ids, **options):
        assert self.compile
        found.append(options["max_new_tokens"])
        return generate(self, token_ids, **options)

    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    monkeypatch.setattr(Decoder, "generate", counted)
    return found


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_it_is_measured_on_an_accelerator_or_where_asked_for(choice, target, drafters, tmp_path):
    config = replace(CONFIG, temperatures=(0.0,), compiled=choice)
    (row,) = bench(target, drafters, PROMPTS[:1], config, tmp_path).rows
    assert row.compiled is None


def test_both_baselines_are_in_the_results(target, drafters, lengths, tmp_path, capsys):
    """Same texts, no drafter among the rows, nothing decoded twice."""
    results = bench(target, drafters, PROMPTS, CONFIG, tmp_path)
    assert [row.drafter for row in results.rows] == ["d", "d"]
    assert "compiling the steps of plain decoding" in capsys.readouterr().err
    for row in results.rows:
        assert row.compiled and row.compiled.num_same_text == row.num_responses == 3
        assert row.compiled.decode_speedup[0] == pytest.approx(row.tokens_per_second / row.compiled.tokens_per_second)
    assert read_results(tmp_path / "results.json") == results
    again = bench(target, drafters, PROMPTS, CONFIG, tmp_path)
    assert lengths == [8, 12] * (1 + 2 * 3), "one to compile, one for each prompt, and none again"
    assert again.rows[0].compiled == results.rows[0].compiled


def test_a_longer_text_gets_longer_caches_before_it_is_timed(target, lengths):
    """By its first tokens."""
    decoder = Decoder(target, None, compile=True)
    for length, text in ((12, [5, 6, 7]), (270, [5, 6, 7]), (5, [9] * 300)):
        options = {"max_new_tokens": length, "stop_token_ids": []}
        assert decode_compiled(decoder, text, **options).token_ids == generate_plain(target, text, **options).token_ids
    assert lengths == [8, 12, 8, 270, 5, 5] and decoder.columns == 512


def test_what_a_failed_call_leaves_is_not_read(target, lengths, monkeypatch):
    decoder = Decoder(target, None, compile=True)
    options = {"max_new_tokens": 40, "stop_token_ids": []}
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(target, "read", raise_out_of_memory)
        decoder.generate([5, 6], **options)
    text = list(range(28))
    assert decoder.generate(text, **options).token_ids == generate_plain(target, text, **options).token_ids


def raise_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError


def test_where_it_cannot_be_compiled_it_is_left_out(target, drafters, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nis here")

    monkeypatch.setattr(Decoder, "generate", fail)
    results = bench(target, drafters, PROMPTS, CONFIG, tmp_path)
    assert all(row.compiled is None for row in results.rows)
    assert "left out: no compiler is here\n" in capsys.readouterr().err


def test_tables_name_it_where_it_was_measured():
    found = CompiledBaseline(tokens_per_second=3.0, decode_speedup=(1.33, None, None), num_same_text=1)
    shown = speeds(make_bench(make_row(compiled=found), make_row()))
    assert shown.note.endswith("plain decoding with compiled steps: s dpace full 0: 1.33")
    assert "compiled" not in speeds(make_bench()).note
