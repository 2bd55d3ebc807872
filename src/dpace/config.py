"""Every option, with its default and where the default comes from.

Imports no torch, so that `--help` answers at once.
"""

from dataclasses import dataclass, field
from typing import Literal

Objective = Literal[
    "dpace",
    "dpace-confidence-only",
    "dpace-continuation-only",
    "dpace-exact",
    "chain-reward",
    "vat",
    "spec-auf",
    "dflash",
    "uniform",
    "medusa",
]
TokenLoss = Literal["nll", "kl", "lk"]
Confidence = Literal["token", "overlap"]
Reduction = Literal["anchors", "batch", "slots", "weights"]
VerifyRule = Literal["equality", "speculative"]
Width = Literal["auto", "full"] | int
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["vllm", "sglang", "llamacpp", "transformers", "zlab"]
Format = Literal["zlab", "sglang", "vllm", "speculators", "gguf"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the tokens of a response are chosen, and how many there are at most."""

    max_new_tokens: int = 256
    """Length of the response in tokens; it is shorter only where a stop token comes first."""
    temperature: float = 0.0
    """Sampling temperature, 0 or more; 0 always takes the most likely token (greedy)."""
    top_k: int = 0
    """Sample only from this number of most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample only from the most likely tokens whose probabilities sum to this value, above 0 to 1; 1 keeps all."""
    min_p: float = 0.0
    """Sample only from tokens with at least this fraction of the highest probability, 0 to 1; 0 keeps all."""
    seed: int | None = None
    """Seed for sampling at a temperature above 0; torch's global random generator by default."""


@dataclass(frozen=True)
class PromptsConfig:
    """Where the prompts come from, and which of them are kept for measuring."""

    path: str = "demo"
    """JSONL file with `messages`, `turns` or `prompt` on each line; `demo` is the dataset that comes with dpace."""
    heldout_path: str | None = None
    """JSONL file of prompts to measure on, none of which may be a training prompt.
    By default `demo` has its own file; for other prompts, a random part is taken out of `path` before training."""
    num_heldout: int = 64
    """Prompts taken out of `path` to measure on, at most a tenth of them; unused where held-out prompts have a file."""
    num_validation: int = 32
    """Prompts taken out of training, at most a tenth of them, to choose the best checkpoint by."""
    limit: int | None = None
    """Number of prompts to train on, from the start of the file; all of them by default."""


@dataclass(frozen=True)
class RespondConfig:
    """How the target answers the prompts that a drafter is trained and measured on."""

    max_new_tokens: int = 2048
    """Longest response in tokens (2048 in DFlash's benchmark)."""
    temperature: float = 0.0
    """Sampling temperature; 0 (greedy) gives the text that speculative decoding reproduces."""
    batch_size: int = 32
    """Number of prompts that are answered together; lower it where memory is short."""
    seed: int = 0
    """Seed for sampling at a temperature above 0."""


@dataclass(frozen=True)
class DrafterConfig:
    """Size of the drafter; the rest of its shape follows the target."""

    num_layers: int = 3
    """Number of decoder layers, 1 or more (the paper: 3 and 5)."""
    block_size: int = 16
    """Slots in a block, 2 or more: one known token, then block_size - 1 drafted ones (the paper: 16; 10 for Llama)."""
    num_features: int | None = None
    """Number of target layers whose hidden states the drafter reads; num_layers by default."""
    target_layer_ids: tuple[int, ...] | None = None
    """Numbers of these target layers, counted from 0, in ascending order; evenly spaced by default, as published."""
    mask_token_id: int | None = None
    """Id of a token that no text contains, for slots not drafted yet; found in the tokenizer by default."""
    norm_scale: float = 1.0
    """Initial weights of the final norm, above 0; small ones start near a uniform distribution (docs/training.md)."""


@dataclass(frozen=True)
class LossConfig:
    """Loss that training minimizes."""

    objective: Objective = "dpace"
    """How much each slot of a block counts in the loss; docs/objectives.md says when to use which."""
    token_loss: TokenLoss = "nll"
    """Loss of one slot.
    nll (the paper's): -log of the probability of the target's token. kl: divergence from the target's distribution.
    lk: -log of the overlap of both distributions."""
    confidence: Confidence = "token"
    """How D-PACE estimates that a slot is accepted.
    token: by the probability of the target's token. overlap: by the overlap of both models' distributions."""
    alpha: float = 0.5
    """Smoothing of D-PACE's weights, 0 to 1 (the paper: 0.5; 0.3 to 0.7 work about as well)."""
    gamma: float | None = None
    """Decay length, in slots, of the objectives dflash and vat; 7, 5 or 4 by default for blocks of 16, 10 or 8."""
    base: float = 0.8
    """Weight of a slot relative to the one before it, for the objective medusa."""
    reduction: Reduction = "anchors"
    """What the summed loss of an optimizer step is divided by; dpace.loss.block_loss has the formulas.
    anchors: blocks, then conversations. batch (the paper's code): conversations. slots: scored slots. weights: the
    weights' sum."""
    vocabulary: Literal["all", "seen"] = "all"
    """Tokens that the softmax covers: all, or only those seen in the training text (much cheaper on a CPU)."""

    @property
    def needs_target_probs(self) -> bool:
        """Whether the loss compares with the target's distribution, which takes its last hidden states too."""
        return self.token_loss != "nll" or self.confidence == "overlap"


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer and its schedule; the defaults are the paper's."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (the paper's), or muon for the matrices.
    Muon is better for short trainings; its steps are slower, and it does not work with sharded weights."""
    learning_rate: float = 6e-4
    """Highest learning rate of the schedule (the paper: 6e-4)."""
    num_epochs: float = 6.0
    """Passes over the training conversations (the paper: 6)."""
    max_steps: int = -1
    """Number of optimizer steps; replaces num_epochs where it is above 0."""
    warmup_ratio: float = 0.04
    """Fraction of the steps in which the learning rate rises, before a cosine to 0 (the paper: 0.04)."""
    batch_size: int = 2
    """Conversations in a micro-batch on each device (the paper: 2 per step)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step."""
    num_anchors: int = 512
    """Most blocks that are drawn from a conversation in each epoch (the paper: 512)."""
    max_length: int = 3072
    """Length in tokens at which conversations are cut (the paper: 3072)."""
    max_grad_norm: float = 1.0
    """Norm at which the gradient is clipped (the paper: 1)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (the paper: 0)."""
    seed: int = 42
    """Seed for the initial weights, the order of conversations and the choice of blocks (the paper: 42)."""
    logging_steps: int = 10
    """Optimizer steps between two entries of the log."""
    eval_steps: int = 500
    """Optimizer steps between two checkpoints.
    The mean acceptance length (tau) on the validation prompts is measured at each."""
    feature_cache_gib: float = 4.0
    """GiB of memory for the target's hidden states; they are computed again in every epoch where they need more."""
    gradient_checkpointing: bool = False
    """Compute the drafter's activations again in the backward pass, which saves memory and costs time."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the log too, if installed: tensorboard, wandb, trackio and others that transformers knows."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how."""

    drafters: tuple[str, ...] = ()
    """Folders of the drafters to measure and compare; the drafter in the output folder by default."""
    sets: tuple[str, ...] = ()
    """Public datasets instead of the held-out prompts; the paper's are gsm8k math500 humaneval mbpp mt_bench alpaca."""
    sets_dir: str | None = None
    """Folder with a NAME.jsonl for each of `sets`, which may then have any name; the Hugging Face Hub by default."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Sampling temperatures to measure at (the paper: 0 and 1)."""
    max_new_tokens: int = 2048
    """Longest response in tokens."""
    num_prompts: int | None = None
    """Most prompts to take from each dataset; all by default."""
    widths: tuple[Width, ...] = ("full", "auto")
    """Verification lengths to measure.
    full: whole drafts, as tau is defined. auto: as `dpace generate`, the number of drafted or copied tokens that is
    fastest on this machine. An integer: that number of draft tokens."""
    predict: bool = False
    """Also predict the speedup at each verification length and concurrency, and check it on a few prompts."""
    server: str | None = None
    """Address of a running server to measure instead, http://host:port: vLLM, SGLang or llama.cpp with a drafter."""
    plain_server: str | None = None
    """Address of a server of the same target without a drafter, as the baseline of --bench.server."""
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of requests at the same time, for servers and predictions."""
    seed: int = 0
    """Seed for sampling at a temperature above 0."""


@dataclass(frozen=True)
class Recipe:
    """All settings, from prompts to a measured drafter.

    A recipe is a YAML file of options; command-line flags override it.
    """

    target: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder or Hub id of the target: the model that is made faster and whose text stays the same."""
    output: str = "dpace-out"
    """Folder that everything is written to."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it; the paper's numbers are without."""
    dtype: Dtype = "auto"
    """Precision of the target's weights.
    auto: bf16 on a GPU; fp32 on a CPU, where texts are equal token for token."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Prompts to train on and to measure on."""
    respond: RespondConfig = field(default_factory=RespondConfig)
    """How the target answers the prompts."""
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    """Size of the drafter."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss that training minimizes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimizer and its schedule."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """What is measured, and how."""


@dataclass(frozen=True)
class CompareConfig(Recipe):
    """Train one recipe with several objectives and seeds, and compare the drafters."""

    output: str = "dpace-compare"
    """Folder that everything is written to; the same command continues an interrupted run in it."""
    objectives: tuple[str, ...] = ("dpace", "dflash", "uniform")
    """Values of loss.objective; append +kl or +lk for the token loss, +overlap for the confidence: dpace+kl+overlap."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each gives every objective the same initial weights, order of conversations and blocks."""
    baseline: str = "dflash"
    """Objective that the others are compared with; it is trained too where `objectives` lacks it."""


@dataclass(frozen=True)
class CheckConfig:
    """Prove that a drafter does not change the text; the exit code is 1 where it does.

    The baseline (decoding without a drafter) must equal `generate` of transformers. In fp32, texts must equal the
    baseline token for token: greedy, and sampled with the same seed; for several block sizes, verification lengths,
    verify rules and batches. Sampled tokens and pairs must have the target's distribution (chi-square). No block may
    see its future. A block in training must equal the block when serving, with the same accepted lengths.

    In bf16, every difference in the text is listed with the target's margin, which tells a tie from a bug.
    """

    target: str
    """Folder or Hub id of the target."""
    drafter: str
    """Folder of the drafter."""
    prompts: str = "demo"
    """JSONL file of prompts; `demo` is the held-out dataset that comes with dpace."""
    num_prompts: int = 4
    """Prompts to take from each dataset of the file."""
    max_new_tokens: int = 64
    """Longest response in tokens."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Precisions of the weights to check in."""
    seed: int = 0
    """Seed for sampling."""
    responses: str | None = None
    """File of responses to read again: greedy answers of `dpace respond` must be the target's own, token for token."""
