"""What is exported is the drafter, for each engine that runs here; what others wrote is taken over as it is."""

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub.utils import filter_repo_objects
from llamacpp import run_llamacpp
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import dpace.engines.export
import dpace.modeling_dflash
from dpace.cli import main
from dpace.config import BenchConfig
from dpace.decode.decoder import generate_batch
from dpace.decode.loop import generate_plain
from dpace.drafter import Drafter, load_drafter
from dpace.drafter.spec import DrafterSpec
from dpace.engines.export import export, import_drafter, read_drafter
from dpace.engines.gguf import read_gguf
from dpace.engines.published import read_folder
from dpace.measure.benchmark import bench
from dpace.target import Target
from dpace.train.run import make_datasets, train
from tests.conftest import EOS, decode_whole, make_drafter, make_recipe, make_target, write_target_gguf
from tests.support.files import change_config, changed_weights, make_prompts, read_json
from tests.unit.target.test_target_files import write_fp8

TO_READ = ["zlab", "speculators", "gguf"]
MAX_NEW_TOKENS = 40
"""More than any response here has, so that no engine drafts less at the end."""
KINDS = {"random": (1.0, 1.3), "half-trained": (1.3, 5.0), "overfitted": (3.0, 6.1), "convolutions": (1.5, 6.1)}
WINDOWS = {
    "windows": {"sliding_window": 8},
    "causal windows": {"sliding_window": 8, "causal": True},
    "mixed layers": {"sliding_window": 8, "full_layers": (1,)},
    "causal": {"causal": True},
}
REFUSED = [("speculators", "causal")]
KINDS |= dict.fromkeys(WINDOWS, (1.5, 6.1))
"""Drafters of blocks of 6, by tau.

The first shows exactness only, the second also wrong features, the third long runs, up to whole blocks. The fourth has
DFlash2's convolutions. The others have windows of fewer tokens than any prompt, or causal blocks."""
quiet = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")


@pytest.fixture(scope="session")
def folder(language_drafter_folder, tmp_path_factory) -> Path:
    """In fp32, and with values that 16 bits change."""
    folder = tmp_path_factory.mktemp("trained") / "drafter"
    drafter = Drafter.from_pretrained(language_drafter_folder, dtype=torch.float32).requires_grad_(False)
    for parameter in drafter.parameters():
        parameter.mul_(1.001)
    drafter.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(questions) -> list[list[int]]:
    return questions[:6]


@pytest.fixture(scope="session")
def folders(folder, language_target, language_responses, make_once) -> dict[str, Path]:
    """A drafter of each kind; the overfitted one has been trained on the responses to the very prompts."""

    def fill(made: Path) -> None:
        make_drafter(language_target, block_size=6).save_pretrained(made / "random")
        recipe = make_recipe(max_steps=60, batch_size=6, num_anchors=24)
        datasets = make_datasets(language_target, language_responses[50:56], [], recipe)
        train(language_target, *datasets, recipe, made / "overfitted")
        for kind, options in {"convolutions": {"conv_kernel_size": 2}, **WINDOWS}.items():
            other = replace(recipe, drafter=replace(recipe.drafter, **options))
            train(language_target, *datasets, other, made / kind)

    made = make_once("kinds", fill)
    return {kind: made / kind for kind in KINDS} | {"half-trained": folder}


@pytest.fixture
def do_export(language_target, folders, target_gguf, tmp_path):
    def run(to, kind="half-trained", folder=None, **options):
        settings = {"output": tmp_path / to, "name": "tiny-dflash", "target_name": "some/target"}
        settings["target_gguf"] = target_gguf
        return export(folder or folders[kind], language_target, to=to, **{**settings, **options})

    return run


def edit(folder: Path, path: Path, **changes) -> Path:
    """A copy with another config; None removes a key."""
    return change_config(shutil.copytree(folder, path), **changes)


PAIRS = [(to, kind) for to in TO_READ for kind in ("half-trained", *WINDOWS) if (to, kind) not in REFUSED]


@pytest.mark.parametrize(("to", "kind"), [*PAIRS, ("gguf", "convolutions")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_out_and_in_again_is_the_same_drafter(to, kind, dtype, do_export, folders, language_folder, tmp_path):
    folder = folders[kind]
    done = do_export(to, kind, dtype=dtype)
    weights = read_folder(folder)[1]
    assert done.num_tensors == len(weights) == (36 if kind == "convolutions" else 25)
    assert (done.rounding == 0) == (dtype in (None, weights["fc.weight"].dtype)) and done.rounding < 0.01
    again = import_drafter(done.path, tmp_path / "again", target=str(language_folder))
    files = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in weights.items():
        expected = tensor.to(torch.float32 if to == "gguf" and tensor.dim() != 2 else dtype or tensor.dtype)
        assert files[name].dtype == expected.dtype and torch.equal(files[name], expected), name
    assert again.spec == read_folder(folder)[0]


def test_save_is_export(do_export, folder):
    for to in ("zlab", "sglang", "vllm"):
        path = do_export(to).path
        for name in ("model.safetensors", "modeling_dflash.py"):
            assert (path / name).read_bytes() == (folder / name).read_bytes()
        assert read_json(path / "config.json") == read_json(folder / "config.json")


def test_each_engine_is_told_in_its_own_counting(do_export, language_drafter):
    ids = language_drafter.target_layer_ids
    config = read_json(do_export("zlab").path / "config.json")
    assert config["dflash_config"]["target_layer_ids"] == config["target_layer_ids"] == ids
    assert config["block_size"] == 6 and config["auto_map"]["AutoModel"] == "modeling_dflash.DFlashDraftModel"
    config = read_json(do_export("speculators").path / "config.json")
    assert config["aux_hidden_state_layer_ids"] == [i + 1 for i in ids]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["sliding_window_non_causal"] is True
    assert config["transformer_layer_config"]["head_dim"] == 32
    fields = gguf.GGUFReader(do_export("gguf").path).fields
    assert fields["dflash.target_layers"].contents() == [i + 1 for i in ids]
    assert fields["dflash.block_size"].contents() == 6 and fields["dflash.attention.causal"].contents() is False
    assert fields["tokenizer.ggml.mask_token_id"].contents() == language_drafter.mask_token_id
    assert fields["tokenizer.ggml.eos_token_id"].contents() == EOS
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 64


def test_a_file_that_says_something_else_is_refused(do_export, monkeypatch):
    right = dpace.engines.export.speculators_config

    def shifted(spec, **options):
        config = right(spec, **options)
        return config | {"aux_hidden_state_layer_ids": list(spec.target_layer_ids)}

    monkeypatch.setattr(dpace.engines.export, "speculators_config", shifted)
    with pytest.raises(ValueError, match="does not read back as it was written .target_layer_ids"):
        do_export("speculators")
    monkeypatch.setattr(
        dpace.engines.export,
        "save_file",
        lambda tensors, path, **_: save_file({**tensors, "norm.weight": tensors["norm.weight"] * 2}, path),
    )
    monkeypatch.setattr(dpace.engines.export, "speculators_config", right)
    with pytest.raises(ValueError, match="norm.weight"):
        do_export("speculators")


def test_other_spellings_are_read(folder, tmp_path):
    expected, weights = read_folder(folder)
    ids, mask = list(expected.target_layer_ids), expected.mask_token_id
    nested = {"block_size": 6, "target_layer_ids": ids, "mask_token_id": mask}
    no_top = {"block_size": None, "target_layer_ids": None, "mask_token_id": None}
    old_rope = {"rope_parameters": None, "rope_scaling": None, "rope_theta": expected.rope["rope_theta"]}
    for number, changes in enumerate(
        [
            {"dflash_config": nested, **no_top},
            {"dflash_config": None},
            old_rope,
            {"is_causal": None, "rope_theta": None},
        ]
    ):
        assert read_folder(edit(folder, tmp_path / str(number), **changes))[0] == expected
    theirs = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    for names in ({name: f"model.{name}" for name in weights}, {name: theirs.get(name, name) for name in weights}):
        other = edit(folder, tmp_path / names["fc.weight"])
        save_file({names[name]: tensor for name, tensor in weights.items()}, other / "model.safetensors")
        again = read_drafter(other)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


def test_layers_of_which_some_are_causal(folders, do_export, tmp_path):
    """Published drafters of mixed layers that do not say whether they are causal: the sliding layers are."""
    path = edit(folders["mixed layers"], tmp_path / "x", is_causal=None)
    spec, _ = read_folder(path)
    assert spec.is_causal == "sliding"
    assert [reach.is_causal for reach in Drafter.from_pretrained(path).reaches.values()] == [True, False]
    for to in ("zlab", "speculators"):
        assert read_folder(do_export(to, folder=path).path, num_target_layers=6)[0] == spec
    with pytest.raises(ValueError, match="is_causal is not set"):
        do_export("gguf", folder=path)
    with pytest.raises(ValueError, match="is_causal is true"):
        do_export("speculators", "causal")


def test_scaled_rope_and_scales_survive(tmp_path):
    for family in ("llama3.1", "gemma2"):
        drafter = make_drafter(make_target(family))
        drafter.save_pretrained(tmp_path / family)
        again = read_drafter(tmp_path / family)
        assert again.spec == drafter.spec
        ids = torch.arange(12)[None]
        assert torch.equal(*(torch.stack(d.rotary_emb(torch.zeros(1), ids)) for d in (drafter, again)))
    assert again.spec.embed_scale > 1 and again.spec.softcap


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dflash_config": {"block_size": 8}}, "block_size is 8 in dflash_config and 6 at the top level"),
        ({"rope_theta": 1.0}, "rope_theta is .* make them equal"),
        ({"rope_theta": None, "rope_parameters": None}, "no rope_theta; engines would silently take 10000"),
        ({"head_dim": None}, "no head_dim"),
        ({"architectures": ["DFlash2DraftModel"]}, "no conv_kernel_size"),
        ({"dflash_config": {"selector_rank": 256}}, "candidate selector of rank 256"),
        ({"layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "layer_types has 3 entries"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types is"),
        ({"layer_types": None, "use_sliding_window": True}, "no layer_types"),
        ({"is_causal": 1}, "is_causal is 1"),
        ({"dflash_config": {"causal": True}}, "causal is True in dflash_config and False at the top level"),
        ({"dflash_config": {"use_swa": True}}, "dflash_config.use_swa"),
        ({"attention_value_scale": 2.0}, "attention_value_scale"),
        ({"quantization_config": {"quant_method": "none"}}, r"is quantized \('none'\): transformers does not"),
        ({"num_hidden_layers": 3}, "missing .*layers.2"),
        ({"intermediate_size": 32}, "shape"),
    ],
)
def test_what_is_not_known_is_not_taken_over(changes, reason, folder, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read_drafter(edit(folder, tmp_path / "x", **changes))


def test_quantized_weights_are_imported_as_plain_numbers(folder, language_folder, tmp_path, monkeypatch, capsys):
    """As transformers reads them; a package that is missing is named."""
    quantized = write_fp8((None, folder), tmp_path / "fp8")
    assert main(["generate", *f"--target {language_folder} --drafter {quantized} --prompt w1".split()]) == 1
    assert "method 'fp8'" in (error := capsys.readouterr().err) and "dpace import" in error
    assert main(["import", str(quantized), "--output", str(tmp_path / "plain")]) == 0
    before, found = (read_drafter(path).state_dict() for path in (folder, tmp_path / "plain"))
    for name, weight in before.items():
        error = (found[name] - weight).norm() / weight.norm()
        assert 0 < error < 0.05 if "proj" in name else error == 0
    capsys.readouterr()
    monkeypatch.setattr("transformers.quantizers.quantizer_awq.is_gptqmodel_available", lambda: False)
    edit(folder, tmp_path / "awq", quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    assert main(["import", str(tmp_path / "awq"), "--output", str(tmp_path / "none")]) == 1
    assert re.search(r"is quantized \('awq'\).*pip install gptqmodel", capsys.readouterr().err)
    with changed_weights(quantized) as weights:
        weights["other"] = weights["norm.weight"]
    with pytest.raises(ValueError, match=r"not the tensors of a DFlash drafter: \['other'\]"):
        read_drafter(quantized)


def test_a_trained_selector_is_refused(folders, tmp_path):
    shutil.copytree(folders["convolutions"], tmp_path / "x")
    with changed_weights(tmp_path / "x") as weights:
        weights["candidate_selector.successor_codebook"][3] = 1
    with pytest.raises(ValueError, match="trained candidate selector"):
        import_drafter(tmp_path / "x", tmp_path / "out")
    with pytest.raises(ValueError, match="trained candidate selector"):
        Drafter.from_pretrained(tmp_path / "x")


def test_speculators_has_no_convolutions(do_export):
    with pytest.raises(ValueError, match="conv_kernel_size is 2, which"):
        do_export("speculators", "convolutions")


def test_other_tensors_and_missing_folders_are_refused(folder, tmp_path):
    own = edit(folder, tmp_path / "own")
    with changed_weights(own) as weights:
        weights["mask_hidden"] = torch.zeros(48)
    with pytest.raises(ValueError, match="unknown .'mask_hidden'"):
        import_drafter(own, tmp_path / "out")
    with pytest.raises(ValueError, match="not a drafter's folder"):
        import_drafter(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="own folder"):
        import_drafter(own, own)


def test_gguf_files_that_do_not_fit_are_refused(do_export, language_folder, target_gguf, tmp_path):
    with pytest.raises(ValueError, match="--target-gguf"):
        do_export("gguf", target_gguf=None)
    with pytest.raises(ValueError, match="there is no file"):
        do_export("gguf", target_gguf=tmp_path / "nothing.gguf")
    other = write_target_gguf(
        make_target("qwen3", num_hidden_layers=5, layer_types=["full_attention"] * 5), tmp_path / "other.gguf"
    )
    with pytest.raises(ValueError, match="num_target_layers 5 and the drafter's target 6"):
        do_export("gguf", target_gguf=other)
    with pytest.raises(ValueError, match="architecture 'qwen3'"):
        import_drafter(target_gguf, tmp_path / "out", target=str(language_folder))
    path = do_export("gguf").path
    with pytest.raises(ValueError, match="--target"):
        import_drafter(path, tmp_path / "out")
    data = np.zeros((2, 292), np.uint8)
    kind = gguf.GGMLQuantizationType.Q8_K
    tensor = type("Tensor", (), {"name": "fc.weight", "tensor_type": kind, "data": data, "shape": (256, 2)})
    with pytest.raises(ValueError, match="quantized .Q8_K., which the package gguf cannot read"):
        dpace.engines.gguf._read_gguf_tensor(tensor)
    rope = {**read_gguf(path, num_target_layers=6)[0].rope, "rope_type": "llama3"}
    spec = DrafterSpec(**{**vars(read_gguf(path, num_target_layers=6)[0]), "rope": rope})
    with pytest.raises(ValueError, match="rope_type is 'llama3'"):
        dpace.engines.gguf.write_gguf(tmp_path / "x.gguf", spec, {}, target_gguf=target_gguf)


def decode_and_count(target: Target, decode, token_ids: list[int]) -> tuple[list[int], int]:
    """Text and verifications of a loop that calls our target: its forward passes after the first."""
    calls = []
    hook = target.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        output = decode(torch.tensor([token_ids]))
    finally:
        hook.remove()
    return output[0, len(token_ids) :].tolist(), len(calls) - 1


def our_steps(target: Target, drafter: Drafter, prompts) -> list[tuple[list[int], int]]:
    """The same of our decoder."""
    done = decode_whole(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    return [(out.token_ids, len(out.widths)) for out in done]


@pytest.fixture(scope="session")
def expected(folders, language_target, prompts) -> dict[str, list[tuple[list[int], int]]]:
    """What our decoder does with each kind of drafter."""
    return {
        kind: our_steps(language_target, load_drafter(path, language_target), prompts) for kind, path in folders.items()
    }


def test_kinds_of_drafters_are_what_their_names_say(expected, language_target, prompts):
    plain = [
        generate_plain(language_target, token_ids, max_new_tokens=MAX_NEW_TOKENS).token_ids for token_ids in prompts
    ]
    for kind, (low, high) in KINDS.items():
        texts, steps = zip(*expected[kind], strict=True)
        assert list(texts) == plain
        assert low <= sum(len(text) - 1 for text in texts) / sum(steps) < high, kind


@pytest.mark.parametrize("kind", [*WINDOWS, "convolutions"])
def test_batches_accept_what_single_decoding_does(kind, folders, expected, language_target, prompts):
    drafter = load_drafter(folders[kind], language_target)
    batch = generate_batch(language_target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS)
    assert [(out.token_ids, len(out.widths)) for out in batch] == expected[kind]


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_decodes_with_the_exported_folder_as_we_do(
    kind, expected, do_export, language_target, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    assistant = AutoModel.from_pretrained(
        do_export("zlab", kind).path, trust_remote_code=True, dtype=torch.float32
    ).eval()
    assert "dpace" not in type(assistant).__module__

    def decode(inputs):
        options = {"assistant_model": assistant, "speculation_type": "dflash", "do_sample": False}
        options |= {"attention_mask": torch.ones_like(inputs), "max_new_tokens": MAX_NEW_TOKENS}
        return language_target.model.generate(inputs, **options)

    assert [decode_and_count(language_target, decode, token_ids) for token_ids in prompts] == expected[kind]


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_zlabs_class_and_loop_take_the_folder(kind, expected, do_export, language_target, prompts):
    zlab = importlib.import_module("dflash.model")
    path = do_export("zlab", kind).path
    kind_of_network = getattr(zlab, read_json(path / "config.json")["architectures"][0])
    theirs, info = kind_of_network.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    def decode(inputs):
        return zlab.dflash_generate(theirs.eval(), language_target.model, inputs, MAX_NEW_TOKENS, [EOS], 0.0)

    assert [decode_and_count(language_target, decode, token_ids) for token_ids in prompts] == expected[kind]


def test_the_bundled_module_needs_torch_and_transformers_only():
    source = Path(dpace.modeling_dflash.__file__).read_text()
    imported = re.findall(r"^\s*(?:from|import) (\w+)", source, flags=re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"torch", "transformers"}


def llamacpp_steps(target_gguf: Path, path: Path, prompts) -> list[tuple[list[int], int]]:
    """The same of llama.cpp, which tells how many tokens it drafted: 5 for each verification of a whole block."""
    options = {"drafter_gguf": path, "num_draft_tokens": 5}
    answers = run_llamacpp(target_gguf, prompts, max_new_tokens=MAX_NEW_TOKENS, **options)
    assert all(answer.num_drafted % 5 == 0 for answer in answers)
    return [(answer.token_ids, answer.num_drafted // 5) for answer in answers]


HALF_PRECISION = [("half-trained", torch.float16), ("half-trained", torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, None) for kind in KINDS), *HALF_PRECISION])
def test_llamacpp_verifies_as_often_as_we_do(kind, dtype, expected, do_export, language_target, target_gguf, prompts):
    ours = expected[kind]
    if dtype:
        ours = our_steps(
            language_target, load_drafter(do_export("zlab", kind, dtype=dtype).path, language_target), prompts
        )
    theirs = llamacpp_steps(target_gguf, do_export("gguf", kind, dtype=dtype).path, prompts)
    assert [text for text, _ in theirs] == [text for text, _ in ours]
    near_ties = kind == "half-trained"  # a tie may fall the other way, which moves one verification
    assert all(abs(a - b) <= near_ties for (_, a), (_, b) in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("precision", ["q8_0", "q4_0"])
def test_quantized_files_are_read_back_and_llamacpp_runs_them(
    precision, folders, language_folder, target_gguf, language_target, prompts, tmp_path, capsys
):
    """Beside the 16-bit one: the same text, and about as many verifications as of the drafter that is read back."""
    flags = ["--target", str(language_folder), "--target-gguf", str(target_gguf), "--to", "gguf"]
    files = {}
    for dtype in ("float16", precision):
        assert (
            main(["export", str(folders["half-trained"]), *flags, "--dtype", dtype, "--output", str(tmp_path / dtype)])
            == 0
        )
        (files[dtype],) = (tmp_path / dtype).glob(f"*-{dtype}.gguf")
    assert "rounded by at most" in capsys.readouterr().out
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(files[precision]).tensors}
    assert kinds == {precision.upper(), "F32"}
    assert (
        main(["import", str(files[precision]), "--target", str(language_folder), "--output", str(tmp_path / "in")]) == 0
    )
    ours = our_steps(language_target, load_drafter(tmp_path / "in", language_target), prompts)
    steps = {dtype: llamacpp_steps(target_gguf, path, prompts) for dtype, path in files.items()}
    assert (
        [text for text, _ in steps[precision]] == [text for text, _ in steps["float16"]] == [text for text, _ in ours]
    )
    assert all(abs(a - b) <= 2 for (_, a), (_, b) in zip(steps[precision], ours, strict=True))  # it rounds inputs too


@pytest.mark.parametrize("precision", ["q5_0", "q4_0"])
def test_quantized_zeros_are_read_back(precision, tmp_path):
    """Those of DFlash2's selector, in rows that are whole blocks of 32."""
    target = make_target("qwen3", hidden_size=64)
    make_drafter(target, conv_kernel_size=2).save_pretrained(tmp_path / "a")
    options = {"target_gguf": write_target_gguf(target, tmp_path / "target.gguf"), "precision": precision}
    export(tmp_path / "a", target, to="gguf", output=tmp_path / "b", name="x", target_name="some/target", **options)


def test_a_window_of_which_layers_is_not_said_is_refused(do_export, monkeypatch):
    monkeypatch.setattr(gguf.GGUFWriter, "add_array", lambda *arguments: None)
    with pytest.raises(ValueError, match="sliding_window_pattern \\[\\], expected a list"):
        do_export("gguf", "windows")


def test_a_quantized_precision_is_for_gguf_files(folder, language_folder, tmp_path, capsys):
    flags = ["--target", str(language_folder), "--to", "zlab", "--dtype", "q8_0", "--output", str(tmp_path / "x")]
    assert main(["export", str(folder), *flags]) == 1
    assert "q8_0 is a precision of GGUF files, and --to is zlab; take --to gguf" in capsys.readouterr().err


def test_llamacpp_reads_the_layers_that_are_named(folder, language_target, target_gguf, prompts, tmp_path):
    """Neighbouring layers change the number of verifications, in llama.cpp as here: the numbering is the same one."""
    spec, weights = read_folder(folder)
    found, ours = {}, {}
    for offset in (-1, 0, 1):
        shifted = replace(spec, target_layer_ids=tuple(i + offset for i in spec.target_layer_ids))
        path = tmp_path / f"{offset}.gguf"
        dpace.engines.gguf.write_gguf(path, shifted, weights, target_gguf=target_gguf)
        texts, found[offset] = zip(*llamacpp_steps(target_gguf, path, prompts), strict=True)
        drafter = dpace.engines.published.make_drafter(shifted, weights)
        our_texts, ours[offset] = zip(*our_steps(language_target, drafter, prompts), strict=True)
        assert texts == our_texts

    def distance(a: int, b: int) -> int:
        return sum(abs(x - y) for x, y in zip(found[a], ours[b], strict=True))

    assert distance(0, 0) <= 1  # a near tie may fall the other way
    for offset in (-1, 1):
        assert distance(offset, offset) <= 1 < 3 <= min(distance(0, offset), distance(offset, 0))


def test_llamacpp_refuses_in_one_line(target_gguf, prompts, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="llama.cpp ended with code"):
        run_llamacpp(
            target_gguf, prompts[:1], max_new_tokens=4, drafter_gguf=tmp_path / "broken.gguf", num_draft_tokens=5
        )


def test_the_card_has_measured_rows_of_these_weights_only(do_export, language_target, folder, tmp_path):
    source = tmp_path / "run" / "drafter"
    shutil.copytree(folder, source)
    (source / "recipe.yaml").write_text("target: some/target\nloss:\n  objective: dpace\n")
    asked = make_prompts((f"w{i} w51" for i in range(4)), "language")
    config = BenchConfig(max_new_tokens=12, temperatures=(0.0,), widths=("full",))
    mine, other = load_drafter(source, language_target), make_drafter(language_target, block_size=6)
    results = bench(language_target, {"mine": mine, "other": other}, asked, config, source.parent)

    def card(**options):
        path = do_export("zlab", folder=source, name="me/tiny-DFlash", license="mit", **options).path
        return (path / "README.md").read_text()

    text = card()
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert (front["base_model"], front["license"], front["library_name"]) == ("some/target", "mit", "transformers")
    assert {"dflash", "vllm"} <= set(front["tags"])
    rows = re.findall(r"^\| too few prompts \| language .*$", text, flags=re.MULTILINE)
    assert len(rows) == 1 and f"| {results.rows[0].tau:.2f} |" in rows[0]
    for part in ("objective `dpace` ([D-PACE]", '"num_speculative_tokens": 5', "not run by us"):
        assert part in text
    assert str(tmp_path) not in text and "rounded from" not in text
    assert "float16, rounded from those that were measured" in card(dtype=torch.float16)


def test_the_verbs(language_folder, folder, target_gguf, tmp_path, capsys, monkeypatch):
    out = tmp_path / "tiny-dflash-gguf"
    (out / "notes").mkdir(parents=True)
    for name in ("notes/own.txt", "notes/own.py", "responses.jsonl", "bench-1.jsonl"):
        (out / name).touch()
    flags = [str(folder), "--target", str(language_folder), "--to", "gguf", "--output", str(out)]
    flags += ["--dtype", "float16"]
    assert main(["export", *flags]) == 1
    assert "--target-gguf" in capsys.readouterr().err
    uploads = []

    class Api:
        def create_repo(self, repo, exist_ok):
            uploads.append(repo)
            return f"https://example.org/{repo}"

        def upload_folder(self, folder_path, repo_id, commit_message, **patterns):
            files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            uploads.append(sorted(filter_repo_objects(files, **patterns)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main(["export", *flags, "--target-gguf", str(target_gguf), "--push", "me/tiny-dflash"]) == 0
    printed = capsys.readouterr().out
    assert "25 of 25 tensors read back bit for bit; rounded by at most" in printed
    assert "uploaded: https://example.org/me/tiny-dflash" in printed
    (written,) = out.glob("dflash-*-float16.gguf")
    assert uploads == ["me/tiny-dflash", ["README.md", written.name]]
    assert f"-md {written.name} --spec-type draft-dflash --spec-draft-n-max 5" in (out / "README.md").read_text()
    again = tmp_path / "again"
    assert main(["import", str(out), "--output", str(again), "--target", str(language_folder)]) == 0
    assert "next: dpace check" in capsys.readouterr().out and (again / "modeling_dflash.py").exists()
    assert main(["import", str(tmp_path / "nothing"), "--output", str(again)]) == 1
    assert "nothing is missing, expected a folder or a Hub id" in capsys.readouterr().err


@quiet
def test_the_card_of_a_target_in_a_folder_has_commands_that_run_here(
    language_folder, language_target, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(language_folder.parent)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    flags = ["--target", language_folder.name, "--to", "zlab", "--output", str(tmp_path / "out")]
    assert main(["export", str(folder), *flags]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"`{language_folder.name}` is a folder: elsewhere, put the target's Hub id" in text
    assert "base_model" not in text and f"vllm serve {language_folder.name} " in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    capsys.readouterr()
    exec(compile(code.replace('"..."', '"w3 w51"').replace(": 256", ": 20"), "README.md", "exec"), {})
    ids = language_target.tokenizer("ask w3 w51 answer")["input_ids"]
    plain = generate_plain(language_target, ids, max_new_tokens=20).token_ids
    expected = language_target.tokenizer.decode(plain, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()
    flags[1] = str(language_folder)
    assert main(["export", str(folder), *flags]) == 0
    assert f"vllm serve {language_folder} " in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch, tmp_path):
    class Api:
        def create_repo(self, repo, exist_ok):
            raise LookupError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(ValueError, match=r"the Hub does not take it as me/x \(Name or service not known\)"):
        dpace.engines.export.push(tmp_path, "me/x")


@quiet
def test_the_card_names_only_engines_that_can_read_the_drafter(tmp_path):
    target = make_target("llama3.1")
    make_drafter(target).save_pretrained(tmp_path / "scaled")
    done = export(tmp_path / "scaled", target, to="vllm", output=tmp_path / "vllm", name="x", target_name="me/t")
    card = (done.path / "README.md").read_text()
    assert "vllm serve" in card and "--to gguf" not in card, "no GGUF file has this rotary embedding"


def test_weights_in_64_bits_are_refused(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "x")
    with changed_weights(path) as tensors:
        tensors["fc.weight"] = tensors["fc.weight"].double()
    with pytest.raises(ValueError, match="holds float64, expected float32, bfloat16 or float16"):
        read_drafter(path)
