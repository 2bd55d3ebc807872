"""SGLang: the published layout.

Source: https://docs.sglang.ai and its sources; it was not run.
"""

import shlex

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import CONVOLUTIONS, NETWORKS, Engine


class Sglang(Engine):
    """SGLang: drafters in the published layout, also with convolutions or a selector."""

    name = "sglang"
    title = "SGLang"
    reads = (*NETWORKS, *CONVOLUTIONS)
    card = """**SGLang** (not run by us)

```bash
{command}
```
"""

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the command that starts a server; SGLang counts the known token in a block."""
        return (
            f"python -m sglang.launch_server --model-path {shlex.quote(target)} --speculative-algorithm DFLASH "
            f"--speculative-draft-model-path {shlex.quote(drafter)} "
            f"--speculative-dflash-block-size {spec.num_draft_tokens + 1}"
        )


ENGINE = Sglang()
