"""Targets that people have: LoRA adapters, quantized, for images too, on several devices; or a reason in one line."""

import json
import os
import shutil
import sys

import pytest
import torch
import transformers
from accelerate import dispatch_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpace.cli import main
from dpace.decode import generate, generate_plain
from dpace.engines.export import count_layers
from dpace.fast.speed_up import speed_up
from dpace.target import Target
from dpace.target.chat import ChatTokenizer, encode_chat
from dpace.target.files import find_target_files
from tests.conftest import make_drafter, make_target, make_tokenizer
from tests.support.families import make_sharp_target
from tests.support.files import change_config, changed_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
PROMPT, LENGTH = [5, 9, 12, 7, 30], 20
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
"""A shape that can be quantized in blocks."""


def write(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A target and its folder; tests change copies."""
    target = make_sharp_target("llama", **WIDE)
    return target, write(target.model, tmp_path_factory.mktemp("base") / "base")


def assert_decodes(target, expected=None):
    """Drafted and plain text are those of transformers, and hidden states do not depend on the padding."""
    ids = torch.tensor([PROMPT])
    text = target.model.generate(ids, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)[0, 5:].tolist()
    assert len(set(text)) > 3 and (expected is None or text == expected)
    assert generate_plain(target, PROMPT, max_new_tokens=LENGTH).token_ids == text
    drafter = make_drafter(target, block_size=4, target_layer_ids=[0, 2])
    assert generate(target, drafter, PROMPT, max_new_tokens=LENGTH, width="full").token_ids == text
    padded = target.features(torch.tensor([PROMPT + [0, 0]]), [0, 2])
    torch.testing.assert_close(padded[:, :5], target.features(ids, [0, 2]), rtol=1e-3, atol=1e-3)
    assert len(target.sha256) == 64
    return text


def refused(folder, words, **options):
    """A folder is refused in one line."""
    with pytest.raises(ValueError, match=words) as error:
        Target.load(str(folder), **options)
    assert "\n" not in str(error.value)


# adapters


def write_adapter(folder, base_folder, width=128, **changes):
    """An adapter as peft writes it, without peft: rank 2 on one layer's query projection."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_folder)}
    settings |= {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], **changes}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.manual_seed(1)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    weights = {f"{name}A.weight": torch.randn(2, width), f"{name}B.weight": torch.randn(128, 2)}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return weights


def test_a_lora_adapter_is_merged(base, tmp_path):
    pytest.importorskip("peft")
    original, folder = base
    down, up = write_adapter(tmp_path / "lora", folder).values()
    target = Target.load(str(tmp_path / "lora"))
    expected = dict(original.model.state_dict())
    changed = "model.layers.1.self_attn.q_proj.weight"
    expected[changed] = expected[changed] + 2 * up @ down  # lora_alpha / r
    for name, weight in target.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert target.name == str(tmp_path / "lora") and target.layers[1].fast
    assert assert_decodes(target) != assert_decodes(original)
    with changed_weights(tmp_path / "lora", "adapter_model.safetensors") as weights:
        weights["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"] = weights.popitem()[1]
    refused(tmp_path / "lora", "lack base_model.model.model.layers.1")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"peft_type": "PREFIX_TUNING"}, "of kind 'PREFIX_TUNING', expected LORA"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/no/such/model"}, "of /no/such/model, which cannot be read"),
        ({}, "peft, which merges it, is missing: run `pip install peft`"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_one_line(changes, reason, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    write_adapter(tmp_path / "lora", base[1], **changes)
    refused(tmp_path / "lora", reason)


@pytest.mark.parametrize("changes", [{"lora_bias": True}, {"alora_invocation_tokens": [5]}])
def test_an_adapter_that_peft_cannot_merge_is_one_line(changes, base, tmp_path):
    pytest.importorskip("peft")
    weights = write_adapter(tmp_path / "lora", base[1], **changes)
    if "lora_bias" in changes:
        bias = {"base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias": torch.ones(128)}
        save_file(weights | bias, tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "lora", "name the base alone")


def test_an_adapter_of_a_quantized_base_is_refused_and_its_layers_are_counted(base, tmp_path):
    folder = shutil.copytree(base[1], tmp_path / "base")
    write_adapter(tmp_path / "lora", folder)
    assert count_layers(str(tmp_path / "lora")) == 4
    change_config(folder, quantization_config={"quant_method": "fp8"})
    refused(tmp_path / "lora", "whose weights are quantized; merging would round them anew")
    shutil.copy(folder / "model.safetensors", tmp_path / "lora")  # whole weights: no adapter any more
    assert find_target_files(str(folder)).adapter is None


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "named in the config", "adapter_model.bin"])
def test_a_pickle_is_not_read(kind, base, tmp_path, capsys):
    """It would be, where a folder has nothing else; the line says how to convert it."""
    folder, weights = tmp_path / "base", "model.safetensors"
    if kind == "adapter_model.bin":
        pytest.importorskip("peft")
        folder, weights = tmp_path / "lora", "adapter_model.safetensors"
        write_adapter(folder, base[1])
    else:
        shutil.copytree(base[1], folder)
    state = load_file(folder / weights)
    (folder / weights).unlink()
    name = "pytorch_model.bin" if kind == "pytorch_model.bin" else "adapter_model.bin"
    torch.save(state, folder / name)
    if kind == "named in the config":
        change_config(folder, transformers_weights=name)
    assert main(["generate", "--target", str(folder), "--prompt", "w3", "--max-new-tokens", "4"]) == 1
    error = capsys.readouterr().err
    assert "has no weights in safetensors, and a pickle (*.bin) is not read" in error and "save_pretrained" in error


def test_an_incomplete_copy_is_named(base, tmp_path, capsys):
    folder = shutil.copytree(base[1], tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = {name: "model-00001-of-00002.safetensors" for name in load_file(base[1] / "model.safetensors")}
    files["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert main(["generate", "--target", str(folder), "--prompt", "w3"]) == 1
    error = capsys.readouterr().err
    assert "model-00002-of-00002.safetensors" in error and "pickle" not in error


def test_a_pickle_on_the_hub_is_not_converted_there(base, monkeypatch):
    """transformers would ask a bot for it, and load what is proposed as a change of the repository."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    folder = str(base[1])
    files = find_target_files(folder)._replace(base="someone/model")
    monkeypatch.setattr("dpace.target.files.find_target_files", lambda _: files)
    monkeypatch.setattr("transformers.modeling_utils.is_offline_mode", lambda: False)
    monkeypatch.setattr("transformers.modeling_utils.cached_file", lambda *_, **__: None)
    monkeypatch.setattr("transformers.utils.peft_utils.cached_file", lambda *_, **__: None)
    asked = []
    monkeypatch.setattr(
        "transformers.modeling_utils.auto_conversion", lambda *_, **__: asked.append(1) or (None, None, False)
    )
    with pytest.raises(OSError, match="a pickle .* is not read"):
        Target.load(folder)
    assert not asked


def test_a_config_does_not_choose_the_attention_of_a_sharded_target(base, tmp_path, monkeypatch):
    """Where only its layers are looked for first."""
    folder = change_config(shutil.copytree(base[1], tmp_path / "base"), _attn_implementation="someone/kernel")
    monkeypatch.setattr("dpace.target.files.ranks.num_ranks", lambda: 2)
    monkeypatch.setattr("dpace.target.files.ranks.barrier", lambda: None)
    plans = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **options: plans.append(options) or 1 / 0)
    refused(folder, "division by zero", shard="fsdp")
    assert plans[0]["distributed_config"].fsdp_plan == {"model.layers.*": "free_full_weight"}


# quantized targets


def write_fp8(base, folder):
    """Weights of the layers in 8 bits with one scale for each block of 128 x 128, as DeepSeek's and Qwen's are."""
    shutil.copytree(base[1], folder)
    with changed_weights(folder) as weights:
        for name in [name for name in weights if "proj" in name]:
            scale = weights[name].abs().max() / 448
            weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return change_config(folder, quantization_config=settings)


def test_fp8_is_read_with_its_scales(base, tmp_path):
    """On a CPU, transformers turns it back into plain weights."""
    target = Target.load(str(write_fp8(base, tmp_path / "fp8")))
    weight = base[0].model.model.layers[1].mlp.up_proj.weight
    found = target.model.model.layers[1].mlp.up_proj.weight.float()
    assert 0 < (found - weight).norm() / weight.norm() < 0.05
    assert_decodes(target)


@pytest.mark.parametrize("method", ["bnb-4", "torchao-int8"])
def test_quantized_layers_run_as_they_are(method, base, tmp_path):
    if method == "bnb-4":
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    else:
        quantization = pytest.importorskip("torchao.quantization")
        config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    options = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}
    quantized = AutoModelForCausalLM.from_pretrained(base[1], **options)
    target = Target.load(str(write(quantized, tmp_path / "quantized")))
    layer = target.layers[0].self_attn.q_proj
    assert type(layer) is type(quantized.model.layers[0].self_attn.q_proj)
    assert type(layer.weight) is type(quantized.model.layers[0].self_attn.q_proj.weight)
    assert not hasattr(target.layers[0], "fast")
    assert_decodes(target)


def test_a_missing_package_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    folder = shutil.copytree(base[1], tmp_path / "awq")
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    refused(folder, r"is quantized \(awq\).*pip install gptqmodel")


def test_stop_tokens_and_a_tokenizer_that_do_not_fit_are_one_line(tmp_path, capsys):
    make_target("qwen3", vocab_size=60).model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    args = ["generate", "--target", str(tmp_path), "--max-new-tokens", "4", "--prompt"]
    assert main([*args, "w1 w2"]) == 0
    assert main([*args, "w1 w57"]) == 1
    assert "gives the token 63, and its embedding has 60 rows; copy both again" in capsys.readouterr().err
    for eos in ("text", [1, "text"], 1.5, -1, [1, 60]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert main([*args, "w1"]) == 1
        assert f"the target's eos_token_id is {eos!r}, expected a token's number, 0 to 59" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", '{"eos', "generation_config.json is not JSON"),
        ("generation_config.json", "[]", "generation_config.json holds list, expected an object"),
        ("tokenizer.json", "{", "cannot load the target .*/base: Expecting property name"),
        ("config.json", {"quant_method": "none"}, "quantized in a way that transformers does not have .*'none'"),
        ("config.json", {"bits": 4}, "no `quant_method`"),
    ],
)
def test_what_transformers_would_leave_out_in_silence_is_refused(name, text, words, base, tmp_path):
    folder = shutil.copytree(base[1], tmp_path / "base")
    if isinstance(text, dict):
        change_config(folder, quantization_config=text)
    else:
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            ChatTokenizer.load(str(folder))
    refused(folder, words)


def test_text_needs_the_files_of_a_tokenizer(tmp_path):
    """Without them, transformers makes an empty one for some families."""
    make_target("qwen3").model.save_pretrained(tmp_path)
    for target in (Target.load(str(tmp_path)), ChatTokenizer.load(str(tmp_path))):
        with pytest.raises(ValueError, match="gives no token, .* the files of its tokenizer"):
            encode_chat(target, [{"role": "user", "content": "w1"}])


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


# devices


def test_hooks_of_accelerate_run_in_every_pass(base):
    """A layer that fused code or a packed product would pass by is seen as a hook that did not run."""
    expected = assert_decodes(base[0])
    model = AutoModelForCausalLM.from_pretrained(base[1])
    parts = ["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"]
    places = dict.fromkeys([*parts, *(f"model.layers.{i}" for i in range(4))], "cpu")
    model = dispatch_model(model, places, force_hooks=True)
    assert speed_up(model) == []
    target, ran = Target(model), []
    for layer in target.layers:
        forward = layer._hf_hook.pre_forward
        layer._hf_hook.pre_forward = lambda *a, forward=forward, **kw: (ran.append(1), forward(*a, **kw))[1]
    assert_decodes(target, expected)
    ran.clear()
    generate_plain(target, PROMPT, max_new_tokens=LENGTH)
    assert len(ran) == 4 * LENGTH


def test_device_map_of_one_device_is_a_plain_target(base, monkeypatch):
    target = Target.load(str(base[1]), device_map="auto")
    assert not target.is_spread and target.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    refused(base[1], "torchrun starts several", device_map="auto")


@pytest.mark.parametrize("outside, is_refused", [(0, False), (3, True), (8, False)])
def test_a_target_that_is_in_part_on_no_gpu_is_refused(outside, is_refused, base, monkeypatch):
    """8 of 8: there is no GPU."""
    places = {f"part {i}": "cpu" if i < outside else 0 for i in range(8)}
    load = AutoModelForCausalLM.from_pretrained

    def load_in_parts(*args, **options):
        model, info = load(*args, **options)
        model.hf_device_map = places
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_in_parts)
    if is_refused:
        refused(base[1], "3 of its 8 parts would stay outside", device_map="auto")
    else:
        Target.load(str(base[1]), device_map="auto")


# text of models that also read images


def test_a_vision_language_model_is_used_for_text(tmp_path):
    model = make_sharp_target("qwen3-vl moe").model
    write(model, tmp_path / "vl")
    target = Target.load(str(tmp_path / "vl"))
    assert type(target.model) is type(model) and count_layers(str(tmp_path / "vl")) == 4
    assert_decodes(target)
