"""Read prompts and conversations from JSONL, JSON, parquet and datasets on the Hub."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpace.system.ledger import JsonObject, read_jsonl, read_object, refuse_endless
from dpace.system.progress import describe_error, one_line, quoted

KINDS = ("messages", "conversations", "turns", "instruction", "prompt")
"""Keys that a prompt may stand under; a table that has several is read by the first."""
WANTED = "`messages`, `conversations`, `turns`, `instruction` or `prompt`"
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool", "tool_response": "tool"}
"""Roles that others call differently."""
# The config is matched as late as possible: one word after the name is the split.
HUB_ID = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))??(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered."""

    id: str
    """Name of the prompt, unique within its file."""
    set: str
    """Name of the dataset that the prompt belongs to; results are reported by dataset."""
    turns: list[list[JsonObject]]
    """Messages of each turn; the target answers after each turn. The first message has the `tools`, if any."""
    answer: JsonObject | None = None
    """The reply to the last turn that the file has, if any: a message."""

    def own_messages(self) -> list[JsonObject]:
        """Return the messages with the reply.

        Raises:
            ValueError: there is no reply.
        """
        if self.answer is None:
            raise ValueError(
                f"prompt {self.id} has no reply at its end, which --respond.source own trains on; remove the prompt, "
                "or let the target answer with --respond.source target"
            )
        return [*self.turns[0], self.answer]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a file or the Hub.

    A row has `messages` or `conversations` (roles and contents, or `from` and `value`), `turns` (user texts or
    messages, such as a tool's result, answered one after the other), `instruction` (with `input`), or `prompt` (one
    user text). It may also have `id`, `set` and `tools`. A reply at the end of a conversation, or `output` of an
    instruction, becomes `Prompt.answer`.

    Args:
        path: of a JSONL, JSON or parquet file, or a dataset on the Hub: OWNER/NAME, OWNER/NAME:SPLIT or
            OWNER/NAME:CONFIG:SPLIT; the split is `train` by default.

    Raises:
        ValueError: file and row of what cannot be read, an empty prompt, an id that occurs twice, or an empty file.
    """
    hub = _parse_hub_id(path)
    default_set = Path(path).stem
    if hub:
        default_set = hub["path"].partition("/")[2]
    # Nobody can change the rows of a table, so they may have more keys than one kind, and ids that occur twice.
    is_table = hub is not None or Path(path).suffix in TABLES
    prompts: dict[str, Prompt] = {}
    place, rows = _read_rows(Path(path), hub)
    for number, row in rows:
        try:
            if is_table:
                row = _take_filled(row)
            prompt = parse_row(row, str(number), default_set)
            if prompt.id in prompts:
                if not is_table:
                    raise ValueError(f"the id {prompt.id!r} occurs twice, expected unique ids")
                prompt = replace(prompt, id=f"{prompt.id}#{number}")
        except ValueError as error:
            raise ValueError(f"{place}{number}: {error}; fix the line") from error
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one JSON object on each line with {WANTED}")
    return list(prompts.values())


def load_from_hub(path: str, config: str | None, split: str, way_out: str, file: str | None = None) -> Any:
    """Download the rows of a dataset from the Hub, or take them from its cache where the Hub does not answer.

    Raises:
        ValueError: the Hub does not give it.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # it answers: what is wrong is said below
    except Exception:  # the network's many ways to fail
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # so that no library asks for minutes
    import datasets

    try:
        return datasets.load_dataset(path, config, split=split, data_files=file)
    except Exception as error:  # the Hub's errors share no narrower class
        raise ValueError(
            f"the Hub does not give the dataset {path} ({describe_error(error)}); check the network, or {way_out}"
        ) from error


def _parse_hub_id(path: str | Path) -> dict[str, Any] | None:
    """Take a name apart that stands for a dataset on the Hub; None for a file."""
    match = HUB_ID.fullmatch(path) if isinstance(path, str) else None
    if match is None or Path(match["path"]).exists() or Path(match["path"]).suffix in (".jsonl", ".json", *TABLES):
        return None
    return match.groupdict()


def _read_rows(path: Path, hub: dict[str, Any] | None) -> tuple[str, Iterable[tuple[int, Any]]]:
    """Return how a message names a row, up to its number, and the rows with their numbers, from 1.

    The ending of a file tells what it is: a table, JSON, else JSONL.
    """
    name = str(path)
    if hub:
        split = hub["split"] or "train"
        name = f"{hub['path']} ({split})"
        rows = load_from_hub(hub["path"], hub["config"], split, "name a file of prompts")
    elif path.suffix in TABLES:
        rows = TABLES[path.suffix](path)
    elif path.suffix == ".json":
        rows = read_object(path, "write one list of prompts, or call a file of JSON lines .jsonl", list)
    else:
        return f"{path}:", read_jsonl(path)
    return f"{name}, row ", enumerate(rows, start=1)


def _parquet_rows(path: Path) -> Iterator[JsonObject]:
    """Yield the rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    refuse_endless(path, "a parquet file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(256):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"cannot read {path}: {one_line(error)}; name a parquet file, or write a JSONL file"
        ) from error


TABLES: dict[str, Callable[[Path], Iterable[JsonObject]]] = {".parquet": _parquet_rows}
"""What reads the rows of a table, by the ending of its file."""


def _take_filled(row: JsonObject) -> JsonObject:
    """Take what has a value in a row of a table, as JSON has it, and of several kinds of prompts the first."""
    # Dates become texts, and NaN, which JSON does not have, a missing value.
    filled = _without_null(json.loads(json.dumps(row, default=str), parse_constant=lambda _: None))
    kinds = [key for key in KINDS if key in filled]
    for key in kinds[1:]:
        del filled[key]
    return filled


def _without_null(value: object) -> Any:
    """Leave out keys without a value: in a table, a key that one message has stands in all."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


def parse_row(row: object, default_id: str, default_set: str) -> Prompt:
    """Turn a row into a prompt.

    Raises:
        ValueError: it has no prompt, or an empty one.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    kinds = [key for key in KINDS if key in row]
    if len(kinds) != 1:
        keys = " and ".join(f"`{key}`" for key in kinds) or ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"expected {WANTED}, found {keys}")
    turns, answer = _parse_turns(row, kinds[0])
    for turn in turns:
        if not turn or turn[-1]["role"] not in ("user", "tool") or not turn[-1]["content"].strip():
            raise ValueError("a turn ends without a text of the user or a tool, expected one that is not empty")
    # Some files have the tools in the row, others in a message; `Prompt` has them in its first message.
    tools = _parse_tools(row.get("tools"))
    for message in itertools.chain.from_iterable(turns):
        tools_of_message = message.pop("tools", None)
        tools = tools or _parse_tools(tools_of_message)
    if tools:
        turns[0][0]["tools"] = tools
    return Prompt(_check_name(row, "id", default_id), _check_name(row, "set", default_set), turns, answer)


def _parse_turns(row: JsonObject, kind: str) -> tuple[list[list[JsonObject]], JsonObject | None]:
    """Read the messages of each turn, and the reply to the last one if there is one."""
    if kind == "turns":
        return [[_parse_message(turn)] for turn in _check_list(row[kind], kind)], None
    answer = None
    if kind in ("messages", "conversations"):
        messages = []
        for entry in _check_list(row[kind], kind):
            if not isinstance(entry, dict):
                entry = {"content": entry}  # here a text alone may be anyone's, so it is refused
            messages.append(_parse_message(entry))
        if messages[-1]["role"] == "assistant":
            answer = messages.pop()
        return [messages], answer
    message = _parse_message(row[kind])
    if kind == "instruction":
        if extra := row.get("input"):
            message["content"] += f"\n\nInput:\n{extra}"
        if output := row.get("output"):
            answer = _parse_message(output) | {"role": "assistant"}
    return [[message]], answer


def _parse_message(message: Any) -> JsonObject:
    """Read a message: a role and a text in either spelling; it may have calls of tools, and other keys.

    A text alone is what the user says.
    """
    if not isinstance(message, dict):
        message = {"role": "user", "content": message}
    message = dict(message)
    if "from" in message and "value" in message:  # as ShareGPT's files have it
        message = {"role": message["from"], "content": message["value"]}
    if message.get("role") == "function_call":
        message = {"role": "assistant", "tool_calls": _as_list(_from_json(message.get("content"), "a `function_call`"))}
    if calls := _from_json(message.pop("tool_calls", None) or [], "`tool_calls`"):
        message["content"] = message.get("content") or ""  # a call comes without a text
        message["tool_calls"] = [_parse_call(call) for call in _check_list(calls, "tool_calls")]
    role = message.get("role")
    if not role or not isinstance(role, str) or not isinstance(message.get("content"), str):
        raise ValueError(f"a message is {quoted(message)}, expected texts in `role` and `content`")
    message["content"].encode()  # raises a ValueError where it has half a character
    return message | {"role": ROLES.get(role, role)}


def _parse_tools(tools: object) -> list[JsonObject]:
    """Read the tools of a prompt: a list of objects, or the same as JSON, whole or each."""
    parsed = []
    for entry in _as_list(_from_json(tools or [], "`tools`")):
        tool = _from_json(entry, "an entry of `tools`")
        if not isinstance(tool, dict):
            raise ValueError(f"an entry of `tools` is {quoted(tool)}, expected an object")
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        parsed.append(tool)
    return parsed


def _parse_call(call: Any) -> JsonObject:
    """Read a call of a tool, whose arguments chat templates take as an object."""
    call = _from_json(call, "an entry of `tool_calls`")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"an entry of `tool_calls` is {quoted(call)}, expected an object with the function's `name`")
    arguments = _from_json(function.get("arguments") or {}, f"`arguments` of {function['name']}")
    parsed = {"type": "function"}
    if "id" in call:
        parsed["id"] = call["id"]
    return parsed | {"function": {"name": function["name"], "arguments": arguments}}


def _as_list(value: Any) -> list:
    """Return a list, or a list of the one value."""
    return value if isinstance(value, list) else [value]


def _from_json(value: object, name: str) -> Any:
    """Return a value; one that is given as JSON is read first."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is {quoted(value)}, expected JSON ({error})") from error


def _check_list(value: object, name: str) -> list:
    """Return a value that has to be a list with an entry."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is {quoted(value)}, expected a list of one or more")
    return value


def _check_name(row: JsonObject, key: str, default: str) -> str:
    """Return an id or the name of a set: a text or a number."""
    value = row.get(key, default)
    if not isinstance(value, str | int | float) or value == "":
        raise ValueError(f"`{key}` is {quoted(value)}, expected a text or a number")
    str(value).encode()  # raises a ValueError where it has half a character
    return str(value)
