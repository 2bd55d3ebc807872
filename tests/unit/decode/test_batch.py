"""Several prompts at once, as they are and with compiled steps."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dpace.cli import main
from dpace.decode import Decoder
from dpace.decode.batch import Batch
from dpace.decode.decoder import generate_batch
from dpace.decode.loop import generate_plain
from dpace.fast.cache import RaggedLayer
from dpace.target import Target
from dpace.target.chat import encode_chat
from tests.conftest import decode_whole, make_drafter, make_target, make_with_head
from tests.support.cases import wide


def prompts(*lengths):
    return [
        torch.randint(4, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        for seed, length in enumerate(lengths or (7, 1, 12, 3, 7))
    ]


def facts(generations):
    return [(one.token_ids, one.accepted_lengths, one.emitted_lengths, one.widths) for one in generations]


def outcomes(generations):
    """What is the same where rows that are done wait for the others."""
    return [(one.token_ids, one.accepted_lengths) for one in generations]


def plain_texts(target, rows, **options):
    return [generate_plain(target, row, **options).token_ids for row in rows]


@pytest.mark.parametrize("block_size", wide([2, 5], 5))
@pytest.mark.parametrize("family", wide(["llama3.1", "qwen3", "smollm2"], "qwen3"), indirect=True)
def test_texts_are_those_of_one_at_a_time(random_target, block_size):
    drafter = make_drafter(random_target, block_size=block_size)
    options = {"max_new_tokens": 25, "stop_token_ids": []}
    plain = plain_texts(random_target, prompts(), **options)
    ours = generate_batch(random_target, drafter, prompts(), **options)
    assert [out.token_ids for out in ours] == plain
    assert facts(ours) == facts(decode_whole(random_target, drafter, prompts(), **options))
    plainly = generate_batch(random_target, None, prompts(), **options)
    assert facts(plainly) == [(text, [], [], []) for text in plain]
    assert generate_batch(random_target, drafter, [], **options) == []


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_eager_attention_and_positions_up_to_the_limit():
    """The limit of positions is reached by one row, while another still needs whole blocks."""
    target = make_target("qwen3", max_position_embeddings=32, _attn_implementation="eager")
    options = {"max_new_tokens": 12, "stop_token_ids": []}
    rows = prompts(20, 4)
    ours = generate_batch(target, make_drafter(target, block_size=8), rows, **options)
    assert [out.token_ids for out in ours] == plain_texts(target, rows, **options)


@pytest.mark.parametrize("limit", wide([1, 2, 5, 9, 20], 1, 20))
def test_a_trained_drafter_is_accepted_as_alone(language_target, language_drafter, questions, limit):
    """Rows accept different numbers of tokens, and end by a stop token or by the limit, inside blocks."""
    rows = questions[:6]
    rows[1] = [13, 15, *rows[1]]
    texts = plain_texts(language_target, rows, max_new_tokens=20, stop_token_ids=[])
    for stops in ([], [texts[0][3], texts[1][6], texts[2][11]]):
        options = {"max_new_tokens": limit, "stop_token_ids": stops}
        ours = generate_batch(language_target, language_drafter, rows, **options)
        assert facts(ours) == facts(decode_whole(language_target, language_drafter, rows, **options))
        ends = [min([limit, *(text.index(stop) + 1 for stop in stops if stop in text)]) for text in texts]
        assert [out.token_ids for out in ours] == [text[:end] for text, end in zip(texts, ends, strict=True)]
    if limit == 20:
        accepted = [length for out in ours for length in out.accepted_lengths]
        assert sum(accepted) > 20 and len(set(accepted)) > 2 < len(set(ends))  # else nothing is tested


def test_what_a_row_has_not_written_is_never_seen(monkeypatch):
    """Large numbers in the unwritten columns change nothing, also after rows have left the batch."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    first = generate_plain(target, prompts()[0], max_new_tokens=5, stop_token_ids=[]).token_ids
    options = {"max_new_tokens": 12, "stop_token_ids": first[-1:]}
    expected = facts(generate_batch(target, drafter, prompts(), **options))
    update, num_rows = RaggedLayer.update, set()

    def spoil_first(self, key_states, value_states, *rest, **kwargs):
        num_rows.add(len(key_states))
        if not self.is_initialized:
            update(self, key_states, value_states)
            for buffer in self.buffers:
                buffer.fill_(1e3)
        return update(self, key_states, value_states, *rest, **kwargs)

    monkeypatch.setattr(RaggedLayer, "update", spoil_first)
    assert facts(generate_batch(target, drafter, prompts(), **options)) == expected
    assert len(num_rows) > 1


@pytest.fixture
def graphs(monkeypatch, unchecked_types):
    """The graphs that are traced, with the shapes that CUDA graphs need; nothing may break one in two."""
    compiled, found = torch.compile, []

    def backend(graph, _inputs):
        found.append(graph)
        return graph

    def traced(step, **_):
        return compiled(step, backend=backend, dynamic=False, fullgraph=True)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    return found


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.parametrize("way", wide([(0.0, "plain"), (1.0, "plain"), (0.0, "head"), (0.0, "windows")], (0.0, "plain")))
def test_compiled_steps_of_fixed_shapes(way, graphs, language_target, language_drafter, questions):
    """Rows that are done wait for the others."""
    temperature, kind = way
    if kind == "head":
        language_drafter = make_with_head(language_target)
    if kind == "windows":
        language_drafter = make_drafter(language_target, sliding_window=9, full_layers=(1,), causal=True)
    rows = questions[:4]
    rows[1] = rows[1][1:]
    (text,) = plain_texts(language_target, rows[:1], max_new_tokens=30, stop_token_ids=[])
    options = {"max_new_tokens": 30, "stop_token_ids": [text[6]], "temperature": temperature, "seed": 3}
    decoder = Decoder(language_target, language_drafter, compile=True)
    for asked in (rows, rows[::-1]):
        expected = outcomes(generate_batch(language_target, language_drafter, asked, **options))
        assert outcomes(decoder.generate_batch(asked, **options)) == expected
        assert len(graphs) == 1, "for both models, whatever the prompts"
    assert outcomes([decoder.generate(asked[0], **options)]) == expected[:1]


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_calls_with_other_prompts_compile_nothing_again(graphs, monkeypatch, language_target):
    """Three lengths of prompts, twice: one graph, and one copy to the host in a step."""
    waits, tolist, steps = [], torch.Tensor.tolist, []
    decoder = Decoder(language_target, make_with_head(language_target), compile=True, max_length=200)
    step = Batch.step

    def counted(self):
        before = len(waits)
        step(self)
        steps.append(len(waits) - before)

    monkeypatch.setattr(Batch, "step", counted)
    for number in range(6):
        prompt = [5 + (number + place) % 40 for place in range((7, 30, 90)[number % 3])]
        options = {"max_new_tokens": 20, "stop_token_ids": []}
        (expected,) = plain_texts(language_target, [prompt], **options)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
            assert decoder.generate(prompt, **options).token_ids == expected
        assert len(graphs) == 1
    assert set(steps) == {1} and len(steps) > 12


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_compiled_steps_on_a_cpu_multiply_with_the_packed_weights(graphs, language_folder):
    """A changed weight gets a new copy, and the step is compiled again."""
    target = Target.load(str(language_folder))
    decoder = Decoder(target, None, compile=True)
    options = {"max_new_tokens": 8, "stop_token_ids": []}
    texts = []
    for factor in (1, -1):
        with torch.no_grad():
            target.model.get_output_embeddings().weight.mul_(factor)
        texts += plain_texts(target, [[5, 6, 7]], **options)
        assert decoder.generate([5, 6, 7], **options).token_ids == texts[-1]
    counts = [sum("dpace.multiply" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert counts == 2 * [4 * target.num_layers + 1] and texts[0] != texts[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_step_reads_what_a_graph_has_overwritten(
    temperature, monkeypatch, language_target, language_drafter, questions
):
    """As CUDA graphs do, each call of a compiled function overwrites what all calls before it returned."""
    returned = []

    def compiled(step, **_):
        def replay(*args, **kwargs):
            for tensor in returned:
                tensor.zero_()
            out = tree_map(lambda value: value.clone(), step(*args, **kwargs))
            returned.extend(tree_leaves(out))
            return out

        return replay

    monkeypatch.setattr(torch, "compile", compiled)
    options = {"max_new_tokens": 20, "stop_token_ids": [], "temperature": temperature, "seed": 3}
    for drafter in (language_drafter, None):
        expected = [out.token_ids for out in generate_batch(language_target, drafter, questions[:2], **options)]
        found = Decoder(language_target, drafter, compile=True).generate_batch(questions[:2], **options)
        assert [out.token_ids for out in found] == expected and returned


@pytest.mark.filterwarnings("ignore")  # of torch.compile
@pytest.mark.wide
def test_a_prompt_as_short_as_a_block_is_compiled_too(graphs, language_folder, tmp_path, capsys):
    """The first step is never compiled: it makes the drafter's cache, and reads a prompt of any length."""
    target = Target.load(str(language_folder))
    flags = ["generate", "--target", str(language_folder), "--prompt", "w3 w51", "--max-new-tokens", "12"]
    assert main(flags) == 0
    answer = capsys.readouterr().out
    assert len(encode_chat(target, [{"role": "user", "content": "w3 w51"}])) == 4
    make_drafter(target, block_size=5).save_pretrained(tmp_path)
    assert main([*flags, "--drafter", str(tmp_path), "--compile"]) == 0
    assert capsys.readouterr().out == answer and graphs


def test_a_longer_text_gets_larger_caches(monkeypatch, language_target, language_drafter):
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr("dpace.decode.batch.COMPILED_COLUMNS", 16)
    decoder = Decoder(language_target, language_drafter, compile=True)
    columns = []
    for count in (10, 20, 10):
        options = {"max_new_tokens": count, "stop_token_ids": []}
        assert [decoder.generate([5, 6, 7], **options).token_ids] == plain_texts(
            language_target, [[5, 6, 7]], **options
        )
        columns.append(decoder.columns)
    assert columns == [16, 32, 32]


def test_seeds_give_the_texts_of_one_at_a_time():
    target = make_target("qwen3")
    with torch.no_grad():
        target.model.get_output_embeddings().weight.mul_(0.05)
    drafter = make_drafter(target)
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "stop_token_ids": []}
    rows = [*prompts(), prompts()[0]]
    ours = generate_batch(target, drafter, rows, seed=5, **options)
    one_by_one = [decode_whole(target, drafter, [row], seed=5 + i, **options)[0] for i, row in enumerate(rows)]
    assert facts(ours) == facts(one_by_one) and ours[0].token_ids != ours[-1].token_ids


def test_what_no_batch_takes_is_refused():
    """In any row; layers with windows, and an attention that takes no mask of four axes."""
    target = make_target("qwen3")
    drafter = make_drafter(target)
    with pytest.raises(ValueError, match="limit of 256"):
        generate_batch(target, drafter, [[5], [5] * 250], max_new_tokens=10)
    with pytest.raises(ValueError, match="one prompt at a time"):
        generate_batch(make_target("gemma3"), None, prompts(), max_new_tokens=4)
    target.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        generate_batch(target, drafter, prompts(), max_new_tokens=4)
