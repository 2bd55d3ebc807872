"""Several prompts at once, as they are and with compiled steps."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dpace.decode import Decoder
from dpace.decode.batch import generate_batch
from dpace.decode.loop import generate_plain
from dpace.fast.cache import RaggedLayer
from dpace.target import Target
from tests.support.cases import wide
from tests.support.models import decode_whole, make_drafter, make_target, make_with_selector


def prompts(*lengths):
    return [torch.randint(4, 64, (length,)).tolist() for length in lengths]


def facts(generations):
    return [(one.token_ids, one.accepted_lengths, one.emitted_lengths, one.widths) for one in generations]


def outcomes(generations):
    """What is the same where rows that are done wait for the others."""
    return [(one.token_ids, one.accepted_lengths) for one in generations]


def plain_texts(target, rows, **options):
    return [generate_plain(target, row, **options).token_ids for row in rows]


@pytest.fixture
def spoilt(monkeypatch):
    """Large numbers in all columns of a cache that are not written yet."""
    update = RaggedLayer.update

    def spoil_first(layer, *states, **options):
        if not layer.is_initialized:
            update(layer, *states, **options)
            for buffer in layer.buffers:
                buffer.fill_(1e3)
        return update(layer, *states, **options)

    monkeypatch.setattr(RaggedLayer, "update", spoil_first)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 20.0, "top_k": 20}])
def test_texts_are_those_of_one_at_a_time(sampling, spoilt):
    """Each with its own seed, also after rows have left, and whatever stands where nothing was written."""
    target = make_target("qwen3")
    drafter = make_drafter(target, block_size=5)
    rows = prompts(7, 1, 12, 3, 7)
    rows.append(rows[0])
    options = {"max_new_tokens": 25, **sampling}
    ((*_, stop),) = plain_texts(target, rows[:1], seed=5, **{**options, "max_new_tokens": 5})
    options["stop_token_ids"] = [stop]
    alone = [decode_whole(target, drafter, [row], seed=5 + i, **options)[0] for i, row in enumerate(rows)]
    ours = generate_batch(target, drafter, rows, seed=5, **options)
    assert facts(ours) == facts(alone)
    assert len({len(one.token_ids) for one in ours}) > 1
    assert (ours[0].token_ids != ours[-1].token_ids) == bool(sampling)
    plainly = generate_batch(target, None, rows, seed=5, **options)
    assert facts(plainly) == [(one.token_ids, [], [], []) for one in alone]
    assert generate_batch(target, drafter, [], **options) == []


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_eager_attention_and_positions_up_to_the_limit():
    """The limit of positions is reached by one row, while another still needs whole blocks."""
    target = make_target("qwen3", max_position_embeddings=32, _attn_implementation="eager")
    options = {"max_new_tokens": 12, "stop_token_ids": []}
    rows = prompts(20, 4)
    ours = generate_batch(target, make_drafter(target, block_size=8), rows, **options)
    assert [out.token_ids for out in ours] == plain_texts(target, rows, **options)


@pytest.mark.parametrize("limit", wide([1, 2, 9, 20], 1, 20))
def test_a_trained_drafter_is_accepted_as_alone(language_target, language_drafter, questions, limit):
    """Rows accept different numbers of tokens, and end by a stop token or by the limit, inside blocks."""
    rows = [questions[0], [13, 15, *questions[1]], *questions[2:6]]
    texts = plain_texts(language_target, rows[:3], max_new_tokens=20, stop_token_ids=[])
    for stops in ([], [texts[0][3], texts[1][6], texts[2][11]]):
        options = {"max_new_tokens": limit, "stop_token_ids": stops}
        ours = generate_batch(language_target, language_drafter, rows, **options)
        assert facts(ours) == facts(decode_whole(language_target, language_drafter, rows, **options))
    if limit == 20:  # else nothing is tested
        accepted = [length for out in ours for length in out.accepted_lengths]
        assert sum(accepted) > 20 and len(set(accepted)) > 2 < len({len(out.token_ids) for out in ours})


@pytest.fixture
def graphs(monkeypatch, unchecked_types):
    """The graphs that are traced, with the shapes that CUDA graphs need; nothing may break one in two.

    As CUDA graphs do, each call overwrites what all calls before it returned.
    """
    compiled, found, returned = torch.compile, [], []

    def backend(graph, _inputs):
        found.append(graph)
        return graph

    def traced(step, **_):
        graph = compiled(step, backend=backend, dynamic=False, fullgraph=True)

        def replay(*args, **options):
            for tensor in returned:
                tensor.zero_()
            out = tree_map(torch.clone, graph(*args, **options))
            returned.extend(tree_leaves(out))
            return out

        return replay

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    return found


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.wide
@pytest.mark.parametrize("way", [(0.0, "plain"), (1.0, "plain"), (0.0, "lilicorr"), (0.0, "windows")])
def test_compiled_steps_of_fixed_shapes(way, graphs, monkeypatch, language_target, language_drafter, questions):
    """Rows that are done wait for the others; a step waits for the device once."""
    temperature, kind = way
    drafter = language_drafter
    if kind == "lilicorr":
        drafter = make_with_selector(language_target)
    if kind == "windows":
        drafter = make_drafter(language_target, sliding_window=9, full_layers=(1,), causal=True)
    rows = [questions[0], questions[1][1:], *questions[2:4]]
    (text,) = plain_texts(language_target, rows[:1], max_new_tokens=30, stop_token_ids=[])
    options = {"max_new_tokens": 30, "stop_token_ids": [text[6]], "temperature": temperature, "seed": 3}
    decoder = Decoder(language_target, drafter, compile=True)
    waits, tolist = [], torch.Tensor.tolist
    for asked in (rows, [[5] * 30 + row for row in rows]):
        expected = outcomes(generate_batch(language_target, drafter, asked, **options))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
            found = outcomes(decoder.generate_batch(asked, **options))
        assert found == expected and len(graphs) == 1, "for both models, whatever the prompts"
        assert len(waits) < 2 * max(len(accepted) for _, accepted in found)
        waits.clear()
    assert outcomes([decoder.generate(asked[0], **options)]) == expected[:1]


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_compiled_steps_see_a_changed_weight(graphs, language_folder):
    """They read the weights themselves, on a CPU too, and are not compiled again."""
    target = Target.load(str(language_folder))
    decoder = Decoder(target, None, compile=True)
    options = {"max_new_tokens": 8, "stop_token_ids": []}
    texts = []
    for factor in (1, -1):
        with torch.no_grad():
            target.model.get_output_embeddings().weight.mul_(factor)
        texts += plain_texts(target, [[5, 6, 7]], **options)
        assert decoder.generate([5, 6, 7], **options).token_ids == texts[-1]
    assert len(graphs) == 1 and texts[0] != texts[1]


def raise_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError


def test_caches_of_compiled_steps_grow_and_are_not_read_after_a_failure(monkeypatch):
    """By the first tokens of a longer text, and by a longer prompt."""
    monkeypatch.setattr("torch.compile", lambda step, **_: step)
    target = make_target("qwen3", max_position_embeddings=512)
    decoder = Decoder(target, None, compile=True)
    for limit, text in ((12, [5, 6, 7]), (270, [5, 6, 7]), (5, [9] * 300), (40, list(range(28)))):
        options = {"max_new_tokens": limit, "stop_token_ids": []}
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(target, "read", raise_out_of_memory)
            decoder.generate([5, 6], **options)
        assert decoder.generate(text, **options).token_ids == generate_plain(target, text, **options).token_ids
    assert decoder.columns == 512


def test_what_no_batch_takes_is_refused():
    """In any row; layers with windows, and an attention that takes no mask of four axes."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match="limit of 256"):
        generate_batch(target, drafter, [[5], [5] * 250], max_new_tokens=10)
    with pytest.raises(ValueError, match="one prompt at a time"):
        generate_batch(make_target("gemma3"), None, [[5], [6]], max_new_tokens=4)
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        generate_batch(target, drafter, [[5], [6]], max_new_tokens=4)
