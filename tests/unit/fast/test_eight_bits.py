import json

import pytest
import torch

from dpace.decode import Decoder, generate
from dpace.drafter import load_drafter
from dpace.fast import eight_bits
from dpace.fast.cache import TextCache
from dpace.fast.eight_bits import LARGEST, EightBitProduct, pack_eight_bits, round_weight, sums_exactly
from dpace.target import Target
from tests.support.files import read_json

needs_kernel = pytest.mark.skipif(not sums_exactly(), reason="this CPU's kernel of 8 bits rounds its sums")


@pytest.fixture
def target(language_folder):
    return Target.load(str(language_folder), dtype=torch.int8)


@needs_kernel
def test_a_product_is_the_sum_of_whole_numbers():
    weight, factors, bias = torch.randn(33, 700), torch.rand(700) + 0.5, torch.randn(33)
    integers, scales = round_weight(weight)
    rows = torch.randn(2, 9, 700) * 2.0 ** torch.randint(-9, 9, (9, 1))
    rows[0, 3] = 0
    product = EightBitProduct(pack_eight_bits(integers, scales), factors, bias)
    found = product(rows)
    divided = rows * factors
    largest = divided.abs().amax(-1, keepdim=True)
    whole = (divided / largest).nan_to_num().mul(LARGEST).round().long()
    sums = whole @ integers.long().T
    expected = sums.double() * scales.double() / LARGEST * largest + bias
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for count in (1, 2, 5):
        assert torch.equal(product(rows[:, :count]), found[:, :count])
    torch.testing.assert_close(found, (rows * factors) @ weight.T + bias, rtol=0.05, atol=float(found.abs().max()) / 50)


@needs_kernel
@torch.no_grad()
def test_a_block_of_tokens_is_read_as_its_tokens_alone(target, questions):
    token_ids = torch.tensor([questions[0] + questions[1] + questions[2]])[:, :9]
    hidden = []
    for steps in ([5, 1, 1, 1, 1], [5, 4], [9]):
        cache = TextCache(target.config, 20)
        parts = token_ids.split(steps, dim=1)
        hidden.append(torch.cat([target.hidden(part, cache=cache) for part in parts], dim=1)[:, 5:])
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])


@needs_kernel
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_text_is_that_without_a_drafter(target, language_drafter_folder, questions, sampling):
    drafter = load_drafter(language_drafter_folder, target)
    options = {"max_new_tokens": 24, **sampling}
    plain = [Decoder(target, None).generate(question, **options).token_ids for question in questions]
    for width in ("auto", "full", 2):
        assert [generate(target, drafter, q, width=width, **options).token_ids for q in questions] == plain
    together = Decoder(target, drafter).generate_batch(questions, **options)  # each draws with a seed of its own
    alone = Decoder(target, None).generate_batch(questions, **options)
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert alone[0].token_ids == plain[0]


@needs_kernel
def test_it_is_a_target_of_its_own(target, language_target, language_folder, tmp_path, run_line):
    assert target.dtype_name == "int8" and target.sha256 != language_target.sha256
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"add {number}"}) + "\n" for number in range(12)))
    recipe = f"--target {language_folder} --prompts.path {prompts} --output {tmp_path / 'out'}"
    recipe += " --prompts.num-heldout 2 --respond.max-new-tokens 8"
    run_line(f"respond {recipe} --dtype int8")
    assert read_json(tmp_path / "out" / "responses.meta.json")["dtype"] == "int8"
    assert "int8" in run_line(f"respond {recipe} --dtype float32", 1).err
    printed = run_line(f"generate --target {language_folder} --dtype int8 --prompt add --max-new-tokens 8 --json")
    assert len(json.loads(printed.out)["token_ids"]) <= 8


@pytest.mark.parametrize("change", ["cpu", "layers", "device"])
def test_what_it_cannot_compute_is_refused(change, language_folder, monkeypatch):
    options = {"dtype": torch.int8}
    if change == "cpu":
        monkeypatch.setattr(eight_bits, "sums_exactly", lambda: False)
    elif change == "layers":
        monkeypatch.setattr(eight_bits, "sums_exactly", lambda: True)
        monkeypatch.setattr(eight_bits, "group_heads", lambda *_: False)
    else:
        options["shard"] = "fsdp"
    with pytest.raises(ValueError, match=r"--dtype int8 .*(VNNI|nn.Linear|one process).*bfloat16"):
        Target.load(str(language_folder), **options)
