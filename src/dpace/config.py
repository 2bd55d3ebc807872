"""Every option: its type, its range or choices, its default and where the default comes from.

The classes are pydantic's: a value of another type, outside its range, or of an unknown option raises a
`pydantic.ValidationError` (a ValueError) when an instance is made, by a recipe, by flags or in Python.
`dpace.system.validation` turns it into one line. Imports no torch, so that `--help` answers at once.
"""

import os
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import tyro
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""No unknown keys, no conversions between types, finite numbers."""
LARGEST = 2**31 - 1
"""Largest value of most integers."""
MAX_TOKENS = 2**31
"""Tokens that a target may have, and that an unknown tokenizer is taken to have: their numbers are kept in 32 bits."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(kind: Any) -> Any:
    """Make a dataclass from a class of options, or of the keys of a JSON object.

    What an instance holds is checked, and does not change.
    """
    return dataclass(kind, frozen=True, kw_only=True, config=STRICT)


def integer(low: int, high: int = LARGEST) -> Any:
    """Return the range of an integer."""
    return Field(ge=low, le=high)


Count = Annotated[int, integer(1)]
CountOrZero = Annotated[int, integer(0)]
Size = Annotated[int, integer(1, 1000)]
Seed = Annotated[int, integer(0, 2**32 - 1)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
FractionOrZero = Annotated[float, Field(ge=0, le=1)]


def _refuse_blank(text: str) -> str:
    """Refuse a text without a letter, and one that UTF-8 or a file's name cannot have; `~` is the user's folder."""
    # Half characters, which a broken terminal gives, become question marks there and back.
    if not text.strip() or "\0" in text or text != text.encode(errors="replace").decode():
        raise ValueError(f"is {text!r}, expected a text that is not empty")
    return os.path.expanduser(text)


Text = Annotated[str, AfterValidator(_refuse_blank)]


def _refuse_other_address(url: str) -> str:
    """Refuse what is no plain address; the message does not repeat it, since it may have a password."""
    host = r"(\[[\w:.]+\]|[^\s\\/?#@:\[\]]+)"  # an IPv6 address stands in brackets
    # host, :port if any, /path if any
    if not re.fullmatch(rf"(?i)https?://{host}(:\d+)?(/[^\s\\?#]*)?", url.strip()):
        raise ValueError("is not an address http://host:port without a password; a key stands in DPACE_API_KEY")
    return url


# Checked first, since the other message shows the text.
Url = Annotated[str, AfterValidator(_refuse_other_address), AfterValidator(_refuse_blank)]


def _as_tuple(value: object) -> tuple[object, ...]:
    """Return the entries of a list; a value that stands alone is its only one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _refuse_twice(values: tuple[object, ...]) -> tuple[object, ...]:
    """Refuse a list that has an entry twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"has {value!r} twice, expected different values")
    return values


def _check_feature_layers(layers: tuple[int, ...], options: Any) -> tuple[int, ...]:
    """Refuse not as many layers as `num_features`; pydantic gives its `ValidationInfo`."""
    num_features = options.data.get("num_features")  # it is checked before, as the field that stands first
    if num_features not in (None, len(layers)):
        raise ValueError(f"is {layers}, but num_features is {num_features}; leave one of the two out")
    return layers


Entry = TypeVar("Entry")
# In --help, an empty list is None and not nothing.
_HINT = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default or None})")
# Pydantic calls the validators in this order: a recipe may have one value without brackets.
Entries = Annotated[tuple[Entry, ...], BeforeValidator(_as_tuple), AfterValidator(_refuse_twice), _HINT]
OneOrMore = Annotated[Entries[Entry], Field(min_length=1)]

Objective = Literal[
    "dpace",
    "dpace-confidence-only",
    "dpace-continuation-only",
    "bv",
    "vat",
    "spec-auf",
    "dflash",
    "uniform",
    "medusa",
]
"""Objectives, each a function `NAME_weights` of `dpace.weights`, which takes torch to import."""


def is_custom(objective: str) -> bool:
    """Return whether an objective's name is of the form `package.module:function`."""
    return re.fullmatch(r"[^\W\d][\w.]*:[\w.<>]+", objective) is not None  # <> stands in names of inner functions


def _refuse_other_form(objective: str) -> str:
    """Refuse a text that is not of this form; the message ends the list of the objectives that there are."""
    if not is_custom(objective):
        raise ValueError("package.module:function")
    return objective


Custom = Annotated[str, AfterValidator(_refuse_other_form)]
ObjectiveName = Objective | Custom
"""An objective of dpace, or `package.module:function` for a custom one."""
TokenLoss = Literal["nll", "kl", "lk"]
Reduction = Literal["anchors", "batch", "slots", "weights"]
VerifyRule = Literal["equality", "speculative"]
Width = Literal["auto", "full", "copies"] | Count


def _refuse_other_depth(depth: str) -> str:
    """Refuse another form than that of a depth with more than a number; the message ends the list of forms."""
    if not re.fullmatch(r"[1-9]\d*(@0?\.\d+)?(\+ngram-[a-z0-9-]+)?", depth):
        raise ValueError("NUMBER@P with a p-min P below 1, or NUMBER+ngram-simple")
    return depth


Depth = Count | Annotated[str, AfterValidator(_refuse_other_depth)]
Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
DeviceMap = Literal["auto"] | None
TargetShard = Literal["none", "fsdp"]
SelectorName = Literal["lilicorr", "candidate_selector", "markov_head"]
"""Selectors, each a file of `dpace.drafter`."""
WALKED = ("lilicorr",)
"""Selectors that learn by walks through whole blocks, with `selector_penalty`; the others learn slot by slot."""
EngineName = Literal["vllm", "zlab", "transformers", "tensorrt", "speculators", "sglang", "openvino", "gguf"]
"""Engines, each a file of `dpace.engines`, in the order of the model card; gguf is llama.cpp's."""
HubName = Annotated[str, Field(pattern=r"^([\w-][\w.-]*/)?[\w-][\w.-]*$")]
"""A name on the Hub, OWNER/NAME."""


@options
class DrafterConfig:
    """Size of the drafter; the rest of its shape follows the target."""

    init: Text | None = None
    """Folder or Hub id of a trained drafter to start from; all of this group but block_size is then its own."""
    num_layers: Size = 3
    """Number of decoder layers, 1 or more (the paper: 3 and 5)."""
    intermediate_size: Literal["auto"] | Annotated[int, integer(1, 2**20)] | None = None
    """Width of each layer's MLP; the target's by default, as published.
    auto: half of it, which gave the same tau after 400 steps, in 0.82 of the time; docs/train.md says more."""
    block_size: Annotated[int, integer(2, 1000)] = 16
    """Slots in a block, 2 or more: one known token, then block_size - 1 drafted ones (the paper: 16; 10 for Llama)."""
    num_features: Size | None = None
    """Number of target layers whose hidden states the drafter reads; num_layers by default."""
    target_layer_ids: Annotated[Entries[CountOrZero], AfterValidator(_check_feature_layers)] | None = None
    """Numbers of these target layers, counted from 0, in ascending order; evenly spaced by default, as published.
    With them, leave num_features out."""
    mask_token_id: CountOrZero | None = None
    """Id of a token that no text contains, for slots not drafted yet; found in the tokenizer by default."""
    norm_scale: Literal["auto"] | Positive = 1.0
    """Initial weights of the final norm, above 0; small ones start near a uniform distribution.
    auto: a tenth of the mean of the target's, in two digits, as in the demo; with init, this is ignored."""
    conv_kernel_size: Literal[0] | Annotated[int, integer(2, 1000)] = 0
    """Slots of a block that convolutions in each layer read, as in DFlash2; 0 for none, as in DFlash.
    2 helps short trainings; docs/serve.md says which engines run them."""
    selector: SelectorName | None = None
    """What chooses tokens that follow one another.
    candidate_selector: DFlash2's, two tables of tokens. lilicorr: a small network. Both choose among each slot's best.
    markov_head: DSpark's, two tables that add to the logits of all tokens, one slot after the other. They begin with
    how often tokens follow each other in the answers.
    By default each slot takes its own best token, as in DFlash."""
    selector_candidates: Literal[2, 4, 8, 16] | None = None
    """Best tokens of each slot that the selector chooses from; engines take no other numbers.
    By default 8 for LiLiCorr and 16 for DFlash2's, as published; half where the target is narrower than 1024."""
    selector_width: Annotated[int, integer(8, 2**16)] | None = None
    """Length of the vectors whose products are the selector's scores, and width of LiLiCorr.
    By default 256 for DFlash2's and DSpark's, as published, and a quarter of the target's width for LiLiCorr; 64 and a
    sixth where the target is narrower than 1024."""
    sliding_window: Annotated[int, integer(2)] | None = None
    """Tokens that a layer sees at most, its own slot included; all by default (speculators: 2048).
    The time of a draft then stops growing with the text, where one prompt is decoded at a time."""
    full_layers: Entries[CountOrZero] = ()
    """Numbers of layers that see all of the text although there is a window, counted from 0."""
    causal: bool = False
    """Let a slot see no slot after it, as speculators trains; by default all slots of a block see each other."""


@options
class LossConfig:
    """Loss that training minimizes."""

    objective: ObjectiveName = "dpace"
    """How much each slot of a block counts in the loss; docs/objectives.md says when to use which.
    One of these names, or package.module:function for your own; the module is looked for in this folder too."""
    token_loss: TokenLoss = "nll"
    """Loss of one slot.
    nll (the paper's): -log of the probability of the target's token. kl: divergence from the target's distribution.
    lk: -log of the overlap of both distributions."""
    confidence: Literal["token", "overlap"] = "token"
    """How D-PACE estimates that a slot is accepted.
    token: by the probability of the target's token. overlap: by the overlap of both models' distributions."""
    alpha: FractionOrZero = 0.5
    """Smoothing of D-PACE's weights, 0 to 1 (the paper: 0.5; 0.3 to 0.7 work about as well)."""
    alpha_end: FractionOrZero | None = None
    """Value that alpha reaches at the end of training, in a straight line; alpha stays as it is by default."""
    gamma: Positive | None = None
    """Decay length, in slots, of the objectives dflash and vat; 7, 5 or 4 by default for blocks of 16, 10 or 8."""
    base: Fraction = 0.8
    """Weight of a slot relative to the one before it, for the objective medusa."""
    reduction: Reduction = "anchors"
    """What the summed loss of an optimizer step is divided by; dpace.loss.block_loss has the formulas.
    anchors: blocks, then conversations. batch (the paper's code): conversations.
    slots: scored slots. weights: the weights' sum."""
    vocabulary: Literal["all", "seen"] = "all"
    """Tokens that the softmax covers: all, or only those seen in the training text (much cheaper on a CPU)."""

    selector_penalty: PositiveOrZero = 0.25
    """Weight of LiLiCorr's penalty for choices that the target dislikes; 0 saves the target's upper layers."""

    chunk_mib: Count | None = None
    """MiB of logits that the loss computes at once, 1 or more; lower it where memory is short.
    By default 4 on a CPU and 1024 on an accelerator, and more for token losses that need whole rows."""

    @property
    def needs_target_probs(self) -> bool:
        """Whether the loss compares with the target's distribution, which takes its last hidden states too."""
        return self.token_loss != "nll" or self.confidence == "overlap"


@options
class TrainConfig:
    """Optimizer and its schedule; the defaults are the paper's."""

    products: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of the factors in matrix products while a CPU trains; sums are in float32. A GPU takes bfloat16.
    bfloat16 is nearly twice as fast where the CPU has units for it (AVX-512 BF16, AMX); auto takes it there."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (the paper's), or muon for the matrices.
    Muon is better for short trainings; its steps are slower."""
    learning_rate: Positive = 6e-4
    """Highest learning rate of the schedule (the paper: 6e-4)."""
    num_epochs: Positive = 6.0
    """Passes over the training conversations (the paper: 6)."""
    max_steps: Literal[-1] | Count = -1
    """Number of optimizer steps; replaces num_epochs where it is above 0."""
    warmup_ratio: FractionOrZero = 0.04
    """Fraction of the steps in which the learning rate rises, before a cosine to 0 (the paper: 0.04)."""
    batch_size: Count = 2
    """Conversations in a micro-batch on each device (the paper: 2 per step)."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches in an optimizer step."""
    group_by_length: bool = True
    """Give each step conversations of about the same length, which saves padding; off is the paper's random order."""
    num_anchors: Count = 512
    """Most blocks that are drawn from a conversation in each epoch (the paper: 512)."""
    grow_blocks: bool = False
    """Train on short blocks first: block_size is halved down to 2 or 3 slots, then doubled again and again.
    All sizes take the same number of steps; with causal slots, shorter blocks take more. A step has as many slots as
    ever, in more blocks; docs/objectives.md says what it gains."""
    max_length: Annotated[int, integer(2)] = 3072
    """Length in tokens at which conversations are cut (the paper: 3072)."""
    max_grad_norm: PositiveOrZero = 1.0
    """Norm at which the gradient is clipped (the paper: 1)."""
    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay (the paper: 0)."""
    seed: Seed = 42
    """Seed for the initial weights, the order of conversations and the choice of blocks (the paper: 42)."""
    logging_steps: Count = 10
    """Optimizer steps between two entries of the log."""
    eval_steps: Count = 500
    """Optimizer steps between two measurements of tau on the validation prompts; the best weights are kept."""
    save_steps: Count | None = None
    """Optimizer steps between two checkpoints that training can go on from; eval_steps by default.
    The newest one and the best weights are kept. All take less disk than ten drafters in fp32."""
    feature_cache_gib: PositiveOrZero = 4.0
    """GiB of memory for the target's hidden states; they are computed again in every epoch where they need more."""
    feature_files: Text | None = None
    """Folder that keeps these hidden states on disk, for all epochs, ranks and later runs; by default none does."""
    feature_servers: Entries[Url] = ()
    """Addresses of running vLLM servers that compute what goes into feature_files; by default this process does."""
    target_shard: TargetShard = "none"
    """How the target's weights are spread over the ranks of `dpace train`, where they do not fit into one device.
    none: each rank has all. fsdp: a layer is gathered where it runs."""
    torch_compile: bool = False
    """Compile the drafter with torch.compile, which makes steps on a GPU faster and the first ones slow."""
    gradient_checkpointing: bool = False
    """Compute the drafter's activations again in the backward pass, which saves memory and costs time."""
    report_to: Entries[Text] = ()
    """Trackers that get the log too, if installed: tensorboard, wandb, trackio and others that accelerate knows."""


@options
class SamplingConfig:
    """How the tokens of a response are chosen, and how many there are at most."""

    max_new_tokens: Count = 256
    """Length of the response in tokens; it is shorter only where a stop token comes first."""
    temperature: PositiveOrZero = 0.0
    """Sampling temperature, 0 or more; 0 always takes the most likely token (greedy)."""
    top_k: CountOrZero = 0
    """Sample only from this number of most likely tokens; 0 keeps all."""
    top_p: Fraction = 1.0
    """Sample only from the most likely tokens whose probabilities sum to this value, above 0 to 1; 1 keeps all."""
    min_p: FractionOrZero = 0.0
    """Sample only from tokens with at least this fraction of the highest probability, 0 to 1; 0 keeps all."""
    seed: Annotated[int, integer(0, 2**63 - 1)] | None = None
    """Seed for sampling at a temperature above 0; torch's global random generator by default."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The values, without those of a subclass, by name."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}


@options
class PromptsConfig:
    """Where the prompts come from, and which of them are kept for measuring."""

    path: Text = "demo"
    """JSONL, JSON or parquet file, or a dataset on the Hub as OWNER/NAME:SPLIT; `demo` comes with dpace.
    docs/data.md lists the keys that a row may have."""
    heldout_path: Text | None = None
    """JSONL file of prompts to measure on, none of which may be a training prompt.
    By default `demo` has its own file; for other prompts, a random part is taken out of `path` before training."""
    num_heldout: CountOrZero = 64
    """Prompts taken out of `path` to measure on, at most a tenth of them; unused where held-out prompts have a file."""
    num_validation: CountOrZero = 32
    """Prompts taken out of training, at most a tenth of them, to choose the best checkpoint by."""
    limit: Count | None = None
    """Number of prompts to train on, from the start of the file; all of them by default."""
    decontaminate: Entries[Text] = ()
    """Public datasets (see --bench.sets), or files of prompts, that no training prompt may repeat.
    A prompt is left out where it shares 13 words in a row with one of theirs."""


@options
class RespondConfig:
    """How the target answers the prompts that a drafter is trained and measured on."""

    source: Literal["target", "own"] = "target"
    """Where the answers come from.
    target: the target writes them. own: the prompts' file has them, as a reply at the end of each conversation."""
    max_new_tokens: Count = 2048
    """Longest response in tokens (2048 in DFlash's benchmark)."""
    temperature: PositiveOrZero = 0.0
    """Sampling temperature; 0 (greedy) gives the text that speculative decoding reproduces."""
    batch_size: Count = 32
    """Number of prompts that are answered together, in this process or by each server; lower it where memory is short.
    """
    seed: Seed = 0
    """Seed for sampling at a temperature above 0; each prompt draws with a seed of its own that follows from it."""
    server: Entries[Url] = ()
    """Addresses of running servers of the target that answer instead, http://host:port: vLLM, SGLang or llama.cpp.
    The environment variable DPACE_API_KEY has the key where they want one."""
    retry_seconds: PositiveOrZero = 600.0
    """Time in which a server that fails or is busy is asked again, with growing waits, before it is given up.
    It is asked once more at least, also where a request took longer."""


@options
class BenchConfig:
    """What is measured, and how."""

    drafters: Entries[Text] = ()
    """Folders or Hub ids of the drafters to measure and compare; the drafter in the output folder by default."""
    sets: Entries[Text] = ()
    """Public datasets instead of the held-out prompts; the paper's are gsm8k math500 humaneval mbpp mt_bench alpaca.
    Others: speed_bench (by category), speed_bench_1k, _2k, _8k, _16k and _32k (long prompts), and redhat."""
    sets_dir: Text | None = None
    """Folder with a NAME.jsonl for each of `sets`, which may then have any name; the Hugging Face Hub by default."""
    temperatures: OneOrMore[PositiveOrZero] = (0.0, 1.0)
    """Sampling temperatures to measure at (the paper: 0 and 1)."""
    max_new_tokens: Count = 2048
    """Longest response in tokens; `dpace bench` takes respond.max_new_tokens where this is not set."""
    num_prompts: CountOrZero | None = None
    """Most prompts to take from each dataset; all by default."""
    widths: OneOrMore[Width] = ("full", "auto")
    """Verification lengths to measure.
    full: whole drafts, as tau is defined.
    auto: as `dpace generate`, the number of drafted or copied tokens that is fastest on this machine.
    copies: copied tokens alone, without the drafter: what `auto` has to beat.
    An integer: that number of tokens, the known one included."""
    verify_rules: OneOrMore[VerifyRule] = ("equality",)
    """Rules that accept draft tokens at a temperature above 0, as in `dpace generate`; each one gives rows of its own.
    They are compared with the first one, on the same prompts."""
    server: Entries[Url] = ()
    """Address of a running server to measure instead, http://host:port: vLLM, SGLang or llama.cpp with a drafter.
    Several are compared, each with its own number of draft tokens; see depths."""
    depths: Entries[Depth] = ()
    """Draft tokens that each server of --bench.server was started with, in the same order, to find the best number.
    7@0.5 is 7 with a p-min of 0.5: llama.cpp ends a draft at a token of a lower probability."""
    plain_server: Url | None = None
    """Address of a server of the same target without a drafter, for --bench.server to compare with; asked twice."""
    seed: Seed = 0
    """Seed for sampling at a temperature above 0."""


@options
class PromptsWriterConfig:
    """Let the target write prompts of its own, where you have none, or few of the kinds that will come.

    It writes as a user would, after the words with which its chat template opens the user's turn.
    Its prompts are as varied as what it was trained on.
    Add them to your own: cat mine.jsonl dpace-prompts/prompts.jsonl > prompts.jsonl
    """

    target: Text
    """Folder, Hub id or GGUF file of the target, with a chat template."""
    count: Count = 1000
    """Number of prompts, all different."""
    max_new_tokens: Count = 128
    """Longest prompt in tokens; longer ones are left out."""
    temperature: Positive = 1.0
    """Sampling temperature; 1 draws from the target's own distribution."""
    batch_size: Count = 64
    """Number of prompts that are written together; lower it where memory is short."""
    seed: Seed = 0
    """Seed of the draws."""
    dtype: Dtype = "auto"
    """Precision of the weights; auto is bf16 on a GPU and fp32 on a CPU, int8 rounds them for a CPU with VNNI."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    output: Text = "dpace-prompts"
    """Folder that prompts.jsonl is written to; the same command continues an interrupted run in it."""


@options
class ExportConfig:
    """Write a drafter in the format of an engine, with a model card.

    The drafter may stand first: dpace export DRAFTER --target TARGET --to ENGINE --output FOLDER.

    The files are read again and compared: the weights bit for bit, and the layout field by field.
    """

    drafter: Text
    """Folder or Hub id of the drafter; given first, or with this flag."""
    target: Text
    """Folder, Hub id or GGUF file of the target."""
    target_name: HubName | None = None
    """Hub id of the target for what is written, such as the model card, as OWNER/NAME; --target by default.
    It keeps a folder's path out of that, and is needed with --name where the target is a folder."""
    to: EngineName
    """Engine to write for; gguf is for llama.cpp. Most engines read the layout of `dpace train`.
    A drafter that the engine would read wrongly is refused."""
    output: Text
    """Folder that the files are written to."""
    name: HubName | None = None
    """Hub id of the drafter for the commands of the model card, as OWNER/NAME; --output by default."""
    target_gguf: Text | None = None
    """GGUF file of the target, in any precision, whose tokenizer a GGUF file repeats; --target by default, if one."""
    dtype: Literal["keep", "float32", "float16", "bfloat16"] = "keep"
    """Precision of the weights; keep leaves it as it is. Vectors in GGUF files are always float32."""
    plain: bool = False
    """Leave out the drafter's selector: DFlash's own layout, which engines without selectors read."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    license: Text = "other"
    """License of the weights for the model card, by the Hub's short name, such as apache-2.0."""

    @property
    def served_name(self) -> str:
        """What engines are to call the drafter."""
        return self.name or self.output

    @property
    def served_target(self) -> str:
        """What engines are to call the target."""
        return self.target_name or self.target

    @property
    def served_gguf(self) -> str | None:
        """The GGUF file of the target, if one is named."""
        return self.target_gguf or (self.target if self.target.lower().endswith(".gguf") else None)


@options
class Recipe:
    """All settings, from prompts to a measured drafter.

    A recipe is a YAML file of options, or the name of one that comes with dpace (`dpace --help` lists them);
    command-line flags override it.
    """

    target: Text = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder, Hub id or GGUF file of the target: the model that is made faster and whose text stays the same."""
    output: Text = "dpace-out"
    """Folder that everything is written to."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it; the paper's numbers are without."""
    dtype: Dtype = "auto"
    """Precision of the target's weights.
    auto: bf16 on an accelerator; fp32 on a CPU, where texts are equal token for token. int8, on a CPU with VNNI: a
    rounded target; a drafter keeps its text, not that of fp32."""
    device: Device = "auto"
    """Where to compute.
    auto: the accelerator that torch finds, else the CPU. Choose one of several with CUDA_VISIBLE_DEVICES."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
    prompts: PromptsConfig = PromptsConfig()
    """Prompts to train on and to measure on."""
    respond: RespondConfig = RespondConfig()
    """How the target answers the prompts."""
    drafter: DrafterConfig = DrafterConfig()
    """Size of the drafter."""
    loss: LossConfig = LossConfig()
    """Loss that training minimizes."""
    train: TrainConfig = TrainConfig()
    """Optimizer and its schedule."""
    bench: BenchConfig = BenchConfig()
    """What is measured, and how."""

    @property
    def responses_path(self) -> Path:
        """File that the target's answers are in."""
        return Path(self.output) / "responses.jsonl"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of drafter, loss and training, named as `train.seed`."""
        settings = {}
        for group in ("drafter", "loss", "train"):
            for name, value in asdict(getattr(self, group)).items():
                settings[f"{group}.{name}"] = value
        return settings

    @property
    def needs_target_hidden(self) -> bool:
        """Whether training reads the target's last hidden states: for its distribution, or for a selector's penalty."""
        has_penalty = self.drafter.selector in WALKED and self.loss.selector_penalty > 0
        return self.loss.needs_target_probs or has_penalty


@options
class CompareConfig(Recipe):
    """Train one recipe with several objectives and seeds, and compare the drafters."""

    output: Text = "dpace-compare"
    """Folder that everything is written to; the same command continues an interrupted run in it."""
    objectives: OneOrMore[Text] = ("dpace", "dflash", "uniform")
    """Values of loss.objective, to which a token loss and a confidence may be added.
    +kl or +lk is the token loss, +overlap the confidence: dpace+kl+overlap."""
    seeds: OneOrMore[Seed] = (0, 1, 2)
    """Seeds; each gives every objective the same initial weights, order of conversations and blocks."""
    baseline: Text = "dflash"
    """Objective that the others are compared with; it is trained too where `objectives` lacks it."""


@options
class DemoConfig:
    """Train a drafter for a real LLM on this machine and show what it gains."""

    quick: bool = False
    """Use fewer prompts and steps, which takes less than half of the time; the numbers are rougher."""
    prompts: Text | None = None
    """JSONL file of your own prompts; the demo's prompts by default."""
    target: Text | None = None
    """Folder, Hub id or GGUF file of the target; SmolLM2-135M-Instruct by default."""
    output: Text | None = None
    """Folder that everything is written to; dpace-demo by default, and dpace-demo-quick with --quick.
    The same command continues an interrupted run in it."""
