"""Options of the drafter, the loss and the optimizer."""

from dataclasses import dataclass
from typing import Literal

from dpace.config.choices import Confidence, ObjectiveName, Reduction, TargetShard, TokenLoss, Validity


@dataclass(frozen=True)
class DrafterConfig:
    """Size of the drafter; the rest of its shape follows the target."""

    init: str | None = None
    """Folder or Hub id of a trained drafter to start from; size and mask token are then its own (docs/adapt.md)."""
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
    conv_kernel_size: int = 0
    """Slots of a block that convolutions in each layer read, as in DFlash2; 0 for none, as in DFlash.
    2 helps short trainings; docs/engines.md says which engines run them."""


@dataclass(frozen=True)
class LossConfig:
    """Loss that training minimizes."""

    objective: ObjectiveName = "dpace"
    """How much each slot of a block counts in the loss; docs/objectives.md says when to use which.
    One of these names, or package.module:function for your own; the module is looked for in this folder too."""
    token_loss: TokenLoss = "nll"
    """Loss of one slot.
    nll (the paper's): -log of the probability of the target's token. kl: divergence from the target's distribution.
    lk: -log of the overlap of both distributions. mix: half nll, half kl."""
    confidence: Confidence = "token"
    """How D-PACE estimates that a slot is accepted.
    token: by the probability of the target's token. overlap: by the overlap of both models' distributions."""
    alpha: float = 0.5
    """Smoothing of D-PACE's weights, 0 to 1 (the paper: 0.5; 0.3 to 0.7 work about as well)."""
    alpha_end: float | None = None
    """Value that alpha reaches at the end of training, in a straight line; alpha stays as it is by default."""
    gamma: float | None = None
    """Decay length, in slots, of the objectives dflash and vat; 7, 5 or 4 by default for blocks of 16, 10 or 8."""
    base: float = 0.8
    """Weight of a slot relative to the one before it, for the objective medusa."""
    reduction: Reduction = "anchors"
    """What the summed loss of an optimizer step is divided by; dpace.loss.block_loss has the formulas.
    anchors: blocks, then conversations. batch (the paper's code): conversations. slots: scored slots. weights: the
    weights' sum."""
    validity: Validity = "off"
    """Train a validity head too: one linear layer that says which slots come before the first wrong one.
    stopped: the drafter learns nothing from it. joint: it does, as in VAT (arXiv 2608.30135)."""
    vocabulary: Literal["all", "seen"] = "all"
    """Tokens that the softmax covers: all, or only those seen in the training text (much cheaper on a CPU)."""

    chunk_mib: int | None = None
    """MiB of logits that the loss computes at once, 1 or more; lower it where memory is short.
    By default 4 on a CPU and 1024 on an accelerator, and more for token losses that need whole rows."""

    @property
    def needs_target_probs(self) -> bool:
        """Whether the loss compares with the target's distribution, which takes its last hidden states too."""
        return self.token_loss != "nll" or self.confidence == "overlap"


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer and its schedule; the defaults are the paper's."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw (the paper's), or muon for the matrices.
    Muon is better for short trainings; its steps are slower."""
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
    group_by_length: bool = True
    """Give each step conversations of about the same length, which saves padding; off is the paper's random order."""
    num_anchors: int = 512
    """Most blocks that are drawn from a conversation in each epoch (the paper: 512)."""
    grow_blocks: bool = False
    """Train on short blocks first: of 4 slots, then of twice as many, up to block_size, in equal parts of the steps.
    A step has as many slots as ever, in more blocks; docs/objectives.md says what it gains."""
    on_policy_share: float = 0.0
    """Share of the blocks, 0 to 1, that are drawn where decoding restarts, at the end of training; it grows from 0.
    Each step then drafts twice; docs/objectives.md says how the places are estimated."""
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
    """Optimizer steps between two measurements of tau on the validation prompts; the best weights are kept."""
    save_steps: int | None = None
    """Optimizer steps between two checkpoints that training can go on from; eval_steps by default.
    The newest one and the best weights are kept. All take less disk than ten drafters in fp32."""
    feature_cache_gib: float = 4.0
    """GiB of memory for the target's hidden states; they are computed again in every epoch where they need more."""
    feature_files: str | None = None
    """Folder that keeps these hidden states on disk, for all epochs, ranks and later runs; by default none does."""
    feature_dtype: Literal["target", "bfloat16", "float8"] = "target"
    """How they are kept there: as the target gives them, or rounded to 16 bits, or to 8 with a scale for each token."""
    feature_files_gib: float = 100.0
    """Most GiB of disk that are added to feature_files."""
    feature_servers: tuple[str, ...] = ()
    """Addresses of running vLLM servers that compute what goes into feature_files; by default this process does."""
    target_shard: TargetShard = "none"
    """How the target's weights are spread over the ranks of `dpace train`, where they do not fit into one device.
    none: each rank has all. fsdp: a layer is gathered where it runs. tp: each matrix is split, and all ranks run all
    texts; take it only where fast links connect the GPUs."""
    torch_compile: bool = False
    """Compile the drafter with torch.compile, which makes steps on a GPU faster and the first ones slow."""
    gradient_checkpointing: bool = False
    """Compute the drafter's activations again in the backward pass, which saves memory and costs time."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the log too, if installed: tensorboard, wandb, trackio and others that transformers knows."""
