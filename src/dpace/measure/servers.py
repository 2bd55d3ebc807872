"""Measure running servers, some with a drafter and one without, and write servers.json.

In come their addresses and prompts. All get the same token ids, one prompt at a time; the server without a drafter gets
them twice, and its second pass is the control for equal texts. Out come rows with the tau that the server reports,
beside that of this process and of training, with speeds and with the number of equal texts; or a row for each depth,
where several servers draft different numbers of tokens.
"""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain, product
from operator import attrgetter
from pathlib import Path
from urllib.parse import urlsplit

from dpace.config import BenchConfig
from dpace.measure.records import PLAIN, Job, Records, ask_in_turn, setup_of, speedup, tokens_per_second
from dpace.measure.results import (
    BenchResults,
    ServedAnswer,
    ServedRecord,
    ServerAddress,
    ServerResults,
    ServerRow,
    ServerSetup,
    defined,
    nullable,
    read_log,
    read_results,
    split_depth,
    write_results,
)
from dpace.metrics import estimate
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.conversation import refuse_long_prompts
from dpace.servers.apis import Counts, Server, connect
from dpace.system.device import find_device
from dpace.system.groups import group_by
from dpace.system.ledger import JsonObject, register_files
from dpace.system.progress import track
from dpace.system.provenance import find_hardware, hash_file, same_run
from dpace.target.chat import ChatTokenizer, encode_chat

DRAFTER = "drafter"
"""Name of the side with the drafter, unless depths name several; the one without is `PLAIN`."""
CONTROL = "plain again"
"""Name of the second pass of the server without a drafter."""
SERVERS_FILE = "servers.json"
"""What the rows are written to."""
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
"""Hosts of servers that run where they are asked."""
Totals = dict[tuple[float, str, str], list[int]]
"""Emitted tokens and verifications, by temperature and prompt."""


def bench_servers(
    chat: ChatTokenizer, prompts: Sequence[Prompt], config: BenchConfig, folder: str | Path
) -> ServerResults:
    """Send every prompt to each server with a drafter and twice to one without, and write `servers.json`.

    All sides get the same token ids, in turn. Prompt `i` draws with `seed + i` on each. Each finished prompt is kept in
    `servers-*.jsonl`, a file for each way to measure; an interrupted call goes on after it. What stands beside the
    served tau is read from `folder`: `results.json` of `dpace bench`, and the log of `drafter`.

    Args:
        chat: the target's tokenizer with what belongs to it.
        prompts: not trained on.
        config: addresses, temperatures, lengths, how many prompts of each set. Without a plain server, what needs a
            baseline is left out.
        folder: for these files.

    Returns:
        What `servers.json` holds.

    Raises:
        ValueError: a server that does not answer, refuses a request, drafts more than its depth, or is of no known
            kind; or an over-long prompt.
    """
    folder = Path(folder)
    drafting_sides = list(map(str, config.depths)) or [DRAFTER]
    servers: dict[str, Server] = {}
    # The plain server comes first: later turns of a prompt see its answers, on all sides.
    for side, url in zip([PLAIN, *drafting_sides], [config.plain_server, *config.server], strict=True):
        if url:
            servers[side] = connect(url, len(chat.tokenizer), chat.tokenizer)
    known = setup_of(chat, config)
    setup = ServerSetup(**known, servers={side: _address_of(server) for side, server in servers.items()})
    register_files(folder, SERVERS_FILE)
    records = Records(folder / "servers.jsonl", ServedRecord, setup, prompts)
    prompts = first_of_each_set(prompts, config.num_prompts)
    refuse_long_prompts(chat, prompts, config.max_new_tokens)
    here: Totals = {}
    if not config.depths:  # this process drafts whole blocks only
        try:
            here = totals_here(folder / "results.json", known)
        except (OSError, ValueError) as error:
            print(f"tau here is not known: {error}", file=sys.stderr)
    drafter = folder / "drafter"
    tau_in_training = _tau_in_training(drafter)
    jobs = list(product(config.temperatures, prompts))
    _ask_missing(chat, servers, records, jobs, config)
    weights = drafter / "model.safetensors"
    is_here = all(urlsplit(server.url).hostname in THIS_MACHINE for server in servers.values())
    results = ServerResults(
        **vars(setup),
        tau_in_training=tau_in_training,
        drafter_sha256=hash_file(weights) if config.depths and weights.exists() else None,
        hardware=find_hardware(find_device()) if is_here else None,
        rows=make_rows(records.of(jobs), here, drafting_sides),
    )
    write_results(folder / SERVERS_FILE, results)
    return results


def _ask_missing(
    chat: ChatTokenizer,
    servers: dict[str, Server],
    records: Records[ServedRecord],
    jobs: Sequence[Job],
    config: BenchConfig,
) -> None:
    """Ask the servers, by side, the prompts that have no record, and keep their answers."""
    missing = records.missing(jobs)
    if not missing:
        return
    # A warm-up, which is not counted; it also shows how many tokens a server drafts.
    temperature, prompt = missing[0][1]
    first_turn = encode_chat(chat, prompt.turns[0])
    for side, server in servers.items():
        answer = _ask_server(server, first_turn, max_new_tokens=16, temperature=temperature, seed=config.seed)
        if config.depths and side != PLAIN and answer.counts:
            _refuse_deeper_drafts(side, server, answer.counts)
    ways = {side: partial(_ask_server, server) for side, server in servers.items()}
    if PLAIN in ways:
        ways[CONTROL] = ways[PLAIN]
    for number, (temperature, prompt) in track(missing, "asking servers"):
        options = {"max_new_tokens": config.max_new_tokens, "temperature": temperature}
        turns = ask_in_turn(chat, prompt, ways, rotation=number, seed=records.seeds[prompt.id], **options)
        answers_by_turn = [answers for _, answers in turns]
        records.add(ServedRecord(set=prompt.set, id=prompt.id, temperature=temperature, turns=answers_by_turn))


def _tau_in_training(drafter: Path) -> float | None:
    """Read the best tau of the validation responses from a drafter's folder; None where it has no log."""
    if not (drafter / "trainer_state.json").exists():
        return None
    return max((entry["eval_tau"] for entry in read_log(drafter) if "eval_tau" in entry), default=None)


def _address_of(server: Server) -> ServerAddress:
    """Return where a server is, and what it says of itself, as short texts without the key."""
    shorten = server.address.short
    return ServerAddress(
        url=server.url,
        engine=server.engine,
        model=shorten(server.model) if server.model else None,
        version=shorten(server.version) if server.version else None,
    )


def _refuse_deeper_drafts(depth: str, server: Server, counts: Counts) -> None:
    """Refuse a server that drafts more tokens than its depth; its number of verifications may be wrong by one."""
    most, _, ngrams = split_depth(depth)
    if not ngrams and counts.num_drafted > most * (counts.num_verifications + 1):
        raise ValueError(
            f"{server.url} drafted {counts.num_drafted} tokens in {counts.num_verifications} verifications, expected "
            f"at most {most} in each, as --bench.depths says; name the depths in the order of --bench.server"
        )


def totals_here(path: Path, known: JsonObject) -> Totals:
    """Read what this process emitted with whole drafts, verified by equality.

    Args:
        path: of the results.json of `dpace bench`.
        known: how the servers are asked, see `setup_of`.

    Raises:
        ValueError: there is no such file, or its rows cannot stand beside those of the servers.
        OSError: a file that cannot be read.
    """
    results = read_results(path) if path.exists() else None
    if not isinstance(results, BenchResults):
        raise ValueError(f"{path} has no results of `dpace bench`; run the command without --bench.server too")
    same_run(vars(results), known, f"{path} was measured", "give both commands the same options")
    rows = [row for row in results.rows if row.width == "full" and row.verify_rule == "equality"]
    drafters = {row.drafter for row in rows}
    if len(drafters) != 1:
        raise ValueError(
            f"{path} has whole drafts of {len(drafters)} drafters, expected 1; measure the served one alone, with "
            "--bench.widths full"
        )
    totals: Totals = {}
    for row in rows:
        for name, turns in group_by(row.responses, attrgetter("id")).items():
            num_emitted = sum(turn.num_decode_tokens for turn in turns)
            num_verifications = sum(len(turn.accepted_lengths) for turn in turns)
            totals[row.temperature, row.set, name] = [num_emitted, num_verifications]
    return totals


def _ask_server(
    server: Server, token_ids: Sequence[int], *, max_new_tokens: int, temperature: float, seed: int
) -> ServedAnswer:
    """Send token ids to a server, and find the verifications of its answer."""
    before = server.counters()
    answer = server.answer(token_ids, max_new_tokens, temperature, seed)
    after = server.counters()
    counts = answer.counts
    if counts is None and before and after and after.num_verifications > before.num_verifications:
        counts = after - before
    return ServedAnswer(token_ids=answer.token_ids, decode_seconds=answer.decode_seconds, counts=counts)


def make_rows(records: Sequence[ServedRecord], here: Totals, sides: Sequence[str] = (DRAFTER,)) -> list[ServerRow]:
    """Pool prompts into one row for each temperature, set and side, beside what this process emitted."""
    groups = group_by(records, attrgetter("temperature", "set"))
    rows = []
    for key, side in product(sorted(groups), sides):
        # Whether it drafts at all shows in the answers to all sets.
        has_counts = any(answer.counts for answer in chain.from_iterable(_answers(records, side)))
        rows.append(_pool_prompts(groups[key], here, side, has_counts))
    return rows


def _pool_prompts(records: Sequence[ServedRecord], here: Totals, side: str, has_counts: bool) -> ServerRow:
    """Pool the prompts of one row; intervals resample them.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports. Where it reports some, an
    answer without any had no drafts: each pass of the target then emitted one token.
    """
    drafted_by_prompt = _answers(records, side)
    plain_by_prompt = _answers(records, PLAIN)
    drafted = list(chain.from_iterable(drafted_by_prompt))
    plain = list(chain.from_iterable(plain_by_prompt))
    served: Totals = {}
    num_verifications = None
    if has_counts:
        for record, answers in zip(records, drafted_by_prompt, strict=True):
            served[record.temperature, record.set, record.id] = _emitted(answers)
        num_verifications = sum(number for _, number in served.values())
    common = [key for key in served if key in here]
    # On the prompts that both have, with an axis of one seed.
    common_served = [[served[key] for key in common]]
    common_here = [[here[key] for key in common]]
    num_same = num_control = None
    if plain:
        num_same = _num_same_texts(records, side)
        num_control = _num_same_texts(records, CONTROL)
    return ServerRow(
        set=records[0].set,
        temperature=records[0].temperature,
        depth=None if side == DRAFTER else side,
        num_responses=len(drafted),
        tau=nullable(estimate([[list(served.values())]])),
        num_verifications=num_verifications,
        num_drafted=sum(answer.counts.num_drafted for answer in drafted if answer.counts) or None,
        tau_here=nullable(estimate([common_here])),
        tau_over_here=nullable(estimate([common_served, common_here], lambda taus: taus[0] / taus[1] - 1)),
        tokens_per_second=defined(tokens_per_second(drafted)),
        plain_tokens_per_second=defined(tokens_per_second(plain)),
        decode_speedup=speedup(drafted_by_prompt, plain_by_prompt),
        num_same_text=num_same,
        control_same_text=num_control,
    )


def _answers(records: Iterable[ServedRecord], side: str) -> list[list[ServedAnswer]]:
    """Return what one side answered to each prompt, turn by turn; no turns where there is no such side."""
    return [[turn[side] for turn in record.turns if side in turn] for record in records]


def _emitted(answers: Iterable[ServedAnswer]) -> list[int]:
    """Count emitted tokens and verifications of a prompt; without drafts, both are the tokens after the first."""
    num_accepted = 0
    num_verifications = 0
    for answer in answers:
        counts = answer.counts or Counts(answer.num_decode_tokens, 0)
        num_accepted += counts.num_accepted
        num_verifications += counts.num_verifications
    return [num_accepted + num_verifications, num_verifications]  # a verification emits one token of the target's own


def _num_same_texts(records: Iterable[ServedRecord], side: str) -> int:
    """Count the turns with the text of the plain server's first pass."""
    num_same = 0
    for record in records:
        num_same += sum(turn[side].token_ids == turn[PLAIN].token_ids for turn in record.turns)
    return num_same
