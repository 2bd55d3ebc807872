"""vLLM: the published layout, also with tables of the drafter's own.

Source: https://docs.vllm.ai; docs/results.md says what was run.
"""

import json
import shlex

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import CONVOLUTIONS, DSPARK, NETWORKS, TABLES, Engine


class Vllm(Engine):
    """vLLM: drafters in the published layout, also with convolutions, a selector or tables of their own."""

    name = "vllm"
    title = "vLLM"
    reads = (*NETWORKS, DSPARK, *CONVOLUTIONS, *TABLES)
    card = """**vLLM**

```bash
{command}
```

Adaptive verification verifies no more of a draft than pays under the load: `"enable_adaptive_verification": true` in
the speculative config. It needs Model Runner V2 with full CUDA graphs (not run by us).
"""

    def fault(self, spec: DrafterSpec) -> str:
        """Refuse a selector beside a small vocabulary too (vllm#57934)."""
        if spec.selector and spec.draft_vocab_size:
            return (
                f"the drafter has a selector and a small vocabulary, draft_vocab_size {spec.draft_vocab_size}, which "
                "vLLM does not read together; export it without its selector, with --plain"
            )
        return super().fault(spec)

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the command that starts a server; vLLM does not count the known token."""
        config = {"method": spec.method, "model": drafter, "num_speculative_tokens": spec.num_draft_tokens}
        return f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(json.dumps(config))}"


ENGINE = Vllm()
