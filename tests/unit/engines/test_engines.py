"""Each engine that runs here decodes with what is exported as we do: the same texts, as many verifications."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from llamacpp import run_llamacpp
from transformers import AutoModel

import dpace.modeling_dflash
from dpace.decode.batch import Decoder, generate_batch
from dpace.decode.loop import generate_plain
from dpace.drafter import load_drafter
from dpace.engines.gguf import write_gguf
from dpace.publish.export import import_drafter
from dpace.target import Target
from dpace.training.run import make_datasets, train
from tests.support.cases import wide
from tests.support.files import read_json
from tests.support.models import EOS, make_language_model, make_recipe, train_on_language, write_target_gguf
from tests.unit.engines.conftest import KINDS, LAYOUTS, MARKOV, MAX_NEW_TOKENS, WINDOWS, Steps, our_steps, quiet


def decode_and_count(target: Target, decode, prompts) -> Steps:
    """With a loop that calls our target: its forward passes after the first."""
    steps = []
    for token_ids in prompts:
        calls = []
        with target.model.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            output = decode(torch.tensor([token_ids]))
        steps.append((output[0, len(token_ids) :].tolist(), len(calls) - 1))
    return steps


def llamacpp_steps(target_gguf: Path, path: Path, prompts, **options) -> Steps:
    """llama.cpp tells how many tokens it drafted: 5 for each verification of a whole block."""
    options |= {"drafter_gguf": path, "num_draft_tokens": 5, "max_new_tokens": MAX_NEW_TOKENS}
    answers = run_llamacpp(target_gguf, prompts, **options)
    assert all(answer.num_drafted % 5 == 0 for answer in answers)
    return [(answer.token_ids, answer.num_drafted // 5) for answer in answers]


def distance(found: Steps, expected: Steps) -> int:
    """Difference of the verifications, of equal texts."""
    assert [text for text, _ in found] == [text for text, _ in expected]
    return sum(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True))


def test_all_kinds_but_the_random_one_accept_drafts_and_keep_the_text(expected, language_target, prompts):
    """A random one shows exactness only; the others also wrong features, and runs up to whole blocks."""
    plain = [generate_plain(language_target, ids, max_new_tokens=MAX_NEW_TOKENS).token_ids for ids in prompts]
    for kind, found in expected.items():
        texts, steps = zip(*found, strict=True)
        assert list(texts) == plain
        tau = sum(len(text) - 1 for text in texts) / sum(steps)
        assert (tau > 1.3) == (kind != "random"), kind
    for kind, without in (("markov", "trained"), ("markov, anchored", "anchored")):
        assert distance(expected[kind], expected[without]) > len(prompts), "more than near ties"


@pytest.mark.parametrize(
    "kind",
    wide([*WINDOWS, "convolutions", "selector", *MARKOV, *LAYOUTS], "mixed layers", "selector", *MARKOV, *LAYOUTS),
)
def test_batches_accept_what_single_decoding_does(kind, folders, expected, language_target, prompts):
    """And width `auto`, which accepts other drafts, keeps the text."""
    drafter = load_drafter(folders[kind], language_target)
    batch = generate_batch(language_target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    assert [(out.token_ids, len(out.widths)) for out in batch] == expected[kind]
    decoder = Decoder(language_target, drafter)
    paced = [decoder.generate(ids, max_new_tokens=MAX_NEW_TOKENS) for ids in prompts]
    assert [out.token_ids for out in paced] == [text for text, _ in expected[kind]]


@quiet
@pytest.mark.parametrize("kind", wide(KINDS, "trained", "convolutions", "selector", "mixed layers"))
def test_transformers_and_zlab_decode_with_the_exported_folder_as_we_do(
    kind, expected, do_export, language_target, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = do_export("zlab", kind)
    assistant = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    assert "dpace" not in type(assistant).__module__
    options = {"assistant_model": assistant, "speculation_type": "dflash", "do_sample": False}

    def with_transformers(inputs):
        mask = torch.ones_like(inputs)
        return language_target.model.generate(inputs, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, **options)

    if kind != "selector":  # which transformers does not run
        assert decode_and_count(language_target, with_transformers, prompts) == expected[kind]
    zlab = importlib.import_module("dflash.model")
    network = getattr(zlab, read_json(path / "config.json")["architectures"][0])
    theirs = network.from_pretrained(path, dtype=torch.float32).eval()

    def with_zlab(inputs):
        return zlab.dflash_generate(theirs, language_target.model, inputs, MAX_NEW_TOKENS, [EOS], 0.0)

    assert decode_and_count(language_target, with_zlab, prompts) == expected[kind]


def test_the_bundled_module_needs_torch_and_transformers_only():
    source = Path(dpace.modeling_dflash.__file__).read_text()
    imported = re.findall(r"^\s*(?:from|import) (\w+)", source, flags=re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"torch", "transformers"}


CASES = [(kind, "keep") for kind in (*KINDS, *MARKOV, *LAYOUTS)]
CASES += [("trained", dtype) for dtype in ("float16", "bfloat16")]
KEPT = [(kind, "keep") for kind in ("random", "convolutions", "selector", "causal windows", *MARKOV, *LAYOUTS)]


@pytest.mark.parametrize("case", wide(CASES, *KEPT, ("trained", "float16")), ids=str)
def test_llamacpp_verifies_as_often_as_we_do(
    case, expected, do_export, language_folder, language_target, target_gguf, prompts, tmp_path
):
    """In another precision, as often as with the drafter that is read back; llama.cpp rounds inputs too."""
    kind, dtype = case
    path = do_export("gguf", kind, dtype=dtype)
    is_dspark = kind in ("anchored", *MARKOV)
    assert path.name.startswith("dspark-" if is_dspark else "dflash-")
    ours = expected[kind]
    if dtype != "keep":
        import_drafter(path, tmp_path / "in", target=str(language_folder))
        ours = our_steps(language_target, load_drafter(tmp_path / "in", language_target), prompts)
    theirs = llamacpp_steps(target_gguf, path, prompts, is_dspark=is_dspark)
    num_near_ties = len(prompts) * (kind != "random")  # they may fall the other way
    assert distance(theirs, ours) <= num_near_ties


@pytest.mark.wide
def test_llamacpp_drafts_for_a_llama_target(language_responses, questions, tmp_path):
    """The demo's target is one too."""
    model = make_language_model("smollm2")
    train_on_language(model)
    target = Target(model)
    recipe = make_recipe(max_steps=60)
    drafter = train(target, *make_datasets(target, language_responses, [], recipe), recipe, tmp_path / "drafter").eval()
    file = write_target_gguf(target, tmp_path / "target.gguf", "llama", rope_dimension_count=target.config.head_dim)
    write_gguf(tmp_path / "drafter.gguf", drafter, file)
    ours = our_steps(target, drafter, questions)
    assert sum(steps for _, steps in ours) < 0.8 * sum(len(text) for text, _ in ours)
    assert distance(llamacpp_steps(file, tmp_path / "drafter.gguf", questions), ours) <= len(questions)  # near ties
