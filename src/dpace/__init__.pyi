"""The public names, by the module that each is loaded from."""

from .config import (
    BenchConfig as BenchConfig,
    DrafterConfig as DrafterConfig,
    LossConfig as LossConfig,
    PromptsConfig as PromptsConfig,
    Recipe as Recipe,
    RespondConfig as RespondConfig,
    TrainConfig as TrainConfig,
)
from .decode import (
    Decoder as Decoder,
    Generation as Generation,
    Paces as Paces,
    custom_generate as custom_generate,
    generate as generate,
    generate_batch as generate_batch,
    generate_plain as generate_plain,
    stream as stream,
)
from .drafter import Drafter as Drafter, load_drafter as load_drafter
from .loss import Slots as Slots
from .measure.heldout import heldout_acceptance as heldout_acceptance
from .metrics import Acceptance as Acceptance
from .prompts.prompts import (
    Prompt as Prompt,
    PromptParts as PromptParts,
    read_prompts as read_prompts,
    split_prompts as split_prompts,
)
from .recipes.recipe_file import read_recipe as read_recipe, write_recipe as write_recipe
from .respond.answering import write_responses as write_responses
from .respond.responses import Response as Response, read_responses as read_responses
from .target import Target as Target
from .target.chat import encode_chat as encode_chat
from .target.locate import find_target as find_target
from .training.run import make_datasets as make_datasets, train as train

__version__: str
