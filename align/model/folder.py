"""A Hugging Face folder of a causal language model: whether it is one, its config, its tokenizer, the names of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # no network, no code from folders


def attention_of(directory: Path) -> str | None:
    """Which attention transformers is to use; None leaves it the choice.

    Its default, torch's fused one, ignores the soft cap that Gemma 2 puts on attention scores, without a word.
    """
    return "eager" if getattr(text_config(directory), "attn_logit_softcapping", None) else None


def read_config(directory: Path) -> Any:
    """The config of a folder's model."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, **LOCAL)


def text_config(directory: Path) -> Any:
    """The config of a folder's language model, also where it is a part of a larger model."""
    return read_config(directory).get_text_config()


def empty_model(directory: Path) -> Any:
    """The model of a folder without its weights, hence without memory (torch's device "meta")."""
    return without_weights(read_config(directory))


def without_weights(config: Any) -> Any:
    """The model that a config describes, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, **LOCAL)


def checked_model_directory(directory: Path | str) -> Path:
    """The folder, if it holds a causal language model.

    Raises:
        ValueError: See `checked_config`.
    """
    checked_config(Path(directory))
    return Path(directory)


def checked_config(directory: Path) -> Any:
    """The config of a folder's model, if the folder holds a causal language model.

    Raises:
        ValueError: Naming what is missing and how to get it.
    """
    if not (directory / "config.json").is_file():
        state = "has no config.json" if directory.is_dir() else "does not exist"
        raise ValueError(f"model folder {directory} {state}; make one with `align models --help`, or correct the path")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = read_config(directory)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"model folder {directory}: config.json cannot be read: {error}") from error
    # The type alone would let in a BERT encoder or a classifier: their types have a causal architecture too.
    architecture = (config.architectures or [None])[0]
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if not causal or architecture not in (None, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        architecture = architecture or type(config).__name__
        raise ValueError(f"model folder {directory} holds {architecture}, which is not a causal language model")
    if not list(directory.glob("*.safetensors")):
        raise ValueError(f"model folder {directory} holds no *.safetensors weights; only safetensors are read")
    return config


def stored(model: Any, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter of a model as folders and vLLM know it.

    transformers holds the experts of a mixture in one tensor, others know each by itself. The parts are views or copies.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    held = {name: parameter}
    parts: dict[str, Tensor] = revert_weight_conversion(model, held) if isinstance(model, PreTrainedModel) else held
    return parts
