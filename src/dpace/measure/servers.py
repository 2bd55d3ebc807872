"""Measure running servers, one with a drafter and one without, and write servers.json.

In come their addresses and prompts. All get the same token ids, one prompt at a time; the server without a drafter gets
them twice, and its second pass is the control for equal texts. Out come rows with the tau that the server reports,
beside that of this process and of training, with speeds and with the number of equal texts.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from dpace.config import BenchConfig
from dpace.measure.records import (
    PLAIN,
    Records,
    ServedAnswer,
    ServedRecord,
    ServerAddress,
    ServerSetup,
    ask_in_turn,
    group_by,
    setup_of,
    tokens_per_second,
)
from dpace.measure.results import (
    BenchResults,
    Estimate,
    Row,
    ServerResults,
    ServerRow,
    defined,
    nullable,
    read_log,
    read_results,
    write_results,
)
from dpace.metrics import estimate
from dpace.prompts.prompts import Prompt, first_of_each_set
from dpace.respond.conversation import refuse_long_prompts
from dpace.servers.apis import Counts, Server, connect
from dpace.system.ledger import register_files
from dpace.system.progress import track
from dpace.system.provenance import same_run
from dpace.target.chat import ChatTokenizer, encode_chat

DRAFTER = "drafter"
"""Name of the side with the drafter; the one without is `PLAIN`."""
CONTROL = "plain again"
"""Name of the second pass of the server without a drafter."""
SERVERS_FILE = "servers.json"
"""What the rows are written to."""


def bench_servers(
    chat: ChatTokenizer, prompts: Sequence[Prompt], config: BenchConfig, folder: str | Path
) -> ServerResults:
    """Send every prompt to a server with a drafter and twice to one without, and write `servers.json`.

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
        ValueError: a server that does not answer, refuses a request, or is of no known kind; or an over-long prompt.
    """
    folder = Path(folder)
    urls = {PLAIN: config.plain_server, DRAFTER: config.server}
    sides = {side: connect(url, len(chat.tokenizer)) for side, url in urls.items() if url}
    addresses = {
        side: ServerAddress(url=s.url, engine=s.engine, model=s.model, version=s.version) for side, s in sides.items()
    }
    known = setup_of(chat, config)
    setup = ServerSetup(**known, servers=addresses)
    register_files(folder, SERVERS_FILE)
    records = Records(folder / "servers.jsonl", ServedRecord, setup, prompts)
    prompts = first_of_each_set(prompts, config.num_prompts)
    refuse_long_prompts(chat, prompts, config.max_new_tokens)
    here = {}
    try:
        here = rows_here(folder / "results.json", known)
    except (OSError, ValueError) as error:
        print(f"tau here is not known: {error}", file=sys.stderr)
    drafter = folder / "drafter"
    log = read_log(drafter) if (drafter / "trainer_state.json").exists() else []
    tau_in_training = max((entry["eval_tau"] for entry in log if "eval_tau" in entry), default=None)
    jobs = list(product(config.temperatures, prompts))
    missing = [(temperature, prompt) for temperature, prompt in jobs if (temperature, prompt.id) not in records.rows]
    if missing:  # a warm-up, which is not counted
        first_turn = encode_chat(chat, missing[0][1].turns[0])
        for server in sides.values():
            server.answer(first_turn, 16, missing[0][0], config.seed)
    else:
        print(f"nothing is asked: {records.path} has all answers; remove it to measure again", file=sys.stderr)
    ways = {side: partial(_ask_server, server) for side, server in sides.items()}
    if PLAIN in ways:
        ways[CONTROL] = ways[PLAIN]
    for number, (temperature, prompt) in enumerate(track(missing, "asking servers", done=len(jobs) - len(missing))):
        turns = ask_in_turn(
            chat,
            prompt,
            ways,
            rotation=number,
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            seed=records.seeds[prompt.id],
        )
        answers = [of_turn for _, of_turn in turns]
        records.add(ServedRecord(set=prompt.set, id=prompt.id, temperature=temperature, turns=answers))
    rows = make_rows([records.rows[temperature, prompt.id] for temperature, prompt in jobs], here)
    results = ServerResults(**vars(setup), tau_in_training=tau_in_training, rows=rows)
    write_results(folder / SERVERS_FILE, results)
    return results


def rows_here(path: Path, known: Mapping[str, Any]) -> dict[tuple[float, str], Row]:
    """Read what this process measured with whole drafts, verified by equality: rows by temperature and set.

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
    return {(row.temperature, row.set): row for row in rows}


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


def make_rows(records: Sequence[ServedRecord], here: Mapping[tuple[float, str], Row]) -> list[ServerRow]:
    """Pool prompts into one row for each temperature and set, beside the rows of this process."""
    groups = group_by(records, attrgetter("temperature", "set"))
    drafts = any(answer.counts for answer in _answers(records, DRAFTER))
    return [_pool_prompts(groups[key], here.get(key), drafts=drafts) for key in sorted(groups)]


def _pool_prompts(records: Sequence[ServedRecord], here: Row | None, *, drafts: bool) -> ServerRow:
    """Pool the prompts of one row; intervals resample them.

    `tau` is tokens emitted a verification, from the accepted counts that the server reports. Where it reports some, an
    answer without any had no drafts: each pass of the target then emitted one token.
    """
    counts = {record.id: _verifications(record) for record in records} if drafts else {}
    total = Counts.pooled([*counts.values()]) if drafts else None
    served = {name: [found.num_emitted, found.num_verifications] for name, found in counts.items()}
    ours = {}
    if here:
        names = dict.fromkeys(response.id for response in here.responses)
        totals = np.stack([here.acceptance.emitted_tokens, here.acceptance.rows.sum(-1)], 1)
        ours = dict(zip(names, totals.tolist(), strict=True))
    common = [name for name in served if name in ours]
    paired = [[[side[name] for name in common]] for side in (served, ours)]
    tau = nullable(estimate([[list(served.values())]]))
    drafted, plain = (_answers(records, side) for side in (DRAFTER, PLAIN))
    num_same, num_control, gain = _same_texts(records) if plain else (None, None, (None, None, None))
    return ServerRow(
        set=records[0].set,
        temperature=records[0].temperature,
        num_responses=len(drafted),
        tau=tau[0],
        tau_interval=tau[1:],
        num_verifications=total and total.num_verifications,
        histogram=total and total.histogram,
        tau_here=nullable(estimate(paired[1:])),
        tau_over_here=nullable(estimate(paired, lambda taus: taus[0] / taus[1] - 1)),
        tokens_per_second=defined(tokens_per_second(drafted)),
        plain_tokens_per_second=defined(tokens_per_second(plain)),
        num_same_text=num_same,
        control_same_text=num_control,
        same_text_gain=gain,
    )


def _answers(records: Iterable[ServedRecord], side: str) -> list[ServedAnswer]:
    """Return what one side answered, turn by turn; nothing where there is no such side."""
    return [turn[side] for record in records for turn in record.turns if side in turn]


def _verifications(record: ServedRecord) -> Counts:
    """Return the verifications of all turns; without drafts, they are the tokens after the first."""
    answers = _answers([record], DRAFTER)
    return Counts.pooled([one.counts or Counts(one.decode_tokens, 0, [one.decode_tokens]) for one in answers])


def _same_texts(records: Iterable[ServedRecord]) -> tuple[int, int, Estimate]:
    """Count the turns with the text of the plain server's first pass.

    Returns:
        The numbers of the server with the drafter and of the plain server's second pass, the control; and the
        difference of their shares.
    """
    shares = []
    for side in (DRAFTER, CONTROL):
        turns_of = [[turn[side].token_ids == turn[PLAIN].token_ids for turn in record.turns] for record in records]
        shares.append([(sum(is_same), len(is_same)) for is_same in turns_of])
    num_same, num_control = (sum(same for same, _ in side) for side in shares)
    return num_same, num_control, nullable(estimate([[share] for share in shares], lambda each: each[0] - each[1]))
