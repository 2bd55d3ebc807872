"""Targets that people have: LoRA adapters, quantized, for images too, on several devices; or a reason in one line."""

import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpace.config import DrafterConfig, Recipe
from dpace.decode import generate, generate_plain
from dpace.fast.speed_up import speed_up
from dpace.plan import plan_recipe
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, encode_chat
from dpace.target.files import count_layers, find_adapter
from tests.support.families import make_sharp_target
from tests.support.files import QUERY, change_config, changed_weights, write_adapter
from tests.support.models import make_drafter, make_target, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
PROMPT, LENGTH = [5, 9, 12, 7, 30], 20


def write(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A target and its folder, in a shape that can be quantized in blocks; tests change copies."""
    target = make_sharp_target("llama", hidden_size=128, intermediate_size=128, head_dim=32)
    return target, write(target.model, tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def folder(base, tmp_path):
    return shutil.copytree(base[1], tmp_path / "base")


def assert_decodes(target):
    """Drafted and plain text are those of transformers, and hidden states do not depend on the padding."""
    ids = torch.tensor([PROMPT])
    text = target.model.generate(ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    assert len(set(text)) > 3
    assert generate_plain(target, PROMPT, max_new_tokens=LENGTH).token_ids == text
    drafter = make_drafter(target, block_size=4, target_layer_ids=[0, 2])
    assert generate(target, drafter, PROMPT, max_new_tokens=LENGTH, width="full").token_ids == text
    padded = target.features(torch.tensor([PROMPT + [0, 0]]), [0, 2])
    torch.testing.assert_close(padded[:, :5], target.features(ids, [0, 2]), rtol=1e-3, atol=1e-3)
    return text


def test_a_lora_adapter_is_merged(base, folder):
    lora = write_adapter(folder)
    down, up = (load_file(lora / "adapter_model.safetensors")[f"{QUERY}{name}.weight"] for name in "AB")
    target = Target.load(str(lora))
    expected = dict(base[0].model.state_dict())
    changed = "model.layers.1.self_attn.q_proj.weight"
    expected[changed] = expected[changed] + 2 * up @ down  # lora_alpha / r
    for name, weight in target.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert target.name == str(lora) and target.layers[1].fast and count_layers(str(lora)) == 4
    assert assert_decodes(target) != assert_decodes(base[0])
    shutil.copy(folder / "model.safetensors", lora)
    assert find_adapter(str(lora)) is None  # with whole weights it is a model


# What is refused in one line: each changes a copy of the base, and returns the folder that is then named.


def incomplete_adapter(folder):
    lora = write_adapter(folder)
    with changed_weights(lora, "adapter_model.safetensors") as weights:
        weights[f"{QUERY}A.weight".replace("1", "2")] = weights.pop(f"{QUERY}A.weight")
    return lora


def to_pickle(folder):
    """Where a folder has nothing else, a pickle would be read."""
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def lacks_a_file(folder):
    files = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    files["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def raw(name, text):
    return lambda folder: (folder / name).write_text(text) and folder


def adapter(**changes):
    return lambda folder: write_adapter(folder, **changes)


def quantized(**settings):
    return lambda folder: change_config(folder, quantization_config=settings)


REFUSED = {
    "of kind 'PREFIX_TUNING' .* expected LORA": adapter(peft_type="PREFIX_TUNING"),
    "base .* there is no folder /no/model": adapter(base_model_name_or_path="/no/model"),
    "lack base_model.model.model.layers.1": incomplete_adapter,
    "whose weights are quantized; merging would": lambda f: write_adapter(quantized(quant_method="fp8")(f)),
    r"no weights in safetensors, and a pickle \(\*.bin\) is not read": to_pickle,
    "since it may run code": lambda f: to_pickle(change_config(f, transformers_weights="pytorch_model.bin")),
    "model-00002-of-00002.safetensors": lacks_a_file,
    "generation_config.json is not JSON": raw("generation_config.json", '{"eos'),
    "eos_token_id is 'a', exp": raw("generation_config.json", '{"eos_token_id": "a"}'),
    "cannot load the target .*: Expecting property name": raw("tokenizer.json", "{"),
    "quantized in a way that transformers does not have .*'none'": quantized(quant_method="none"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(words, folder):
    name = str(REFUSED[words](folder))
    with pytest.raises((ValueError, OSError), match=words) as error:
        _ = Target.load(name).stop_token_ids
    assert "\n" not in str(error.value)
    if "_config.json" in words or "eos" in words or "Expecting" in words:
        with pytest.raises(ValueError, match=words):
            ChatTokenizer.load(name)


# quantized targets


def write_fp8(folder, copy):
    """A copy whose layers have weights in 8 bits, one scale for each block of 128 x 128, as DeepSeek and Qwen do."""
    shutil.copytree(folder, copy)
    with changed_weights(copy) as weights:
        for name in [name for name in weights if "proj" in name]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    return quantized(quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")(copy)


def test_fp8_is_read_with_its_scales(base, tmp_path):
    """On a CPU, transformers turns it back into plain weights."""
    target = Target.load(str(write_fp8(base[1], tmp_path / "fp8")))
    weight = base[0].layers[1].mlp.up_proj.weight
    found = target.layers[1].mlp.up_proj.weight.float()
    assert 0 < (found - weight).norm() / weight.norm() < 0.05
    assert_decodes(target)


@pytest.mark.parametrize(
    ("package", "make_config"),
    [
        ("bitsandbytes", lambda _: transformers.BitsAndBytesConfig(load_in_4bit=True)),
        ("torchao.quantization", lambda torchao: transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())),
    ],
)
def test_quantized_layers_run_as_they_are(package, make_config, base, tmp_path):
    config = make_config(pytest.importorskip(package))
    options = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base[1], **options)
    target = Target.load(str(write(model, tmp_path / "quantized")))
    layer, expected = (part.self_attn.q_proj for part in (target.layers[0], model.model.layers[0]))
    assert type(layer) is type(expected) and type(layer.weight) is type(expected.weight)
    assert not hasattr(target.layers[0], "fast")
    assert_decodes(target)


def quantize(module):
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)


def add_bias(module):
    module.bias = torch.nn.Parameter(torch.full((64,), 1e-4))


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("lm_head", quantize, r"is quantized \(PackedLinear\); drafters share it"),
        ("model.embed_tokens", quantize, r"is quantized \(Embedding\); drafters share it"),
        ("lm_head", add_bias, "has a bias"),
    ],
)
def test_a_table_that_drafters_cannot_share_is_refused(part, change, reason):
    model = make_sharp_target("llama").model
    change(model.get_submodule(part))
    with pytest.raises(ValueError, match=reason):
        Target(model)


# text


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    """transformers makes an empty one for some families where there are no files."""
    make_target("qwen3", vocab_size=63).model.save_pretrained(tmp_path)
    message = {"role": "user", "content": "w57"}
    for target in (Target.load(str(tmp_path)), ChatTokenizer.load(str(tmp_path))):
        with pytest.raises(ValueError, match="gives no token, .* the files of its tokenizer"):
            encode_chat(target, [message])
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives the token 63, and its embedding has 63 rows; copy both again"):
        encode_chat(Target.load(str(tmp_path)), [message])


def test_a_vision_language_model_is_used_for_text(tmp_path):
    """And planned for, from its config alone."""
    model = make_sharp_target("qwen3-vl moe").model
    name = str(write(model, tmp_path))
    target = Target.load(name)
    assert type(target.model) is type(model) and count_layers(name) == 4
    assert_decodes(target)
    plan = plan_recipe(Recipe(target=name, drafter=DrafterConfig(num_layers=1)), np.full((2, 1), 9.0))
    assert plan.target.num_layers == 4 and ChatTokenizer.load(name).context == 256


# devices


def test_hooks_of_accelerate_run_in_every_pass(base):
    """A layer that fused code or a packed product would pass by is seen as a hook that did not run."""
    model = AutoModelForCausalLM.from_pretrained(base[1])
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places = dict.fromkeys([*parts, *(f"model.layers.{i}" for i in range(4))], "cpu")
    model = dispatch_model(model, places, force_hooks=True)
    speed_up(model)
    target = Target(model)
    assert assert_decodes(target) == assert_decodes(base[0])
    for layer in target.layers:
        layer._hf_hook.pre_forward = Mock(side_effect=layer._hf_hook.pre_forward)
    generate_plain(target, PROMPT, max_new_tokens=LENGTH)
    assert [layer._hf_hook.pre_forward.call_count for layer in target.layers] == 4 * [LENGTH]


@pytest.mark.parametrize(("places", "is_refused"), [([0, 1], False), ([0, "cpu"], True), (["cpu"], False)])
def test_a_target_that_is_in_part_on_no_gpu_is_refused(places, is_refused, base, monkeypatch):
    """Where all is on the CPU, there is no GPU; with ranks, each would take all GPUs."""
    monkeypatch.setattr("transformers.PreTrainedModel.hf_device_map", dict(enumerate(places)), raising=False)
    if is_refused:
        with pytest.raises(ValueError, match="does not fit into the GPUs: its parts would be on 0, cpu"):
            Target.load(str(base[1]))
    else:
        assert Target.load(str(base[1])).is_spread == (len(places) > 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun starts several"):
        Target.load(str(base[1]), device_map="auto")
