"""DFlash and DFlash2, which has convolutions: the keys of their configs.

Source: DFlash (arXiv 2602.06036); DFlash2, z-lab/dflash.
"""

from typing import Any

CONVOLUTION_KEYS = ("conv_kernel_size", "conv_group_size")


def config_keys(spec: Any) -> dict[str, Any]:
    """Return what convolutions add to `dflash_config`.

    llama.cpp wants k (k + 1) <= hidden size of the selector.
    """
    if not spec.conv_kernel_size:
        return {}
    keys = {name: getattr(spec, name) for name in CONVOLUTION_KEYS}
    if spec.selector:
        return keys
    top_k = next((k for k in (16, 8, 4) if k * (k + 1) <= spec.hidden_size), 2)
    return {**keys, "selector_rank": 1, "selector_top_k": top_k}
