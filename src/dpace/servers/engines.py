"""How vLLM, SGLang and llama.cpp are asked, and what they report of verifications."""

import json
import re

from dpace.servers.apis import BROKEN, Counts, Server, histogram_of, number_of, text_of, tokens_of, told
from dpace.servers.transport import Address, Refused

MODEL_KEYS = ("model_alias", "served_model_name", "model_path")
"""Where llama.cpp and SGLang say which model they serve."""


class VllmServer(Server):
    """vLLM: `/v1/completions`, counters in `/metrics`.

    Source: its metrics `vllm:spec_decode_*`, https://docs.vllm.ai/en/latest/design/metrics.html.
    """

    engine = "vllm"

    def __init__(self, url: str, vocab_size: int | None = None):
        super().__init__(url, vocab_size)
        page = self.address.get("/v1/models")
        try:
            self.model = text_of(json.loads(page)["data"][0]["id"])
        except (*BROKEN, RecursionError) as error:
            raise ValueError(
                f"{self.url}/v1/models answers {self.address.words(page)}, expected a list of models; is it vLLM's "
                "server?"
            ) from error

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "stream": True,
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read(self, event, token_ids):
        """See `Server`."""
        for choice in event.get("choices", ()):
            token_ids += tokens_of(choice.get("token_ids"))

    def end(self, event):
        """See `Server`."""
        found = (told(choice.get("finish_reason"), str) for choice in event.get("choices", ()))
        return next(filter(None, found), None)

    def text(self, event):
        """See `Server`."""
        (choice,), usage = event["choices"], event.get("usage") or {}
        stop = choice.get("stop_reason")  # a token's number, or a text to stop at; None for the end of the sequence
        return told(choice.get("text"), str) or "", told(usage.get("completion_tokens"), int), told(stop, int)

    def counters(self):
        """See `Server`."""
        text = self.address.get("/metrics")
        try:
            return self._read_counters(text)
        except BROKEN as error:
            raise ValueError(
                f"{self.url}/metrics has counters that cannot be read ({self.address.words(error)}); see which version "
                "runs"
            ) from error

    def _read_counters(self, text: str) -> Counts | None:
        """Find the counters of speculative decoding in the page."""

        def values(name: str) -> list[tuple[str, int]]:
            pattern = rf"^vllm:spec_decode_{name}_total(?:\{{([^}}]*)\}})? ([0-9.e+]+)$"
            found = re.findall(pattern, text, re.MULTILINE)
            return [(labels, round(float(value))) for labels, value in found]

        drafts = values("num_drafts")
        if not drafts:
            return None
        reached: dict[int, int] = {}
        for labels, value in values("num_accepted_tokens_per_pos"):
            position = re.search(r'position="(\d+)"', labels)
            if position:
                reached[int(position[1])] = reached.get(int(position[1]), 0) + value
        total = sum(value for _, value in drafts)
        reach = [total, *(reached[i] for i in sorted(reached)), 0]
        histogram = [a - b for a, b in zip(reach, reach[1:], strict=False)] if reached else None
        return Counts(total, sum(value for _, value in values("num_accepted_tokens")), histogram)


class SglangServer(Server):
    """SGLang: its native `/generate`, counts in `meta_info`.

    Source: `spec_verify_ct` and `spec_accept_histogram` of sgl-project/sglang.
    """

    engine = "sglang"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampling_seed": seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        return "/generate", {"input_ids": list(token_ids), "sampling_params": sampling, "stream": True}

    def read(self, event, token_ids):
        """See `Server`."""
        meta, new = event.get("meta_info", {}), tokens_of(event.get("output_ids"))
        if len(new) == meta.get("completion_tokens"):
            token_ids.clear()  # the event has all so far, unless the server was told to send the rest only
        token_ids += new
        if not meta.get("spec_verify_ct"):
            return None
        verified = number_of(meta["spec_verify_ct"])
        histogram = histogram_of(meta.get("spec_accept_histogram") or meta.get("spec_correct_drafts_histogram"))
        accepted = meta.get("spec_accept_token_num", meta.get("spec_num_correct_drafts"))
        if accepted is None:
            accepted = max(0, number_of(meta["completion_tokens"]) - 1 - verified)
        return Counts(verified, number_of(accepted), histogram)

    def end(self, event):
        """See `Server`."""
        reason = event.get("meta_info", {}).get("finish_reason")
        return told(reason["type"] if isinstance(reason, dict) else reason, str)

    def text(self, event):
        """See `Server`."""
        meta = event.get("meta_info", {})
        reason = meta.get("finish_reason")
        stop = reason.get("matched") if isinstance(reason, dict) else None
        return told(event.get("text"), str) or "", told(meta.get("completion_tokens"), int), told(stop, int)


class LlamacppServer(Server):
    """llama.cpp: its native `/completion`, draft counts in `timings`.

    Source: `tools/server/README.md` of ggml-org/llama.cpp.
    """

    engine = "llama.cpp"

    def request(self, token_ids, max_new_tokens, temperature, seed):
        """See `Server`."""
        body = {
            "prompt": list(token_ids),
            "n_predict": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        return "/completion", body

    def read(self, event, token_ids):
        """See `Server`."""
        token_ids += tokens_of(event.get("tokens"))
        timings = event.get("timings") or {}
        if not isinstance(timings, dict):
            raise ValueError(f"timings is {timings!r}, expected an object")
        if not event.get("stop") or "draft_n" not in timings:
            return None
        for name in ("predicted_n", "draft_n", "draft_n_accepted"):
            number_of(timings[name])
        emitted = timings["predicted_n"] - 1  # the first token is the prompt's
        verifications = max(1, emitted - timings["draft_n_accepted"])  # each emits what it accepts and one more
        if event.get("stop_type") == "eos" and timings["draft_n"] % verifications:
            # But not one whose draft ends the text. Drafts are equally long, so the number of tokens in them tells.
            verifications += timings["draft_n"] % (verifications + 1) == 0
        return Counts(verifications, max(0, emitted - verifications))

    def end(self, event):
        """See `Server`."""
        if event.get("truncated"):
            raise ValueError("the server cut the prompt: give it a longer context")
        return (told(event.get("stop_type"), str) or "done") if event.get("stop") else None

    def text(self, event):
        """See `Server`."""
        return told(event.get("content"), str) or "", told(event.get("tokens_predicted"), int), None


def connect(url: str, vocab_size: int | None = None) -> Server:
    """Find out what runs at an address.

    Args:
        url: `http://host:port`; a user and a password in it are sent, and are not shown.
        vocab_size: see `Server`.

    Raises:
        ValueError: no address, nothing answers there, or none of the servers that are known.
    """
    address = Address(url)
    probes = (("/props", LlamacppServer), ("/get_server_info", SglangServer), ("/server_info", SglangServer))
    for path, kind in (*probes, ("/version", VllmServer)):
        try:
            answer = json.loads(address.get(path))
        except Refused:
            continue  # a server, but not this one
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(answer, dict) and (kind is not VllmServer or "version" in answer):
            server = kind(url, vocab_size)
            server.model = server.model or next(
                (v for k in MODEL_KEYS if isinstance(v := answer.get(k), str) and v), None
            )
            return server
    raise ValueError(f"{address.url} is neither vLLM nor SGLang nor llama.cpp's server; give the address before /v1")
