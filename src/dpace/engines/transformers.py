"""transformers, from 5.15: the published layout, with the network's code in the folder.

Source: `DFlashTokenCandidateGenerator` of transformers.
"""

from dpace.drafter.spec import DrafterSpec
from dpace.engines.engine import CONVOLUTIONS, Engine


class Transformers(Engine):
    """transformers: drafters in the published layout, also with convolutions; it runs the code of the folder."""

    name = "transformers"
    title = "transformers"
    reads = ("DFlashDraftModel", "DFlash2DraftModel", *CONVOLUTIONS)
    card = """**transformers** (5.15 or newer, one prompt at a time)

```python
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{target}")
target = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto").eval()
drafter = AutoModel.from_pretrained("{drafter}", trust_remote_code=True, dtype=target.dtype).eval()
messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
options = {{"speculation_type": "dflash", "do_sample": False, "max_new_tokens": 256}}
output = target.generate(**inputs, assistant_model=drafter, **options)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""

    def fault(self, spec: DrafterSpec) -> str:
        """Refuse a selector too: the code in the folder does not run it."""
        if spec.selector:
            return "the drafter has a selector, which transformers does not run; export it without, with --plain"
        return super().fault(spec)

    def command(self, spec: DrafterSpec, drafter: str, target: str) -> str:
        """Write the line of Python that decodes greedily."""
        loaded = f"Drafter.from_pretrained({drafter!r}, dtype=model.dtype)"
        return f'model.generate(**inputs, assistant_model={loaded}, speculation_type="dflash", do_sample=False)'


ENGINE = Transformers()
