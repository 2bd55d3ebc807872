"""The whole method on one page: a target's answers, a drafter, the D-PACE loss, and decoding with the same text.

python examples/one_page.py [TARGET [OUTPUT]]

It needs torch and transformers, and takes some minutes on two CPU cores. TARGET is a Llama, Qwen3 or the like: a Hub id
or a folder. OUTPUT gets a drafter in the published layout, so `dpace bench --target TARGET --drafters OUTPUT` and all
engines read it. dpace does the same in less time and memory; `tests/integration/test_one_page.py` holds both equal.

A block has BLOCK_SIZE slots. Slot 0 is the anchor, a token that is known; the others are drafted.
Sources: D-PACE (arXiv 2605.18810), DFlash (arXiv 2602.06036).
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen3Config
from transformers.models.qwen3 import modeling_qwen3 as qwen3

BLOCK_SIZE = 8
NUM_LAYERS = 2  # of the drafter
ALPHA, GAMMA = 0.5, 4.0  # smoothing of the weights, and length of the fixed decay, as in both papers
ANSWER_TOKENS = 48
STEPS, BATCH, NUM_ANCHORS, LEARNING_RATE = 200, 4, 8, 2e-3
NUM_HELDOUT = 3  # of these prompts, which only measure
THINGS = "tea coffee bread cheese honey soap paper ink glass wool silk salt rice maps clocks boats lamps shoes".split()
PROMPTS = [f"Write a list of five short facts about {thing}, one on a line." for thing in THINGS]


# 1. The target: a frozen model whose text is to stay as it is.
def feature_layers(target):
    """Return three decoder layers, spread evenly from the second to the third from the last."""
    return [round(1 + i * (target.config.num_hidden_layers - 4) / 2) for i in range(3)]


@torch.no_grad()
def read(target, token_ids, cache=None):
    """Return the target's own next token after each token, and the features of each: three layers side by side."""
    out = target(torch.tensor([token_ids]), cache=cache, output_hidden_states=True)
    # hidden_states[0] is the embedding, so the output of layer i is hidden_states[i + 1].
    features = torch.cat([out.hidden_states[i + 1][0] for i in feature_layers(target)], dim=-1)
    return out.logits[0].argmax(-1).tolist(), features


def stop_tokens(target):
    """Return the tokens that end an answer."""
    stops = target.generation_config.eos_token_id
    return stops if isinstance(stops, list) else [stops]


def choose_mask_token(tokenizer, target):
    """Return a token that no text has, for slots that are to be drafted: an unused one, else a special one."""
    if len(tokenizer) < target.config.vocab_size:
        return len(tokenizer)
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        is_used = token.content in named or token.content in tokenizer.chat_template or token_id in stop_tokens(target)
        if token.special and not is_used:
            return token_id
    raise ValueError("no special token is free to be the mask token; choose a target whose tokenizer has one")


# 2. The drafter: a few layers in which the slots of a block see the target's features of the text, and each other.
class DraftAttention(qwen3.Qwen3Attention):
    """Qwen3's projections and norms. The queries are slots; the keys are the tokens of the text and the same slots."""

    def forward(self, slots, context, rotation, mask):
        """Compute "slot hidden" from slots "slot hidden", context "token hidden", and a mask "slot token+slot"."""
        heads = (-1, self.head_dim)
        rows = torch.cat([context, slots])  # keys and values of both come from the same projections
        q = self.q_norm(self.q_proj(slots).unflatten(-1, heads)).transpose(0, 1)  # "head slot dim"
        k = self.k_norm(self.k_proj(rows).unflatten(-1, heads)).transpose(0, 1)
        v = self.v_proj(rows).unflatten(-1, heads).transpose(0, 1)
        cos, sin = rotation
        k = k * cos + qwen3.rotate_half(k) * sin
        q = q * cos[len(context) :] + qwen3.rotate_half(q) * sin[len(context) :]
        out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
        return self.o_proj(out.transpose(0, 1).flatten(1))


class DraftLayer(nn.Module):
    """A layer of Qwen3 with this attention; the text's rows enter it without the input norm."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = DraftAttention(config, layer_idx=0)
        self.mlp = qwen3.Qwen3MLP(config)
        self.input_layernorm = qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, slots, context, rotation, mask):
        """Add attention and feed-forward to the slots."""
        slots = slots + self.self_attn(self.input_layernorm(slots), context, rotation, mask)
        return slots + self.mlp(self.post_attention_layernorm(slots))


class Drafter(nn.Module):
    """The DFlash network. Embedding and LM head are the target's; names of the parts are those that engines read."""

    def __init__(self, target, mask_token):
        super().__init__()
        self.mask_token = mask_token
        same = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim".split()
        same += ["rms_norm_eps", "rope_parameters", "max_position_embeddings"]
        sizes = {name: getattr(target.config, name) for name in same}
        self.config = config = Qwen3Config(**sizes, num_hidden_layers=NUM_LAYERS)
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(NUM_LAYERS))
        self.norm = qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = qwen3.Qwen3RotaryEmbedding(config)
        # Small logits at first: the loss then begins near log(vocabulary).
        self.norm.weight.data.fill_(0.1 * float(target.model.norm.weight.mean()))

    def forward(self, embeds, features, slot_positions, mask=None):
        """Return hidden states of slots, "slot hidden"; the features are those of the first tokens of the text."""
        context = self.hidden_norm(self.fc(features))
        positions = torch.cat([torch.arange(len(features)), slot_positions])
        rotation = [part[0] for part in self.rotary(embeds, positions[None])]
        for layer in self.layers:
            embeds = layer(embeds, context, rotation, mask)
        return self.norm(embeds)


# 3. Blocks: a text is cut at anchors, and all of its blocks are drafted in one pass.
def cut_blocks(token_ids, anchors, mask_token):
    """Cut blocks at anchors: inputs, labels, which slots are scored, positions (all "block slot"), and the mask."""
    text = torch.tensor(token_ids)
    positions = torch.tensor(anchors)[:, None] + torch.arange(BLOCK_SIZE)
    is_scored = positions < len(text)
    labels = text[positions.clamp_max(len(text) - 1)].where(is_scored, 0)
    is_scored[:, 0] = False  # the anchor is known
    inputs = torch.full_like(labels, mask_token)
    inputs[:, 0] = labels[:, 0]
    # A slot sees the text strictly before its anchor: the anchor's own features are not there yet when one decodes.
    sees_text = (torch.arange(len(text)) < positions[:, :1]).repeat_interleave(BLOCK_SIZE, 0)
    # It sees all slots of its own block, and no other block.
    number = torch.arange(len(anchors)).repeat_interleave(BLOCK_SIZE)
    mask = torch.cat([sees_text, number[:, None] == number], dim=1)  # "block*slot token+block*slot"
    return inputs, labels, is_scored, positions, mask


# 4. The loss: a slot's cross-entropy counts as much as the slot adds to the expected number of accepted tokens.
@torch.no_grad()
def dpace_weights(token_probs, is_scored):
    """Return w[j] = sum over m >= j of P[m], where P[m] is the chance that slots 1 to m are all accepted.

    The probability q that the drafter gives the right token, smoothed to s = (1 - ALPHA) q + ALPHA, is the chance that
    one slot is accepted. The sum of all P is then the expected accepted length, and w[j] is its gradient by log s[j].
    Without smoothing (ALPHA = 0) this is the gradient by log q[j] itself; but the products vanish while the drafter is
    bad, late slots get no weight, and the training collapses. With it, P[m] is never below ALPHA ** m. The weights are
    constants in the loss, which would otherwise fall where the drafter makes itself less sure.
    """
    smoothed = torch.where(is_scored, (1 - ALPHA) * token_probs + ALPHA, 1.0)
    reached = smoothed.cumprod(-1) * is_scored  # P
    return reached.flip(-1).cumsum(-1).flip(-1) * is_scored


def decay_weights(token_probs, is_scored):
    """Return DFlash's fixed decay, which D-PACE is compared with: exp(-(slot - 1) / GAMMA), whatever is accepted."""
    return torch.exp(-(torch.arange(BLOCK_SIZE) - 1) / GAMMA) * is_scored


def draft_loss(drafter, target, token_ids, features, anchors, weigh=dpace_weights):
    """Return the sum over the slots of a block, and the mean over the blocks of a text.

    It is not divided by the sum of the weights, so a block that gets far counts more than one that fails at once.
    """
    inputs, labels, is_scored, positions, mask = cut_blocks(token_ids, anchors, drafter.mask_token)
    embeds = target.get_input_embeddings()(inputs.flatten())
    logits = target.lm_head(drafter(embeds, features, positions.flatten(), mask))
    # All logits are there at once, "block*slot vocabulary". A slot predicts the token at its own position.
    losses = cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
    weights = weigh(torch.exp(-losses), is_scored)
    return (weights * losses).sum() / len(anchors)


def train(drafter, target, texts, weigh=dpace_weights):
    """Train on texts, each of token ids and the place where the answer begins."""
    rng = random.Random(0)
    # The target does not change, so its features are read once.
    kept = [(token_ids, read(target, token_ids)[1], start) for token_ids, start in texts]
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        losses = []
        for token_ids, features, start in rng.sample(kept, BATCH):
            places = range(start, len(token_ids) - 1)  # anchors lie in the answer, before its last token
            anchors = sorted(rng.sample(places, min(NUM_ANCHORS, len(places))))
            losses.append(draft_loss(drafter, target, token_ids, features, anchors, weigh) / BATCH)
            losses[-1].backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:  # it may grow while the drafter gets better, as weights do; tau is what counts
            print(f"step {step}: loss {sum(losses):.2f}", flush=True)


# 5. Decoding: the drafter proposes a block, the target reads it in one pass, and keeps what it would have written.
@torch.no_grad()
def propose(drafter, target, last_token, features):
    """Draft the tokens after the last one; all tokens before it have features."""
    block = torch.tensor([last_token] + [drafter.mask_token] * (BLOCK_SIZE - 1))
    positions = len(features) + torch.arange(BLOCK_SIZE)
    hidden = drafter(target.get_input_embeddings()(block), features, positions)
    return target.lm_head(hidden[1:]).argmax(-1).tolist()


def generate(target, drafter, prompt_ids, num_tokens):
    """Return prompt and answer, and the number of accepted draft tokens of each pass after the first."""
    stops = stop_tokens(target)
    cache = DynamicCache(config=target.config)
    choices, features = read(target, prompt_ids, cache)
    text = [*prompt_ids, choices[-1]]
    accepted_lengths = []
    while text[-1] not in stops and len(text) < len(prompt_ids) + num_tokens:
        draft = propose(drafter, target, text[-1], features)
        choices, new_features = read(target, [text[-1], *draft], cache)
        num_accepted = 0
        while num_accepted < len(draft) and draft[num_accepted] == choices[num_accepted]:
            num_accepted += 1
        accepted_lengths.append(num_accepted)
        # After the accepted tokens comes the target's own next token. So each pass gives a token or more.
        for token in [*draft[:num_accepted], choices[num_accepted]]:
            if text[-1] not in stops and len(text) < len(prompt_ids) + num_tokens:
                text.append(token)
        if num_accepted < len(draft):
            cache.crop(num_accepted - len(draft))  # a negative number: so many tokens leave the end
        features = torch.cat([features, new_features[: num_accepted + 1]])  # of the last token and the accepted ones
    return text, accepted_lengths


def save(drafter, target, folder):
    """Write the drafter in the published layout. Engines take embedding and LM head from the target."""
    ids = {"mask_token_id": drafter.mask_token, "target_layer_ids": feature_layers(target)}
    facts = {"architectures": ["DFlashDraftModel"], "num_target_layers": target.config.num_hidden_layers}
    facts |= {"block_size": BLOCK_SIZE, "is_causal": False, "tie_word_embeddings": False, "dtype": "bfloat16"}
    facts |= {"rope_theta": drafter.config.rope_parameters["rope_theta"], "dflash_config": ids, **ids}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(drafter.config.to_dict() | facts, indent=2))
    weights = {name: weight.bfloat16() for name, weight in drafter.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def measure(target, drafter, texts):
    """Decode held-out prompts, and say how many tokens a pass gives."""
    accepted = []
    for text, start in texts:
        ours, lengths = generate(target, drafter, text[:start], ANSWER_TOKENS)
        assert ours == text, "the text is not the target's own"
        accepted += lengths
    tau = 1 + sum(accepted) / len(accepted)  # accepted draft tokens, and the target's own next token
    return f"same text; {len(accepted)} passes gave {tau:.2f} tokens each (tau)"


def main(name="HuggingFaceTB/SmolLM2-135M-Instruct", output="dpace-one-page"):
    """Go from prompts to two drafters, one with each loss; write the one with D-PACE."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    target: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
    print(f"the target answers {len(PROMPTS)} prompts", flush=True)
    texts = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        whole = target.generate(**asked, do_sample=False, max_new_tokens=ANSWER_TOKENS)  # plain decoding
        texts.append((whole[0].tolist(), asked["input_ids"].shape[1]))
    for loss, weigh in {"fixed decay": decay_weights, "D-PACE": dpace_weights}.items():
        torch.manual_seed(0)  # both start from the same weights
        drafter = Drafter(target, choose_mask_token(tokenizer, target))
        train(drafter, target, texts[NUM_HELDOUT:], weigh)
        print(f"{loss}: {measure(target, drafter, texts[:NUM_HELDOUT])}", flush=True)
    save(drafter, target, Path(output))
    print(f"the drafter with D-PACE is in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
