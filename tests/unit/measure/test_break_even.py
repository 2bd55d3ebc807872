"""The tau above which drafts pay: from responses, from timed steps, and from servers; on the page and the card."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from dpace.cli import main
from dpace.engines.card import card_sections, most_requests
from dpace.measure.break_even import context_of, find_break_even
from dpace.measure.results import BreakEven, PairedResponse, read_results
from dpace.report.cells import with_interval
from tests.support.files import write_prompts

PLAIN_SECONDS, STEP_SECONDS = 0.1, 0.25
"""Of a token and of a step with a draft: drafts pay from a tau of 2.5."""


def pair(number: int, tau: float, prompt_tokens: int = 100, verifications: int = 10, **changes) -> PairedResponse:
    tokens = round(tau * verifications)
    known = {"num_verifications": verifications, "plain_tokens": 40, "plain_seconds": 40 * PLAIN_SECONDS}
    return PairedResponse(
        id=str(number),
        prompt_tokens=prompt_tokens,
        decode_tokens=tokens,
        decode_seconds=verifications * STEP_SECONDS,
        **{**known, **changes},
    )


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0])
def test_it_is_the_ratio_of_a_step_to_a_token_whatever_is_accepted(tau):
    """With all drafts refused (a tau of 1) too, which is the method of vllm#54691; and the speedup is tau over it."""
    (found,) = find_break_even((("d", 0.0, 4), pair(n, tau)) for n in range(7))
    assert found.break_even == pytest.approx((2.5, 2.5, 2.5)) and found.tau == pytest.approx((tau, tau, tau))
    assert found.speedup == pytest.approx((tau / 2.5,) * 3) and (found.concurrency, found.drafter) == (4, "d")


def test_each_length_of_the_context_has_a_row_and_what_is_not_known_has_none():
    lengths = [100, 1023, 1024, 40_000]
    responses = [pair(n, 2.0, length) for n, length in enumerate(lengths)]
    found = list(find_break_even((("d", 0.0, 1), response) for response in responses))
    names = ["below 1k", "1k to 2k", "32k and more"]
    assert [context_of(row.prompt_tokens) for row in found] == names
    assert found[0].tau == (2.0, None, None), "two prompts have no interval"
    some = [responses[0], pair(9, 2.0, plain_tokens=None, plain_seconds=None)]
    assert not list(find_break_even((("d", 0.0, 1), response) for response in some))
    assert not list(find_break_even([(("d", 0.0, 1), pair(9, 2.0, num_verifications=None))]))


def test_an_answer_of_one_token_or_without_drafts_does_not_count():
    responses = [
        pair(0, 2.0),
        pair(1, 0.0, verifications=0, num_verifications=None),
        pair(2, 2, num_verifications=None),
    ]
    (found,) = find_break_even((("d", 0.0, 1), response) for response in responses)
    assert found.break_even[0] == pytest.approx(2.5)


def row(concurrency: int, speedup: tuple, **changes) -> BreakEven:
    values = {"prompt_tokens": 100, "temperature": 0.0, "drafter": "dpace", "tau": (3.0, 2.9, 3.1)}
    return BreakEven(concurrency=concurrency, break_even=(2.5, 2.4, 2.6), speedup=speedup, **{**values, **changes})


PAYS, LOSES, UNCLEAR, FEW = (1.2, 1.1, 1.3), (0.8, 0.7, 0.9), (1.0, 0.9, 1.1), (1.2, None, None)


@pytest.mark.parametrize(
    ("speedups", "most"),
    [
        ({1: [PAYS], 4: [PAYS], 8: [LOSES]}, 4),
        ({1: [PAYS], 4: [PAYS, UNCLEAR], 8: [PAYS]}, 1),
        ({1: [PAYS], 2: [PAYS]}, 2),
        ({1: [LOSES], 2: [PAYS]}, 0),
        ({1: [FEW], 2: [FEW]}, 0),
        ({1: [PAYS]}, 0),  # nothing is known of several requests
    ],
)
def test_the_schedule_of_tensorrt_is_what_was_measured(speedups, most):
    rows = [row(number, speedup) for number, of_number in speedups.items() for speedup in of_number]
    assert most_requests(rows) == most
    about = {"drafter": "d", "gguf": "d.gguf", "target": "t", "block_size": 8}
    card = "\n".join(card_sections("vllm", **about, break_even=rows))
    (block,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    config = yaml.safe_load(block)["speculative_config"]
    assert config.pop("draft_len_schedule", None) == ({most: 7} if most else None)
    assert config == {"decoding_type": "DFlash", "speculative_model": "d", "max_draft_len": 7}


def test_it_is_in_the_file_on_the_page_and_in_the_terminal(
    language_folder, language_drafter_folder, language_prompts, tmp_path, capsys
):
    """Through the command line: bench, report, and the card of an export."""
    for name, some in (("train", language_prompts[:4]), ("heldout", language_prompts[50:56])):
        write_prompts(tmp_path / f"{name}.jsonl", some)
    files = f"--prompts.path {tmp_path}/train.jsonl --prompts.heldout-path {tmp_path}/heldout.jsonl"
    drafter = Path(shutil.copytree(language_drafter_folder, tmp_path / "drafter"))
    measure = f"bench --target {language_folder} --output {tmp_path} {files} --max-new-tokens 16 --temperatures 0"
    assert main(measure.split()) == 0
    printed = capsys.readouterr().out
    assert "Break-even" in printed and "below 1k" in printed
    (found,) = read_results(tmp_path / "results.json").break_even
    assert found.drafter == "drafter" and found.concurrency == 1 and None not in found.break_even
    assert found.break_even[0] == pytest.approx(found.tau[0] / found.speedup[0])
    shown = f"| below 1k | 1 | 0 | drafter | {with_interval(*found.break_even)} |"
    assert main(["report", str(tmp_path)]) == 0
    assert shown in (tmp_path / "report.md").read_text()
    wanted = f"export {drafter} --target {language_folder} --to vllm --output {tmp_path / 'out'}"
    assert main(wanted.split()) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Break-even" in card and shown in card and "draft_len_schedule:" not in card
