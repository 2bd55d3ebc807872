"""TensorRT-LLM: the published layout.

Source: https://nvidia.github.io/TensorRT-LLM; it was not run. Whether it runs DFlash2's convolutions is not said there.
"""

import json
import shlex

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import CONVOLUTIONS, NETWORKS, Engine


class Tensorrt(Engine):
    """TensorRT-LLM: drafters in the published layout, also with convolutions or a selector."""

    name = "tensorrt"
    title = "TensorRT-LLM"
    reads = (*NETWORKS, *CONVOLUTIONS)
    card = """**TensorRT-LLM** (not run by us)

```yaml
{command}
```

`draft_len_schedule` has the draft length up to each number of requests at once, and no drafts above the last one.
"""

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the configuration that the server is given; its first line has the command."""
        return (
            f"# config.yaml, for: trtllm-serve {shlex.quote(target)} --config config.yaml\n"
            f"speculative_config:\n  decoding_type: DFlash\n  speculative_model: {json.dumps(drafter)}\n"
            f"  max_draft_len: {spec.num_draft_tokens}"
        )


ENGINE = Tensorrt()
