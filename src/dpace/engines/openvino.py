"""OpenVINO GenAI: the published layout, from which the exporter of optimum-intel makes its files.

Source: `src/cpp/src/speculative_decoding` of openvinotoolkit/openvino.genai, and `Qwen3DFlashDraftModel` of
huggingface/optimum-intel.
"""

import shlex

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import Engine

RUN = """from openvino_genai import LLMPipeline, SchedulerConfig, draft_model
options = {{"draft_model": draft_model("drafter-openvino"), "scheduler_config": SchedulerConfig()}}
pipeline = LLMPipeline("target-openvino", "CPU", **options)
print(pipeline.generate("...", max_new_tokens=256, do_sample=False, num_assistant_tokens={count}))"""
"""It refuses caches of prefixes, which it has without a `SchedulerConfig`; without a count it drafts 5 tokens."""


class Openvino(Engine):
    """See `Engine`."""

    name = "openvino"
    title = "OpenVINO GenAI"
    card = """**OpenVINO GenAI** (2026.4 or newer, at temperature 0, one prompt at a time)

```bash
pip install openvino-genai optimum-intel nncf diffusers einops
{command}
```

Try `--weight-format int8` and `fp16` for the target too.
"""

    def fault(self, spec: DrafterSpec) -> str:
        """See `Engine`; it computes as if both keys had their usual value."""
        for key, usual in {"is_causal": False, "input_embedding_scale": 1.0}.items():
            if (value := getattr(spec, key)) != usual:
                return f"{key} is {value}, and {self.title} takes it for {usual}; serve this drafter with vLLM or dpace"
        return super().fault(spec)

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """See `Engine`: the exporter's two commands, and a prompt."""
        export = "optimum-cli export openvino --task text-generation-with-past"
        commands = (
            f"{export} --model {shlex.quote(target)} --weight-format int4 target-openvino",
            f"{export} --model {shlex.quote(drafter)} --trust-remote-code --disable-convert-tokenizer drafter-openvino",
            f"python -c {shlex.quote(RUN.format(count=spec.num_draft_tokens))}",
        )
        return "\n".join(commands)


ENGINE = Openvino()
