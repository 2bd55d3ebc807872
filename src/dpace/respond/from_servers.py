"""Let running servers of the target answer prompts: several servers, many requests at each.

Prompts come in; responses go out, in the order in which they come. All workers take from one queue of prompts. A
prompt whose answer is not known to be what the target would have kept is left out.
"""

import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import tenacity

from dpace.config import RespondConfig
from dpace.prompts.prompts import Prompt
from dpace.respond.conversation import Conversation
from dpace.respond.responses import Response
from dpace.servers.apis import Answer, Server, connect
from dpace.servers.transport import Refused, Unavailable
from dpace.system.progress import note
from dpace.target import Target, answer_end
from dpace.target.chat import ChatTokenizer

FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
"""Seconds until a request that failed is sent again: doubled with each failure, and less by chance."""
OF_PROMPT = (400, 413, 422)
"""HTTP statuses that refuse one prompt; others refuse all of them."""


class LeftOut(ValueError):
    """A prompt gets no answer, for a reason that is the same for all prompts of a kind.

    Args:
        reason: such as that an answer's tokens are not known, or that it does not end where the target's would.
        detail: more of it, for this prompt.
    """

    def __init__(self, reason: str, detail: object = None):
        super().__init__(str(detail or reason))
        self.reason = reason


def tokens_of_answer(answer: Answer, stops: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the tokens of an answer, with the stop token that ended it.

    Args:
        answer: some servers give it without the stop token that ended it.
        stops: the target's stop tokens.
        max_new_tokens: that were asked for.

    Raises:
        LeftOut: tokens that are not known; a stop token that is not the target's; or an answer that the server cut.
    """
    tokens = answer.token_ids
    if end := answer_end(tokens, stops):
        return tokens[:end]
    num_told = answer.last.num_tokens
    # A server may count the stop token, and not give it.
    if num_told not in (None, len(tokens), len(tokens) + answer.is_stopped):
        raise LeftOut("given without its tokens")
    if not answer.is_stopped:
        if len(tokens) < max_new_tokens:
            raise LeftOut("cut by the server, whose context is too short")
        return tokens
    # The stop token is missing: the server names it, or the target has only one.
    candidates = stops
    if answer.last.stop_token is not None:
        candidates = [answer.last.stop_token]
    # A server that counts no more tokens than it gives was stopped by something else.
    if len(candidates) != 1 or candidates[0] not in stops or num_told == len(tokens):
        raise LeftOut("ended by a token that is not known to be a stop token of the target")
    return [*tokens, candidates[0]]


class ServerAnswers:
    """Running servers, each asked no more than `batch_size` prompts at any time.

    A request that a server cannot answer now is sent again, later with each failure, once or for `retry_seconds`. Then
    the prompt is left out where the server still answers a prompt of one token. A server that does not is given up, and
    others take its prompts; with the last one the call ends.

    Args:
        target: its tokenizer and its chat template make the prompts; the servers get and give token ids.
        config: addresses, requests at once, length, temperature, seed.

    Raises:
        ValueError: an address that is none, a server that does not answer or is of no known kind.
    """

    def __init__(self, target: Target | ChatTokenizer, config: RespondConfig):
        self.target = target
        self.config = config
        self.servers = [connect(url, len(target.tokenizer)) for url in config.server]
        self.left_out: Counter[str] = Counter()
        """Prompts without an answer, by the reason."""
        self._given_up: set[Server] = set()
        self._waiting: queue.SimpleQueue[Prompt | None] = queue.SimpleQueue()
        """Prompts without an answer; None ends the threads of all servers."""
        self._results: queue.SimpleQueue[tuple[Prompt, Response | Exception]] = queue.SimpleQueue()
        """What became of prompts: an answer, `LeftOut`, or what ends the call."""

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[list[Response]]:
        """Yield the answers as they come, until every prompt has its end.

        Raises:
            ValueError: the last server was given up, a server refuses every request, or sends what is no answer.
        """
        for prompt in prompts:
            self._waiting.put(prompt)
        num_workers = min(self.config.batch_size, len(prompts))
        for server in self.servers:
            for _ in range(num_workers):
                threading.Thread(target=self._work, args=[server], daemon=True).start()  # ends with the process
        try:
            for _ in prompts:
                prompt, result = self._results.get()
                if isinstance(result, Response):
                    yield [result]
                    continue
                if not isinstance(result, LeftOut):
                    raise result
                self.left_out[result.reason] += 1
                if self.left_out[result.reason] == 1:  # of each reason the first one is printed at once
                    note(f"prompt {prompt.id} is left out: {result}")
        finally:
            # Workers end, also where the caller stops early: they see that their server is given up.
            self._given_up.update(self.servers)
            self._waiting.put(None)

    def _work(self, server: Server) -> None:
        """Answer prompts until none is left or the server is given up; a thread's work."""
        while (prompt := self._waiting.get()) and server not in self._given_up:
            try:
                result = self._ask(server, prompt)
            except Exception as error:
                result = self._judge(server, error)
                if result is None:
                    break
            self._results.put((prompt, result))
        # The prompt goes to another server's worker, or the None that ends all of them to the next one.
        self._waiting.put(prompt)

    def _ask(self, server: Server, prompt: Prompt) -> Response:
        """Answer all turns of a prompt."""
        config = self.config
        ask = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            # The time begins with a request, which may take longer before it fails for the first time.
            stop=tenacity.stop_after_delay(config.retry_seconds) & tenacity.stop_after_attempt(2),
            wait=tenacity.wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
            reraise=True,
        )
        stops = list(self.target.stop_token_ids)
        conversation = Conversation(self.target, prompt, config)
        while not conversation.is_answered:
            token_ids = conversation.ask()
            answer = ask(
                server.answer, token_ids, config.max_new_tokens, config.temperature, conversation.seed, stream=False
            )
            conversation.add(token_ids, tokens_of_answer(answer, stops, config.max_new_tokens))
        return conversation.response

    def _judge(self, server: Server, error: Exception) -> Exception | None:
        """Return what becomes of a prompt after an error: it is left out, or the call ends; None where others take it.

        A prompt of one token tells a prompt that fails from a server that does.
        """
        if isinstance(error, Refused) and error.status in OF_PROMPT:
            return LeftOut(f"refused by the server with status {error.status}", error)
        if not isinstance(error, Unavailable):
            return error
        try:
            server.answer([0], 1, 0.0, 0, stream=False)
        except ValueError:
            self._given_up.add(server)
            if len(self._given_up) < len(self.servers):
                return None
            return ValueError(
                f"{error}; it was asked again for {self.config.retry_seconds:g} seconds; finished answers are kept: "
                "run the same command to go on"
            )
        return LeftOut("the server fails for it, and not for others", error)
