"""Ask a running server one prompt, and refuse what is no answer to it.

vLLM, SGLang and llama.cpp are asked in their own terms; what each of them replies becomes a `Reply`, and one or many
of these an `Answer`: token ids, times, why it ended, and the verifications that the server reports. Ollama, LM Studio
and other servers of OpenAI's API give text alone, which measures speed.
"""

import contextlib
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pydantic
from pydantic import BaseModel, NonNegativeInt
from transformers import PreTrainedTokenizerBase

from dpace.config import MAX_TOKENS, STRICT
from dpace.servers.transport import Address, Refused, Unavailable

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a reply raises that is not what the engine sends."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Counts:
    """Verifications that a server reports."""

    num_verifications: NonNegativeInt
    num_accepted: NonNegativeInt
    """Draft tokens."""
    num_drafted: NonNegativeInt = 0
    """Draft tokens, accepted or not; 0 where the server does not say."""

    def __sub__(self, before: "Counts") -> "Counts":
        """What came after an earlier reading of the same counters."""
        return Counts(
            self.num_verifications - before.num_verifications,
            self.num_accepted - before.num_accepted,
            self.num_drafted - before.num_drafted,
        )


class Reply(BaseModel):
    """What one event of a server says, or its answer in one piece; None is what it does not say."""

    model_config = STRICT

    tokens: list[int] | None = None
    is_all: bool = False
    """Whether `tokens` are all so far, and not those after the last event."""
    text: str = ""
    """What is written since the last event, where the server gives no tokens."""
    end: str | None = None
    """Why the answer ends with this event: `stop` or `eos` for a stop token; None where it goes on."""
    num_tokens: NonNegativeInt | None = None
    """Tokens that the server has written."""
    stop_token: int | None = None
    """Token that ended the text."""
    counts: Counts | None = None


@dataclass(frozen=True)
class Answer:
    """One response of a server."""

    token_ids: list[int]
    decode_seconds: float
    """From its first token to its last one."""
    counts: Counts | None
    """Where the response itself has them."""
    is_stopped: bool
    """Whether a stop token ended the text, and not its length."""
    last: Reply
    """The last event: it tells the number of tokens, and the stop token where one is named."""


class Server:
    """A running server; it always gets token ids, so that every engine sees the same prompt.

    Args:
        address: where it is.
        vocab_size: tokens of the target's tokenizer; an answer has no others.
    """

    engine: str
    model: object = None
    """What the server calls its model, where it says so; it may be anything."""
    version: object = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """The target's, for servers that know no token ids."""

    def __init__(self, address: Address, vocab_size: int):
        self.address = address
        self.url = address.url
        self.vocab_size = vocab_size

    def find_model(self, page: dict) -> object:
        """Return what the server calls its model; `page` is what it says of itself."""
        return next((page[key] for key in MODEL_KEYS if page.get(key)), None)

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """Return path and body of a request for plain sampling at a temperature, without any filter."""
        raise NotImplementedError

    def read(self, event: dict) -> Reply:
        """Take an event apart.

        Raises:
            ValueError: what is none of this engine's; or another one of `UNREADABLE`.
        """
        raise NotImplementedError

    def measured(self) -> dict:
        """Return what a measured request adds to the body; by default nothing.

        A salt that no other request has lets the server find nothing of the prompt in its cache.
        """
        return {}

    def counters(self) -> Counts | None:
        """Return all verifications since the server began, for servers whose responses tell nothing."""
        return None

    def answer(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        *,
        stream: bool = True,
    ) -> Answer:
        """Send one prompt and read its response to the end.

        Args:
            token_ids: of the prompt.
            max_new_tokens: of the response.
            temperature: 0 for greedy text.
            seed: of the draws.
            stream: measure the request: its tokens come one by one, and nothing of the prompt comes from a cache. In
                one piece they are less work for both sides, and a stop token that is not given is an answer too.

        Raises:
            Refused: the server refuses the request.
            Unavailable: it does not answer, or breaks off.
            ValueError: it sends no token, more than asked or one outside the vocabulary.
        """
        path, body = self.request(token_ids, max_new_tokens, temperature, seed)
        body["stream"] = stream
        if stream:
            body |= self.measured()
        with contextlib.closing(self.address.events(path, body, max_new_tokens)) as events:
            answer = self._collect(events, max_new_tokens)
        if not answer.token_ids and (stream or not answer.last.num_tokens):
            raise ValueError(f"{self.url} sent no token for a prompt of {len(token_ids)} tokens; see the server's log")
        for token in answer.token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{self.url} sent the token {self.address.short(token)}, expected one in 0 .. "
                    f"{self.vocab_size - 1}; it serves another model than --target"
                )
        return answer

    def _collect(self, events: Iterable[dict], max_new_tokens: int) -> Answer:
        """Put an answer together from its events."""
        tokens: list[int] = []
        text = ""
        first = last = 0.0
        counts = end = None
        reply = Reply()
        for event in events:
            try:
                reply = self.read(event)
            except UNREADABLE as error:
                raise ValueError(
                    f"{self.url} sent {self.address.short(json.dumps(event))}, which {self.engine} does not send "
                    f"({self.address.short(error)}); see the server's log, and which version runs"
                ) from error
            if reply.is_all:
                tokens.clear()
            tokens += reply.tokens or ()
            num_tokens = len(tokens) or reply.num_tokens or 0
            if num_tokens > max_new_tokens:
                raise ValueError(
                    f"{self.url} sent {num_tokens} tokens, expected at most {max_new_tokens}, as it was asked for; see "
                    "which version runs"
                )
            last = time.perf_counter()
            text += reply.text
            if (tokens or text) and not first:  # events before the first token are of the prompt
                first = last
            counts = reply.counts or counts
            end = reply.end or end
        if end in (None, "abort", "error"):
            raise Unavailable(
                f"{self.url} broke off after {len(tokens)} tokens ({end or 'it gave no reason'}); is the server still "
                "running?"
            )
        if text and self.tokenizer:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return Answer(tokens, last - first, counts, end in ("stop", "eos"), reply)


MODEL_KEYS = ("model_alias", "served_model_name", "model_path")
"""Where llama.cpp and SGLang say which model they serve."""


class VllmServer(Server):
    """vLLM: `/v1/completions`, counters in `/metrics`.

    Source: its metrics `vllm:spec_decode_*`, https://docs.vllm.ai/en/latest/design/metrics.html.
    """

    engine = "vllm"

    def find_model(self, page: dict) -> object:
        """See `Server`."""
        return json.loads(self.address.get("/v1/models"))["data"][0]["id"]

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
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
            "return_token_ids": True,
        }
        return "/v1/completions", body

    def read(self, event: dict) -> Reply:
        """See `Server`."""
        choice = (event.get("choices") or [{}])[0]
        usage = event.get("usage") or {}
        return Reply(
            tokens=choice.get("token_ids"),
            end=choice.get("finish_reason"),
            num_tokens=usage.get("completion_tokens"),
            stop_token=choice.get("stop_reason"),  # None for the end of the sequence
        )

    def measured(self) -> dict:
        """See `Server`."""
        return {"cache_salt": uuid.uuid4().hex, "stream_options": {"include_usage": True}}

    def counters(self) -> Counts | None:
        """See `Server`."""
        try:
            page = self.address.get("/metrics")
        except Refused:  # by a proxy
            return None
        totals: Counter[str] = Counter()
        line = r"^vllm:spec_decode_num_(drafts|draft_tokens|accepted_tokens)_total(?:\{.*\})? ([0-9.e+]+)$"
        for name, value in re.findall(line, page, re.MULTILINE):
            totals[name] += round(float(value))
        if "drafts" not in totals:
            return None
        return Counts(totals["drafts"], totals["accepted_tokens"], totals["draft_tokens"])


class SglangServer(Server):
    """SGLang: its native `/generate`, counts in `meta_info`.

    Source: `spec_verify_ct` of sgl-project/sglang.
    """

    engine = "sglang"

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """See `Server`."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampling_seed": seed,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
        }
        return "/generate", {"input_ids": list(token_ids), "sampling_params": sampling}

    def read(self, event: dict) -> Reply:
        """See `Server`."""
        meta = event.get("meta_info") or {}
        tokens = event.get("output_ids") or []
        reason = meta.get("finish_reason") or {}
        counts = None
        if verified := meta.get("spec_verify_ct"):
            accepted = max(0, meta["completion_tokens"] - 1 - verified)  # each emits one token more, after the prompt's
            counts = Counts(verified, accepted)
        return Reply(
            tokens=tokens,
            is_all=len(tokens) == meta.get("completion_tokens"),  # unless it was told to send the rest only
            end=reason.get("type"),
            num_tokens=meta.get("completion_tokens"),
            stop_token=reason.get("matched"),
            counts=counts,
        )

    def measured(self) -> dict:
        """See `Server`."""
        return {"extra_key": uuid.uuid4().hex}


class LlamacppServer(Server):
    """llama.cpp: its native `/completion`, draft counts in `timings`.

    Source: `tools/server/README.md` of ggml-org/llama.cpp.
    """

    engine = "llama.cpp"

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
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
        }
        return "/completion", body

    def read(self, event: dict) -> Reply:
        """See `Server`."""
        if event.get("truncated"):
            raise ValueError("the server cut the prompt: give it a longer context")
        counts = None
        end = None
        if event.get("stop"):
            end = event.get("stop_type") or "done"
            timings = event.get("timings") or {}
            if "draft_n" in timings:
                counts = _count_drafts(**timings, is_eos=end == "eos")
        return Reply(tokens=event.get("tokens"), end=end, num_tokens=event.get("tokens_predicted"), counts=counts)


def _count_drafts(predicted_n: int, draft_n: int, draft_n_accepted: int, *, is_eos: bool, **_: object) -> Counts:
    """Compute the verifications from llama.cpp's timings: each emits what it accepts and one more token."""
    emitted = predicted_n - 1  # the first token is the prompt's
    verifications = max(1, emitted - draft_n_accepted)
    if is_eos and draft_n % verifications:
        # But not one whose draft ends the text. Drafts are equally long, so the number of tokens in them tells.
        verifications += draft_n % (verifications + 1) == 0
    return Counts(verifications, max(0, emitted - verifications), draft_n)


class TextServer(Server):
    """LM Studio and other servers of OpenAI's API that give no token ids: `/v1/completions`.

    The target's tokenizer makes text of a prompt and tokens of an answer; how many tokens are drafted is not told.
    """

    engine = "text"

    def find_model(self, page: dict) -> object:
        """See `Server`.

        Raises:
            Unavailable: it has none, or several.
        """
        models = [model.get("id") or model["name"] for model in page.get("data") or page["models"]]
        if len(models) != 1:
            raise Unavailable(
                f"{self.url} serves {len(models)} models, expected 1: load it, and in LM Studio turn just-in-time "
                "loading off"
            )
        return models[0]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt without what a tokenizer, so the server too, puts before every text."""
        assert self.tokenizer
        begin, text = (str(self.tokenizer.decode(ids)) for ids in (self.tokenizer.encode(""), [*token_ids]))
        return text.removeprefix(begin)

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """See `Server`."""
        body = {"model": self.model, "prompt": self.text_of(token_ids), "max_tokens": max_new_tokens}
        return "/v1/completions", body | {"temperature": temperature, "seed": seed, "top_p": 1.0}

    def read(self, event: dict) -> Reply:
        """See `Server`."""
        choice = (event.get("choices") or [{}])[0]
        return Reply(text=choice.get("text") or "", end=choice.get("finish_reason"))


class OllamaServer(TextServer):
    """Ollama: its native `/api/generate`, since its other pages put a template around the prompt.

    Source: `docs/api.md` of ollama/ollama.
    """

    engine = "ollama"

    def find_model(self, page: dict) -> object:
        """See `Server`."""
        return super().find_model(json.loads(self.address.get("/api/ps")))

    def request(self, token_ids: Sequence[int], max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict]:
        """See `Server`."""
        options = {"num_predict": max_new_tokens, "temperature": temperature, "seed": seed, "top_k": 0, "top_p": 1.0}
        options |= {"min_p": 0.0, "repeat_penalty": 1.0}
        return "/api/generate", {
            "model": self.model,
            "prompt": self.text_of(token_ids),
            "raw": True,
            "options": options,
        }

    def read(self, event: dict) -> Reply:
        """See `Server`."""
        return Reply(text=event["response"], end=event.get("done_reason"))


PROBES = (
    ("/props", LlamacppServer, ""),
    ("/get_server_info", SglangServer, ""),
    ("/server_info", SglangServer, "model_path"),  # vLLM may have this page too
    ("/version", VllmServer, "version"),
)
"""Pages that only one kind of server has, with a key of each where others have such a page."""
TEXT_PROBES = (("/api/version", OllamaServer, "version"), ("/v1/models", TextServer, "data"))
"""The same for servers that know no token ids."""


def connect(url: str, vocab_size: int = MAX_TOKENS, tokenizer: PreTrainedTokenizerBase | None = None) -> Server:
    """Find out what runs at an address.

    Args:
        url: `http://host:port`.
        vocab_size: see `Server`.
        tokenizer: the target's, where text without token ids is enough.

    Raises:
        ValueError: no address, nothing answers there, it wants a key, or none of the servers that are known.
    """
    address = Address(url)
    for path, kind, key in PROBES + (TEXT_PROBES if tokenizer else ()):
        server = kind(address, vocab_size)
        server.tokenizer = tokenizer
        try:
            page = json.loads(address.get(path))
            if isinstance(page, dict) and (not key or key in page):
                server.model = server.find_model(page)
                server.version = page.get("version") or page.get("build_info")
                return server
        except Unavailable:
            raise
        except UNREADABLE as error:  # a server, but not this one
            if isinstance(error, Refused) and error.status == 401:
                raise
    raise ValueError(f"{address.url} is neither vLLM nor SGLang nor llama.cpp's server; give the address before /v1")
