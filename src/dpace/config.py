"""Every knob, with its default and where that comes from. Imports no torch, so that `--help` answers at once."""

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
    """How the tokens of a response are chosen, and how many."""

    max_new_tokens: int = 256
    """Longest response in tokens; reached exactly unless a stop token comes first."""
    temperature: float = 0.0
    """Temperature of the target's distribution; 0 is greedy."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sample from the most likely tokens up to this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the highest probability."""
    seed: int | None = None
    """Seed of the draws at temperature above 0; by default torch's global generator."""


@dataclass(frozen=True)
class PromptsConfig:
    """Where prompts come from."""

    path: str = "demo"
    """JSONL file with `messages`, `turns` or `prompt` a line; `demo` is the set that comes with dpace."""
    heldout_path: str | None = None
    """File of prompts to measure on; by default the demo's, or a share of the prompts that is then not trained on."""
    num_heldout: int = 64
    """Size of that share, at most a tenth of the prompts."""
    num_validation: int = 32
    """Size of another share, at most a tenth, that is not trained on either and chooses the checkpoint."""
    limit: int | None = None
    """Use only the first so many prompts for training."""


@dataclass(frozen=True)
class RespondConfig:
    """How the target answers prompts."""

    max_new_tokens: int = 2048
    """Longest response in tokens (DFlash's benchmark uses 2048)."""
    temperature: float = 0.0
    """0 is greedy: the text that speculative decoding is to reproduce."""
    batch_size: int = 32
    """Prompts answered at once."""
    seed: int = 0
    """Of the draws at temperature above 0."""


@dataclass(frozen=True)
class DrafterConfig:
    """The drafter's size. The rest of its shape is the target's."""

    num_layers: int = 3
    """Decoder layers (the paper has 3 and 5)."""
    block_size: int = 16
    """The anchor and block_size - 1 draft slots (the paper: 16, and 10 for Llama)."""
    num_features: int | None = None
    """Target layers that give features; as many as num_layers by default."""
    target_layer_ids: tuple[int, ...] | None = None
    """Those layers by number (0-based, their output) instead of the published rule."""
    mask_token_id: int | None = None
    """Reserved token for what is not drafted yet; chosen from the tokenizer by default."""
    norm_scale: float = 1.0
    """Initial value of the final norm's weights; see docs/training.md for small budgets."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimized."""

    objective: Objective = "dpace"
    """How much each slot counts; docs/objectives.md says when to use which."""
    token_loss: TokenLoss = "nll"
    """Of a slot: -log of the target's token (the paper's), KL to the target's distribution, or -log of the overlap."""
    confidence: Confidence = "token"
    """What D-PACE's weights take for a slot's acceptance: the probability of the target's token, or the overlap."""
    alpha: float = 0.5
    """D-PACE's smoothing (paper: 0.5; 0.3 to 0.7 work)."""
    gamma: float | None = None
    """Decay length in slots of dflash and vat; 7, 5, 4 for blocks of 16, 10, 8 by default."""
    base: float = 0.8
    """Medusa's base."""
    reduction: Reduction = "anchors"
    """What the sum is divided by, see dpace.loss.block_loss."""
    vocabulary: Literal["all", "seen"] = "all"
    """Softmax over all tokens, or only over those of the training text: much cheaper on a CPU with a narrow job."""

    @property
    def needs_target_probs(self) -> bool:
        """The target's distribution is compared with, so that its last hidden states are needed too."""
        return self.token_loss != "nll" or self.confidence == "overlap"


@dataclass(frozen=True)
class TrainConfig:
    """The optimizer and its schedule; defaults are the paper's."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW (the paper's), or Muon for the matrices: better for short runs, dearer a step, not for sharded weights."""
    learning_rate: float = 6e-4
    """Peak (paper: 6e-4)."""
    num_epochs: float = 6.0
    """Passes over the data (paper: 6)."""
    max_steps: int = -1
    """Optimizer steps; overrides num_epochs where above 0."""
    warmup_ratio: float = 0.04
    """Share of the steps with a rising learning rate; cosine to 0 after (paper: 0.04)."""
    batch_size: int = 2
    """Conversations a device and micro-batch (paper: 2 a step)."""
    gradient_accumulation_steps: int = 1
    """Micro-batches a step."""
    num_anchors: int = 512
    """Blocks a conversation and visit, at most (paper: 512)."""
    max_length: int = 3072
    """Longer conversations are cut, in tokens (paper: 3072)."""
    max_grad_norm: float = 1.0
    """Gradient clipping (paper: 1.0)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (paper: 0)."""
    seed: int = 42
    """Of initial weights, order and anchors (paper: 42)."""
    logging_steps: int = 10
    """Steps between log lines."""
    eval_steps: int = 500
    """Steps between measurements of tau on the validation share, each with a checkpoint."""
    feature_cache_gib: float = 4.0
    """Keep all target features in memory where they need no more than this; otherwise recompute them every visit."""
    gradient_checkpointing: bool = False
    """Recompute the drafter's activations in the backward pass to save memory."""
    report_to: tuple[str, ...] = ()
    """Trackers of transformers' Trainer: tensorboard, wandb, trackio and others, where they are installed."""


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    drafters: tuple[str, ...] = ()
    """Folders of the drafters to compare; by default the one in the output folder."""
    sets: tuple[str, ...] = ()
    """Public benchmarks instead of the held-out prompts: gsm8k, math500, humaneval, mbpp, mt_bench, alpaca (the paper's six)."""
    sets_dir: str | None = None
    """Read them from NAME.jsonl in this folder, which may have others; from the Hugging Face Hub by default."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Temperatures (paper: 0 and 1)."""
    max_new_tokens: int = 2048
    """Longest response in tokens."""
    num_prompts: int | None = None
    """Prompts of each set, at most."""
    widths: tuple[Width, ...] = ("full", "auto")
    """Verify all of a draft, as tau is defined; what pays on this machine, drafted or copied, as `dpace generate` does; or so many tokens."""
    predict: bool = False
    """Also predict the speedup at every width and at these concurrencies, say where not to use the drafter, and check it on a few prompts."""
    server: str | None = None
    """Measure a running server with a drafter instead: vLLM, SGLang or llama.cpp at http://host:port."""
    plain_server: str | None = None
    """A server of the same model without one, to compare with."""
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    """Requests at once, for servers and predictions."""
    seed: int = 0
    """Of the draws at temperature above 0."""


@dataclass(frozen=True)
class Recipe:
    """From prompts to a measured drafter. A recipe file holds these values; flags override them."""

    target: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder or Hub id of the model whose text is kept."""
    output: str = "dpace-out"
    """Folder for everything that is written."""
    thinking: bool = False
    """Switch thinking on, in chat templates that have the switch; the paper's numbers are without."""
    dtype: Dtype = "auto"
    """Of the target's weights: by default bf16 on a GPU and fp32 on a CPU, where texts are then equal token for token."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """Prompts for training and for measuring."""
    respond: RespondConfig = field(default_factory=RespondConfig)
    """How the target answers."""
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    """The drafter's size."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What is minimized."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimizer and schedule."""
    bench: BenchConfig = field(default_factory=BenchConfig)
    """What is measured."""


@dataclass(frozen=True)
class CompareConfig(Recipe):
    """One recipe, trained with several objectives and seeds."""

    output: str = "dpace-compare"
    """Folder for everything that is written; the same command goes on in it."""
    objectives: tuple[str, ...] = ("dpace", "dflash", "uniform")
    """Values of loss.objective, each with +kl or +lk for that token loss, and +overlap for that confidence: dpace+kl+overlap."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each gives the same initial weights, order and anchors to every objective."""
    baseline: str = "dflash"
    """The objective that the others are compared with; added where it is missing."""


@dataclass(frozen=True)
class CheckConfig:
    """Check that a drafter never changes the text. Fails (exit code 1) if it does.

    In fp32: text equal to plain decoding, token for token, over block sizes, widths, verify rules and batches, greedy and sampled
    with the same seed; chi-square of sampled tokens and pairs against the target; no block sees its future; a block in training is
    the block when serving, and accepted lengths are the same. In bf16: every difference in the text, with the target's margin,
    which tells a tie from a bug.
    """

    target: str
    """Folder or Hub id."""
    drafter: str
    """The drafter's folder."""
    prompts: str = "demo"
    """JSONL file of prompts; `demo` is the held-out set that comes with dpace."""
    num_prompts: int = 4
    """Prompts of each set."""
    max_new_tokens: int = 64
    """Longest response in tokens."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Each is checked."""
    seed: int = 0
    """Of the sampled texts."""
