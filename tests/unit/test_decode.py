import pytest
import torch
from scipy.stats import chisquare

from dpace.decode import generate, generate_plain, verify_draft
from tests.conftest import EOS, MASK, make_drafter, make_target


def prompt(length=7, seed=0):
    return torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("block_size", [2, 3, 5, 8])
def test_greedy_text_is_the_targets(random_target, block_size):
    drafter = make_drafter(random_target, block_size=block_size)
    for seed in range(3):
        plain = generate_plain(random_target, prompt(seed=seed), max_new_tokens=30, stop_token_ids=[])
        ours = generate(random_target, drafter, prompt(seed=seed), max_new_tokens=30, stop_token_ids=[])
        assert ours.token_ids == plain.token_ids


def test_plain_decoding_is_transformers_own(random_target):
    ids = torch.tensor([prompt()])
    expected = random_target.model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = generate_plain(random_target, prompt(), max_new_tokens=20, stop_token_ids=[])
    assert found.token_ids == expected[0, 7:].tolist()


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_transformers_own_dflash_generation_takes_the_drafter():
    target = make_target("smollm2")
    drafter = make_drafter(target)
    ids = torch.tensor([prompt()])
    out = target.model.generate(
        ids, assistant_model=drafter, speculation_type="dflash", max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert out[0, 7:].tolist() == generate_plain(target, prompt(), max_new_tokens=20, stop_token_ids=[]).token_ids


class Oracle:
    """Stands in for a drafter: drafts the text it was given, wrong wherever `is_wrong` says so."""

    def __init__(self, monkeypatch, drafter, target, text, is_wrong):
        head = type(target.head)
        number = iter(range(10**6))

        def logits(_head, hidden):
            start = self.position
            rows = torch.zeros(len(hidden), 64)
            for slot in range(len(hidden)):
                token = text[start + slot + 1] if start + slot + 1 < len(text) else 0
                if is_wrong(next(number)):
                    token = (token + 1) % 64
                rows[slot, token] = 1
            return rows

        def forward(*, position_ids, noise_embeds, **_):
            self.position = int(position_ids[0, -1]) - drafter.block_size + 1
            return drafter_forward(position_ids=position_ids, noise_embeds=noise_embeds, **_)

        drafter_forward = drafter.forward
        monkeypatch.setattr(drafter, "forward", forward)
        monkeypatch.setattr(head, "logits", logits)


@pytest.mark.parametrize(
    ("is_wrong", "expected"),
    [
        (lambda n: False, [3, 3, 3, 3, 3]),
        (lambda n: True, [0] * 20),
        (lambda n: n % 3 == 2, [2, 2, 2, 2, 2, 2, 2]),
    ],
    ids=["always", "never", "sometimes"],
)
def test_fake_drafters(monkeypatch, is_wrong, expected):
    target = make_target("qwen3")
    drafter = make_drafter(target)
    plain = generate_plain(target, prompt(), max_new_tokens=40, stop_token_ids=[])
    Oracle(monkeypatch, drafter, target, prompt() + plain.token_ids, is_wrong)
    ours = generate(target, drafter, prompt(), max_new_tokens=21, stop_token_ids=[])
    assert ours.token_ids == plain.token_ids[:21]
    assert ours.accepted_lengths[: len(expected) - 1] == expected[:-1]
    assert sum(ours.emitted_lengths) == 20


@pytest.mark.parametrize("stop_at", range(1, 9))
def test_stop_tokens_inside_a_block(monkeypatch, stop_at):
    target = make_target("qwen3")
    drafter = make_drafter(target)
    plain = generate_plain(target, prompt(), max_new_tokens=20, stop_token_ids=[])
    stop = plain.token_ids[stop_at]
    end = plain.token_ids.index(stop) + 1
    Oracle(monkeypatch, drafter, target, prompt() + plain.token_ids, lambda n: False)
    ours = generate(target, drafter, prompt(), max_new_tokens=20, stop_token_ids=[stop])
    assert ours.token_ids == plain.token_ids[:end]
    assert sum(ours.emitted_lengths) == end - 1 == ours.acceptance.num_emitted_tokens
    assert generate_plain(target, prompt(), max_new_tokens=20, stop_token_ids=[stop]).token_ids == ours.token_ids


@pytest.mark.parametrize("limit", range(1, 10))
def test_length_limits_inside_a_block(monkeypatch, limit):
    target = make_target("qwen3")
    drafter = make_drafter(target)
    plain = generate_plain(target, prompt(), max_new_tokens=20, stop_token_ids=[])
    Oracle(monkeypatch, drafter, target, prompt() + plain.token_ids, lambda n: False)
    ours = generate(target, drafter, prompt(), max_new_tokens=limit, stop_token_ids=[])
    assert ours.token_ids == plain.token_ids[:limit]
    assert sum(ours.emitted_lengths) == limit - 1 == ours.acceptance.num_emitted_tokens


def test_output_distribution_at_temperature_one():
    """Chi-square of the joint distribution of the 2nd and 3rd token against the target's, on a tiny vocabulary."""
    target = make_target("qwen3", vocab_size=8, eos_token_id=None)
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(0.2)
    drafter = make_drafter(target, block_size=4)
    start, samples = [4, 5, 6], 1500

    def probs(tokens):
        with torch.no_grad():
            return torch.softmax(target.model(torch.tensor([tokens])).logits[0, -1], -1)

    first, second = probs(start), {t: None for t in range(8)}
    joint = torch.stack([first[t] * probs([*start, t]) for t in second])
    third = torch.stack([torch.stack([joint[a, b] * probs([*start, a, b]) for b in range(8)]) for a in range(8)]).sum(0)
    counts, accepted = torch.zeros(8, 8), 0
    torch.manual_seed(0)
    for _ in range(samples):
        out = generate(target, drafter, start, max_new_tokens=3, temperature=1.0, stop_token_ids=[])
        counts[out.token_ids[1], out.token_ids[2]] += 1
        accepted += sum(out.accepted_lengths)
    assert accepted > samples / 20  # else nothing is tested
    expected = third * samples
    common = expected.flatten() >= 5
    found = torch.cat([counts.flatten()[common], counts.flatten()[~common].sum()[None]])
    wanted = torch.cat([expected.flatten()[common], expected.flatten()[~common].sum()[None]])
    assert chisquare(found.double(), wanted.double() * found.double().sum() / wanted.double().sum()).pvalue > 0.01


def test_a_seed_repeats_the_text():
    target = make_target("qwen3")
    drafter = make_drafter(target)
    runs = [generate(target, drafter, prompt(), max_new_tokens=20, temperature=1.0, seed=5).token_ids for _ in range(2)]
    assert runs[0] == runs[1]


def test_verify_counts_the_prefix():
    assert verify_draft([1, 2, 3], [1, 2, 4, 9]) == 2
    assert verify_draft([1, 2], [1, 2, 3]) == 2
    assert verify_draft([5], [6, 7]) == 0


@pytest.mark.parametrize(
    ("token_ids", "options", "match"),
    [
        ([], {}, "empty"),
        ([5] * 250, {"max_new_tokens": 10}, "limit of 256"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"max_new_tokens": 5, "temperature": -1.0}, "temperature"),
    ],
)
def test_bad_requests(token_ids, options, match):
    target = make_target("qwen3")
    with pytest.raises(ValueError, match=match):
        generate(target, make_drafter(target), token_ids, **options)
    assert EOS in target.stop_token_ids and MASK not in target.stop_token_ids
