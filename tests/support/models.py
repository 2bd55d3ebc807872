"""Tiny models of real config classes, built in memory, and a tiny target trained on a synthetic language.

`python -m tests.support.models` trains that target again.
"""

import os
import random
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import jaxtyping
import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dpace.cli import main as run_cli
from dpace.config import DrafterConfig, ExportConfig, Recipe, RespondConfig, TrainConfig
from dpace.decode import generate
from dpace.decode.generation import Generation
from dpace.drafter import Drafter
from dpace.fast.speed_up import speed_up
from dpace.publish.export import export
from dpace.recipes import RECIPES
from dpace.respond.answering import write_responses
from dpace.respond.responses import Response, read_responses
from dpace.studies import demo
from dpace.target import Target
from tests.support.cases import wide
from tests.support.files import make_prompts

VOCAB = 64
Q8_0 = gguf.GGMLQuantizationType.Q8_0
PAD, EOS, MASK = 0, 1, 3

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM takes on a CPU
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama3.1": lambda: LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**_SHAPE, tie_word_embeddings=False),
    "smollm2": lambda: LlamaConfig(
        **{**_SHAPE, "num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True
    ),
    "gemma2": lambda: Gemma2Config(**_SHAPE, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE, sliding_window=16, query_pre_attn_scalar=16),
}


def make_target(family: str, seed: int = 0, **changes) -> Target:
    """A random target whose logits are far enough apart to be told from rounding."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    speed_up(model)  # as `Target.load` does
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return Target(model)


def make_drafter(target: Target, seed: int = 0, **options) -> Drafter:
    options = {"num_layers": 2, "num_features": 2, "block_size": 4, "mask_token_id": MASK, "seed": seed, **options}
    return Drafter.from_target(target, **options).eval()


def make_with_convolutions(target: Target, **options) -> Drafter:
    """A drafter whose convolutions do something."""
    return _stir(make_drafter(target, conv_kernel_size=2, **options), "_conv.")


def make_with_selector(target: Target, **options) -> Drafter:
    """A drafter whose selector, by default LiLiCorr's, does something."""
    drafter = make_drafter(target, **{"selector": "lilicorr", "selector_candidates": 4, **options})
    return _stir(drafter, f"{drafter.spec.selector.name}.")


def make_with_candidate_selector(target: Target, **options) -> Drafter:
    """The same with DFlash2's."""
    return make_with_selector(target, selector="candidate_selector", **options)


def make_with_markov_head(target: Target, **options) -> Drafter:
    """The same with DSpark's head."""
    return make_with_selector(target, selector="markov_head", **options)


@torch.no_grad()
def _stir(drafter: Drafter, part: str) -> Drafter:
    for name, parameter in drafter.named_parameters():
        if part in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return drafter


def decode_whole(target: Target, drafter: Drafter, prompts, **options) -> list[Generation]:
    """Each prompt alone, with whole blocks."""
    return [generate(target, drafter, token_ids, width="full", **options) for token_ids in prompts]


class Oracle:
    """Stands in for a drafter: drafts a given text, sure of it, and wrong where `is_wrong` says so."""

    def __init__(self, monkeypatch, drafter, target, text, is_wrong):
        number = iter(range(10**6))

        def logits(hidden):
            if not hidden.isnan().any():
                return target.head.logits(hidden)
            rows = torch.zeros(len(hidden), 64)
            for slot in range(len(hidden)):
                place = self.position + slot + 1
                token = text[place] if place < len(text) else 0
                rows[slot, (token + is_wrong(next(number))) % 64] = 9.0
            return rows

        def forward(*, position_ids, **rest):
            self.position = int(position_ids[0, -1]) - drafter.block_size + 1
            out = drafter_forward(position_ids=position_ids, **rest)
            out.last_hidden_state = torch.full_like(out.last_hidden_state, float("nan"))
            return out

        drafter_forward = drafter.forward
        monkeypatch.setattr(drafter, "forward", forward)
        monkeypatch.setattr(target, "logits", logits)


@pytest.fixture(params=wide(FAMILIES, "llama3.1", "qwen3", "smollm2", "gemma2"))  # test_families.py has a gemma3
def family(request) -> str:
    return request.param


@pytest.fixture
def random_target(family) -> Target:
    return make_target(family)


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    """Each test has its own random numbers. What is timed is timed for short."""
    torch.manual_seed(0)
    monkeypatch.setattr("dpace.decode.pace.NUM_ROUNDS", 1)
    monkeypatch.setattr("dpace.plan.speed.TIMING_SECONDS", 0.02)


@pytest.fixture
def run_line(capsys):
    """Run a command line of dpace, which ends with this code; give what it printed."""

    def run(line: str | list[str], code: int = 0):
        found = run_cli(shlex.split(line) if isinstance(line, str) else line)
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed

    return run


@pytest.fixture
def unchecked_types():
    """The type checks of the tests cannot be traced by torch.compile."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", "<|reserved_0|>", "ask", "answer"]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|reserved_0|>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'ask ' if m.role == 'user' else 'answer ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}{{ 'answer' }}{% endif %}"
    )
    return tokenizer


def language_text(rng: random.Random) -> tuple[str, str]:
    """A question and its answer: counting in steps from a start, with a turn that only context can tell."""
    start, step = rng.randrange(40), rng.choice([1, 2, 3])
    words = [f"w{(start + step * i) % 50}" for i in range(24)]
    return f"w{start} w{50 + step}", " ".join(words)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Let one process of a test run fill a folder, which all its processes then read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


LANGUAGE_WEIGHTS = Path(__file__).with_name("language.safetensors")


def make_language_model(family: str) -> PreTrainedModel:
    """A model of the tokenizer, which has learned nothing yet."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


def train_on_language(model: PreTrainedModel) -> None:
    """Train on answers only, with a learning rate that ends at 0.

    Each CPU rounds in its own way, and gets other weights. Trained so, the target gives the right answers on all.
    """
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200)
    for _ in range(200):
        pairs = (language_text(rng) for _ in range(16))
        texts = [f"ask {question} answer {answer} <eos>" for question, answer in pairs]
        token_ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = token_ids.clone()
        labels[:, :4] = -100  # the question
        loss = model(input_ids=token_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def language_target() -> Target:
    """A target that has learned the synthetic language, so that a drafter can: the weights that `main` has written."""
    model = make_language_model("qwen3")
    model.load_state_dict(load_file(LANGUAGE_WEIGHTS))
    speed_up(model)  # as `Target.load` does
    return Target(model, make_tokenizer())


@pytest.fixture(scope="session")
def language_folder(language_target, tmp_path_factory) -> Path:
    """The same target as files."""
    folder = tmp_path_factory.mktemp("target")
    language_target.model.save_pretrained(folder)
    language_target.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def endless_folder(language_folder, tmp_path) -> Path:
    """The same, whose answers end nowhere: it may have nothing to say to prompts in words that it does not know."""
    folder = shutil.copytree(language_folder, tmp_path / "endless")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


BYTE_TOKENS = [*bytes_to_unicode().values(), "ab", "<eos>", "<unk>", "<spare>"]
BYTE_TOKENIZER = {
    "tokenizer_model": "gpt2",
    "token_list": BYTE_TOKENS,
    "token_types": [1] * 257 + [3] * 3,
    "token_merges": ["a b"],
    "eos_token_id": 257,
    "bos_token_id": 257,
    "unk_token_id": 258,
}
"""Facts of a GGUF file whose tokens are bytes."""


def write_target_gguf(
    target: Target,
    path: Path,
    architecture: str = "qwen3",
    *,
    quantized_kind: str | None = None,
    quantization: gguf.GGMLQuantizationType = Q8_0,
    other_tensors: dict[str, torch.Tensor] | None = None,
    **other_facts,
) -> Path:
    """A Qwen2, Qwen3 or Llama target with a tokenizer of bare words, or with one that the facts say.

    Its weights are in f32, but those of modules of `quantized_kind`, such as "down_proj", are in blocks: of 8 bits, or
    of another quantization with any finite numbers, since gguf writes only some.
    """
    config = target.config
    writer = gguf.GGUFWriter(path, architecture)
    facts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": target.layers[0].self_attn.head_dim,
        "value_length": target.layers[0].self_attn.head_dim,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "tokenizer_model": "llama",
        "token_list": [f"w{i}" for i in range(VOCAB)],
        "token_types": [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (VOCAB - 4),
        "eos_token_id": EOS,
        "bos_token_id": 2,
        "unk_token_id": 2,
        "add_bos_token": False,
        **other_facts,
    }
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    tensor_names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    qwen3_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)  # also under another name
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in target.model.named_parameters():
        module, _, suffix = name.rpartition(".")
        weight = parameter.detach().float()
        kind = module.rpartition(".")[2]
        if architecture == "llama" and kind in num_heads:  # llama.cpp rotates neighbours, not halves
            weight = weight.unflatten(0, (num_heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2)
        theirs = f"{tensor_names.get_name(module) or qwen3_names.get_name(module)}.{suffix}"
        if kind == quantized_kind:
            blocks = gguf.quants.quantize(weight.numpy(), Q8_0)
            if quantization != Q8_0:
                shape = gguf.quants.quant_shape_to_byte_shape(weight.shape, quantization)
                blocks = np.random.default_rng(0).integers(0, 0x3C, shape, np.uint8)  # scales in f16 are below 1
            writer.add_tensor(theirs, blocks, raw_dtype=quantization)
        else:
            writer.add_tensor(theirs, weight.numpy())
    for name, tensor in (other_tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def target_gguf(language_target, tmp_path_factory) -> Path:
    return write_target_gguf(language_target, tmp_path_factory.mktemp("gguf") / "target.gguf")


@pytest.fixture(scope="session")
def random_drafter_folder(language_target, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "drafter"
    make_drafter(language_target).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_drafter_gguf(random_drafter_folder, language_target, target_gguf, tmp_path_factory) -> bytes:
    """The same as a file of llama.cpp."""
    names = {"drafter": "x", "output": str(tmp_path_factory.mktemp("gguf")), "target": "some/target"}
    config = ExportConfig(to="gguf", target_gguf=str(target_gguf), **names)
    return export(random_drafter_folder, language_target, config).read_bytes()


@pytest.fixture(scope="session")
def language_prompts() -> list[str]:
    """Distinct questions; the last 10 are held out."""
    rng = random.Random(1)
    return list(dict.fromkeys(language_text(rng)[0] for _ in range(300)))[:60]


@pytest.fixture(scope="session")
def questions(language_target, language_prompts) -> list[list[int]]:
    """The tokens of those that are held out, as the target is asked."""
    return [language_target.tokenizer(f"ask {text} answer")["input_ids"] for text in language_prompts[50:]]


@pytest.fixture(scope="session")
def language_responses(language_target, language_prompts, make_once) -> list[Response]:
    prompts = make_prompts(language_prompts, "language")

    def fill(folder: Path) -> None:
        write_responses(language_target, prompts, folder / "responses.jsonl", RespondConfig(max_new_tokens=32))

    return read_responses(make_once("responses", fill) / "responses.jsonl")


LANGUAGE_RECIPE = Recipe(
    respond=RespondConfig(max_new_tokens=32),
    drafter=DrafterConfig(num_layers=2, num_features=2, block_size=6),
    train=TrainConfig(
        learning_rate=5e-3, max_steps=120, batch_size=8, num_anchors=12, eval_steps=40, logging_steps=20, max_length=64
    ),
)


def make_recipe(drafter: dict | None = None, **train) -> Recipe:
    """The same with other options of the drafter and of training."""
    sizes = replace(LANGUAGE_RECIPE.drafter, **(drafter or {}))
    return replace(LANGUAGE_RECIPE, drafter=sizes, train=replace(LANGUAGE_RECIPE.train, **train))


@pytest.fixture(scope="session")
def language_drafter_folder(language_target, language_responses, make_once) -> Path:
    """A drafter that accepts well above chance, as training writes it."""
    from dpace.training.run import make_datasets, train

    def fill(folder: Path) -> None:
        recipe = replace(LANGUAGE_RECIPE, output=str(folder))
        datasets = make_datasets(language_target, language_responses[:50], language_responses[50:], recipe)
        train(language_target, *datasets, recipe, folder / "drafter")

    return make_once("trained", fill) / "drafter"


@pytest.fixture(scope="session")
def language_drafter(language_drafter_folder) -> Drafter:
    """The same drafter, loaded."""
    return Drafter.from_pretrained(language_drafter_folder, dtype=torch.float32).eval()


@pytest.fixture
def short_demo(tmp_path, monkeypatch) -> None:
    """Recipes of seconds in the place of the demo's."""
    path = tmp_path / "demo.yaml"
    path.write_text(
        "respond: {max_new_tokens: 16}\n"
        "drafter: {num_layers: 1, block_size: 4}\n"
        "train: {max_steps: 4, batch_size: 4, num_anchors: 4, eval_steps: 4}\n"
        "bench: {temperatures: [0.0], widths: [auto, copies], max_new_tokens: 8, num_prompts: 2}\n"
    )
    monkeypatch.setitem(RECIPES, "demo-cpu", path)
    best = tmp_path / "best.yaml"
    best.write_text(
        "drafter: {num_layers: 1, block_size: 4, causal: true, selector: markov_head, selector_width: 8}\n"
        "train: {max_steps: 4, batch_size: 4, num_anchors: 4, eval_steps: 4, grow_blocks: true}\n"
    )
    monkeypatch.setitem(RECIPES, "laptop", best)
    monkeypatch.setitem(demo.QUICK, "prompts", {"limit": 8})
    monkeypatch.setitem(demo.QUICK, "train", {"max_steps": 2, "eval_steps": 2})
    for name, value in {"QUICK_HELDOUT": 2, "OF_EACH_KIND": 1, "KINDS_TOKENS": 8}.items():
        monkeypatch.setattr(demo, name, value)


def main() -> None:
    """Train the target of the tests and write its weights, where its language or its sizes are meant to change."""
    model = make_language_model("qwen3")
    train_on_language(model)
    save_file(model.state_dict(), LANGUAGE_WEIGHTS)


if __name__ == "__main__":
    main()
