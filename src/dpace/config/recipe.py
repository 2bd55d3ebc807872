"""A recipe: all options from prompts to a measured drafter."""

from dataclasses import dataclass, field

from dpace.config.choices import Device, DeviceMap, Dtype
from dpace.config.data import PromptsConfig, RespondConfig
from dpace.config.measuring import BenchConfig
from dpace.config.training import DrafterConfig, LossConfig, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """All settings, from prompts to a measured drafter.

    A recipe is a YAML file of options, or the name of one that comes with dpace (`dpace --help` lists them);
    command-line flags override it.
    """

    target: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Folder or Hub id of the target: the model that is made faster and whose text stays the same."""
    output: str = "dpace-out"
    """Folder that everything is written to."""
    thinking: bool = False
    """Turn thinking on, for chat templates that offer it; the paper's numbers are without."""
    dtype: Dtype = "auto"
    """Precision of the target's weights.
    auto: bf16 on an accelerator; fp32 on a CPU, where texts are equal token for token."""
    device: Device = "auto"
    """Where to compute.
    auto: the accelerator that torch finds, else the CPU. Choose one of several with CUDA_VISIBLE_DEVICES."""
    device_map: DeviceMap = None
    """auto: spread the target's layers over all GPUs, for targets that are larger than one."""
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
    """Values of loss.objective; append +kl, +lk or +mix for the token loss, +overlap for the confidence,
    +validity for a joint validity head: dpace+kl+overlap, vat+mix+validity."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each gives every objective the same initial weights, order of conversations and blocks."""
    baseline: str = "dflash"
    """Objective that the others are compared with; it is trained too where `objectives` lacks it."""
    wide: bool = False
    """Show every column in the terminal, wider than 80 characters; the page of `dpace report` has them all."""
