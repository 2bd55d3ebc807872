"""OpenVINO GenAI: the published layout, from which the exporter of optimum-intel makes its files.

Source: `src/cpp/src/speculative_decoding` of openvinotoolkit/openvino.genai, and `Qwen3DFlashDraftModel` of
huggingface/optimum-intel.
"""

import shlex

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import Engine

INT4 = "int4 --group-size-fallback adjust"
"""Format of the target's weights, also where a width is no multiple of 128."""
RUN = """from openvino_genai import LLMPipeline, SchedulerConfig, draft_model
drafter = draft_model("drafter-openvino", "CPU", INFERENCE_PRECISION_HINT="f32")
pipeline = LLMPipeline("target-openvino", "CPU", draft_model=drafter, scheduler_config=SchedulerConfig())
print(pipeline.generate("...", max_new_tokens=256, do_sample=False, num_assistant_tokens={count}))"""
"""It refuses the cache of prefixes, which it has without a `SchedulerConfig`. In bf16, the default on a CPU with AMX,
2026.4.1 ended with SIGFPE for a drafter, and for a target in fp16. Without a count it drafts 5 tokens."""


class Openvino(Engine):
    """Decodes one prompt at a time at temperature 0, with plain DFlash drafters and windows."""

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
            f"{export} --model {shlex.quote(target)} --weight-format {INT4} target-openvino",
            f"{export} --model {shlex.quote(drafter)} --trust-remote-code --disable-convert-tokenizer drafter-openvino",
            f"python -c {shlex.quote(RUN.format(count=spec.num_draft_tokens))}",
        )
        return "\n".join(commands)


ENGINE = Openvino()
