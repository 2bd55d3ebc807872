"""Copies of the text and of earlier answers, and decoding with them."""

import io
import json
import math
import random
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dpace.cli import main
from dpace.decode import Decoder, Paces, generate_plain
from dpace.decode.copies import CONTEXT_TOKENS, MAX_MATCH, NUM_KINDS, Copy, PromptLookup, Recall
from dpace.decode.generation import make_continuation
from dpace.decode.loop import Speculation
from dpace.decode.pace import StepCosts
from dpace.drafter.drafter import ANSWERS_FILE, load_drafter
from dpace.target import chat
from dpace.training import finish

FLAT = StepCosts([10.0 + 0.1 * k for k in range(16)], 5.0)


def search_text(text, count):
    """The definition: the longest match, of these the last, and copying token by token."""
    for length in range(MAX_MATCH, 0, -1):
        for start in range(len(text) - 1, length - 1, -1):
            if len(text) >= length and text[start - length : start] == text[-length:]:
                longer = list(text)
                for k in range(count):
                    longer.append(longer[start + k])
                return length, longer[len(text) :]
    return 0, []


@pytest.mark.parametrize("num_words", [2, 5, 40])
def test_what_followed_the_last_longest_match_in_the_text_is_proposed(num_words):
    """And each token that is read is compared with that."""
    rng = random.Random(0)
    text = [rng.randrange(num_words)]
    lookup = PromptLookup(text)
    for _ in range(150):
        count = rng.randrange(9)
        assert lookup.propose(count) == search_text(text, count)
        known = len(text)
        text += [rng.randrange(num_words) for _ in range(rng.randrange(3))]
        copies = [search_text(text[:end], 1) for end in range(known, len(text))]
        assert lookup.read() == [(m, ids == [token]) for (m, ids), token in zip(copies, text[known:], strict=True)]


def search_answers(answers, text, count):
    """The definition: the last place behind six equal tokens, else behind two, and what followed there."""
    for length in (6, 2):
        for answer in reversed(answers):
            for end in range(len(answer) - 1, CONTEXT_TOKENS - 1, -1):
                match = [*(answer[end - k] == text[-k] for k in range(1, 17)), False].index(False)
                if match >= length:
                    return MAX_MATCH + int(math.log2(match)), answer[end : end + count]
    return 0, []


@pytest.mark.parametrize("num_words", [3, 12])
def test_what_followed_the_last_longest_match_in_an_answer_is_proposed(num_words):
    """A few are lost where two hashes are equal."""
    rng = random.Random(0)
    recall = Recall(1.0)
    found = []
    answers = []
    for _ in range(60):
        text = [rng.randrange(1, num_words) for _ in range(40)]
        expected = search_answers(answers, text[:20], 5)
        proposed = recall.propose(text[:20], 5)
        assert len(proposed.token_ids) == 5 if proposed.match else proposed == Copy()
        found.append(proposed.match == expected[0] and proposed.token_ids[: len(expected[1])] == (expected[1] or ()))
        recall.add(text, 20)
        answers.append(text[4:])
    assert sum(found) >= 57


@pytest.mark.parametrize("mib", [1.0, 1e-9])
def test_the_start_of_an_answer_is_found_by_the_end_of_its_prompt(mib):
    """However little memory is asked for."""
    recall = Recall(mib)
    recall.add([8, 9, 1, 2, 3], 2)
    assert recall.propose([8, 9], 3) == Copy(NUM_KINDS - 1, [1, 2, 3])  # nothing stands before either
    assert recall.propose([7, 8, 9], 2) == Copy(4, [1, 2]) and recall.propose([9, 7], 2) == Copy()


def test_a_full_memory_forgets_the_oldest_and_stays_as_large():
    rng, recall = np.random.default_rng(0), Recall(0.1)
    capacity = len(recall.tokens)
    answers = rng.integers(1, 50_000, (2 * capacity // 100, 84)).tolist()
    for answer in answers:
        recall.add(answer)
    recalled = [recall.propose(answer[:40], 4).token_ids == answer[40:44] for answer in answers]
    kept = capacity // 100
    assert not any(recalled[: -kept - 1]) and sum(recalled[-kept // 2 :]) > 0.7 * (kept // 2)
    assert 0.099 * 2**20 < recall.tokens.nbytes + recall._context_starts.nbytes <= 0.1 * 2**20
    recall.add(list(range(1, 3 * capacity)))  # longer than the memory
    assert recall.propose([3 * capacity - 4, 3 * capacity - 3], 1).token_ids == [3 * capacity - 2]


@pytest.fixture
def costs(monkeypatch):
    """Steps whose costs are known: copies are nearly free, and this drafter's drafts are not.

    Gives the seconds that a step took, over those that its costs say.
    """
    ratios = []
    monkeypatch.setattr("dpace.decode.pace.measure_costs", lambda *_: FLAT)
    monkeypatch.setattr("dpace.decode.pace.Pace._learn_seconds", lambda *args: ratios.append(args[-1]))
    return ratios


@pytest.fixture
def drafter(language_target, random_drafter_folder):
    return load_drafter(random_drafter_folder, language_target)


def test_text_is_equal_with_memory(costs, language_target, drafter, questions):
    """Also where the same question comes again, which is then mostly copied; and the memory is of the decoder."""
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}
    asked = questions[:4]
    expected = [generate_plain(language_target, question, **options).token_ids for question in asked]
    passes = []
    started = time.perf_counter()
    for mib in (0.0, 1.0):
        decoder = Decoder(language_target, drafter, recall_mib=mib)
        found = [decoder.generate(question, **options) for question in asked * 2]
        assert [one.token_ids for one in found] == expected * 2
        passes.append(sum(len(one.widths) for one in found))
    assert passes[1] < 0.7 * passes[0]
    assert 0 < sum(costs) * min(FLAT.verify_seconds) < time.perf_counter() - started


def test_threads_share_a_decoder(language_target, drafter, questions):
    """Also while its first calls measure the machine; threads give way to one another as often as they can."""
    decoder = Decoder(language_target, drafter)
    asked = questions[:5]
    expected = [generate_plain(language_target, question, max_new_tokens=20).token_ids for question in asked]

    def answer(question):
        return decoder.generate(question, max_new_tokens=20).token_ids

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(answer, asked * 2)) == expected * 2
    finally:
        sys.setswitchinterval(usual)


def test_a_memory_starts_from_the_answers_of_the_training(
    language_target, language_drafter_folder, language_responses, monkeypatch
):
    """They stand beside the drafter, and are few."""
    drafter = load_drafter(language_drafter_folder, language_target)
    trained = [
        token for r in language_responses[:50] for start, end in r.response_spans for token in r.token_ids[start:end]
    ]
    assert drafter.answers == trained
    assert Paces(1.0).recall(drafter).propose(trained[5:9], 3).token_ids == trained[9:12]
    monkeypatch.setattr(finish, "MAX_ANSWER_TOKENS", 100)
    dataset = finish.ResponseDataset(language_responses[:50], max_length=64, num_anchors=8, seed=0)
    chosen = finish._find_answers(dataset)
    assert len(chosen) <= 100 and chosen[:20] == trained[:20] and chosen != trained[: len(chosen)]


def test_a_damaged_file_of_answers_is_refused(language_target, random_drafter_folder, tmp_path):
    folder = shutil.copytree(random_drafter_folder, tmp_path / "drafter")
    for token_ids in ([64], []):
        (folder / ANSWERS_FILE).write_text(json.dumps({"token_ids": token_ids}))
        with pytest.raises(ValueError, match=r"answers.json.*copy it again, or remove the file"):
            load_drafter(folder, language_target)


def test_a_chat_copies_from_the_memory(
    costs, language_folder, random_drafter_folder, language_drafter_folder, tmp_path, capsys, monkeypatch
):
    """Two turns from standard input, beside a random drafter with the answers of a training and without them.

    The second prompt has the first answer.
    """
    folder = shutil.copytree(random_drafter_folder, tmp_path / "drafter")
    asked, encode = [], chat.encode_chat

    def note(target, messages):
        asked.append([message["content"] for message in messages])
        return encode(target, messages)

    monkeypatch.setattr(chat, "encode_chat", note)
    line = f"generate --target {language_folder} --drafter {folder} --max-new-tokens 20 --stream"
    texts, taus = [], []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("w3 w51\n\nw5 w51\n"))
        assert main(line.split()) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        sentence = r"^\d+ tokens?(?: at [\d.]+ tokens/s; each pass of the target gave ([\d.]+) \(tau\))?$"
        tau, _ = re.findall(sentence, printed.err, re.M)
        taus.append(float(tau))
        shutil.copy(language_drafter_folder / ANSWERS_FILE, folder)
    assert texts[0] == texts[1] and texts[0].count("> ") == 4
    assert taus[1] > 1.3 * taus[0]
    (first,), (again, answer, second) = asked[:2]
    assert first == again == "w3 w51" and "w4 w5 w6" in answer and second == "w5 w51"


def test_an_answer_that_is_stopped_early_is_remembered(costs, language_target, drafter, questions):
    paces = Paces(1.0)
    text = make_continuation(language_target, questions[0], max_new_tokens=20)
    steps = Speculation(language_target, drafter, text, paces=paces).steps()
    emitted = [token for _ in range(4) for token in next(steps).token_ids]
    steps.close()
    assert paces.recall(drafter).propose(questions[0], 3).token_ids == emitted[:3]
    assert Paces().recall(drafter) is None
