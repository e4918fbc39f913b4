"""Models of the ancestor, karpathy/nanochat, as models of ours.

    model_000650.pt  meta_000650.json       weights by name, and the sizes of the model
    tokenizer.pkl  token_bytes.pt           the vocabulary, and how many bytes each token stands for

The parts of the two models are the same under other names: `RENAMES` is the whole difference. What else a forward pass
needs (softcap, rotary base, scale of queries and keys, windows) the ancestor has in its code and not in its files, and
it changed over the months. `ERAS` tells the times apart by the weights that were there, and has the values of each time
that our model can compute exactly; for the others it says what differs, and nothing is loaded. Nothing is unpickled
either (`nanochat.pickles`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError, printable
from nanochat.config import ModelConfig
from nanochat.model.gpt import GPT
from nanochat.pickles import Call, StoredTensor, read_pickle, read_tensors
from nanochat.scaling import REFERENCE_BATCH_TOKENS, BaseRates
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

RENAMES = {
    "transformer.wte.weight": "wte.weight",
    "transformer.h.{i}.attn.c_q.weight": "blocks.{i}.mixer.c_q.weight",
    "transformer.h.{i}.attn.c_k.weight": "blocks.{i}.mixer.c_k.weight",
    "transformer.h.{i}.attn.c_v.weight": "blocks.{i}.mixer.c_v.weight",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.mixer.c_proj.weight",
    "transformer.h.{i}.attn.ve_gate.weight": "blocks.{i}.mixer.value_gate.weight",
    "transformer.h.{i}.mlp.c_fc.weight": "blocks.{i}.mlp.c_fc.weight",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.mlp.c_proj.weight",
    "value_embeds.{i}.weight": "blocks.{i}.mixer.value_embedding.weight",
    "resid_lambdas": "residual.resid",
    "x0_lambdas": "residual.x0",
    "backout_lambda": "residual.backout",
    "smear_gate.weight": "smear.gate.weight",
    "smear_lambda": "smear.scale",
    "lm_head.weight": "lm_head.weight",
}
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
MAX_SIZE = 2**20  # of any of them
COMPILED = "_orig_mod."  # what torch.compile puts before every name


@dataclass(frozen=True)
class Era:
    """A time whose models compute alike (pretraining spec 13; the dates of changes: 11.2).

    switches: fields of our configuration. unlike: what our model computes otherwise; then the era cannot be loaded.
    short_windows: whether its windows S are ours; where they are not, all must be L.
    """

    name: str
    switches: Mapping[str, Any]
    unlike: str = ""
    short_windows: bool = False


_FIRST = {"rope_base": 10_000.0, "qk_scale": 1.0, "softcap": 15.0}
_FIRST |= {"value_embeddings": False, "smear": False, "backout": False}
OCTOBER = Era("13 October 2025 to 10 January 2026", {**_FIRST, "residual": "plain"})
JANUARY = Era("11 to 16 January 2026", {**_FIRST, "residual": "lambdas"})
WINTER = Era(
    "17 January to 8 March 2026",
    {},
    "gates of the value embeddings that read 32 channels and go up to 2 (here 12 channels, up to 3), short windows of "
    "half the context (here a quarter), and a softcap of 15 or, from 2 March on, 20, which the files do not say",
)
AUTORESEARCH = Era(
    "9 to 13 March 2026",
    {},
    "short windows of a third of the context (here a quarter) and queries and keys scaled by 1.15 (here 1.2)",
)
HEAD = Era("14 March 2026 and later", {}, short_windows=True)  # as ModelConfig has it: spec 4
ERAS = (OCTOBER, JANUARY, WINTER, AUTORESEARCH, HEAD)


def era_of(shapes: Mapping[str, tuple[int, ...]]) -> Era:
    """When a model was made, by the weights it has and how wide the value-embedding gates are."""
    if not any(name.startswith("value_embeds.") for name in shapes):
        return JANUARY if "resid_lambdas" in shapes else OCTOBER
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith(".ve_gate.weight") and shape}
    if gates != {12}:
        return WINTER
    return HEAD if "smear_lambda" in shapes or "backout_lambda" in shapes else AUTORESEARCH


@dataclass(frozen=True)
class AncestorModel:
    """A model in the ancestor's files, checked; its weights are read by `tensors`."""

    step: int
    config: ModelConfig
    era: Era
    meta: dict[str, Any]
    stored: dict[str, StoredTensor]  # by our names

    def tensors(self) -> dict[str, Tensor]:
        """The weights by our names, in the types they were saved in; tables are padded with zeros to our rows."""
        tensors = {}
        for name, shape in parameter_shapes(self.config).items():
            tensor = self.stored[name].load().reshape(-1, *shape[1:])
            if not torch.isfinite(tensor).all():
                raise UserError(f"{self.stored[name].file}: {name} holds infinities or NaN; fetch it again")
            padding = tensor.new_zeros(shape[0] - tensor.size(0), *shape[1:])
            tensors[name] = torch.cat([tensor, padding]) if len(padding) else tensor
        return tensors

    def plan(self) -> dict[str, Any]:
        """What a stage that starts from this model inherits: batch and learning rates, where the meta has them."""
        flags = self.meta.get("user_config")
        given = {**flags, **self.meta} if isinstance(flags, dict) else self.meta
        names = {f"{name}_lr": name for name in ("embedding", "unembedding", "matrix", "scalar")}
        rates = {ours: rate for name, ours in names.items() if (rate := _positive(given.get(name)))}
        tokens = int(_positive(given.get("total_batch_size")) or REFERENCE_BATCH_TOKENS)
        return {"total_batch_tokens": tokens, "base_rates": vars(BaseRates(**rates)), "laws": "reference"}

    @property
    def val_bpb(self) -> float | None:
        return _positive(self.meta.get("val_bpb"))


def _positive(value: Any) -> float | None:
    """A number of the meta that can be one, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < 1e15 else None


def read_model(folder: Path, step: int | None = None) -> AncestorModel:
    """A model of the ancestor, its newest step if none is given.

    Raises UserError for missing or damaged files, weights that are not known, and eras that our model computes
    otherwise.
    """
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        asked = f"--step={step}: " if steps else ""
        there = f"there are {', '.join(map(str, sorted(steps)))}" if steps else "no model_NNNNNN.pt is there"
        raise UserError(f"{asked}{folder}: {there}; give the folder that has a model of the ancestor with --from")
    chosen = max(steps) if step is None else step
    file = steps[chosen]
    meta = _read_meta(file.with_name(f"meta_{file.stem.removeprefix('model_')}.json"))
    found = read_tensors(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds one tensor, not the weights of a model")
    weights = {name.removeprefix(COMPILED): tensor for name, tensor in found.items()}
    era = era_of({name: tensor.shape for name, tensor in weights.items()})
    config = _config(meta, era, file)
    return AncestorModel(chosen, config, era, meta, _renamed(weights, config, file))


def _steps(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise UserError(f"--from={folder}: no such folder")
    named = ((re.fullmatch(r"model_([0-9]{1,12})\.pt", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match}


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); it belongs beside the model, fetch it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({printable(str(error))[:100]}); fetch it again") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{path}: has no model_config, which says how large the model is")
    return meta


def _config(meta: Mapping[str, Any], era: Era, file: Path) -> ModelConfig:
    """Our configuration of a model. Raises UserError where ours would compute other numbers."""
    given = meta["model_config"]
    unknown = sorted(printable(str(name)) for name in given.keys() - {*SIZES, "window_pattern"})
    missing = [name for name in SIZES if name not in given]
    odd = [name for name in SIZES if name in given and not (type(given[name]) is int and given[name] <= MAX_SIZE)]
    told = (("unknown", unknown), ("missing", missing), ("not a size", odd))
    if reasons := [f"{why}: {', '.join(names)}" for why, names in told if names]:
        raise UserError(f"{file}: its model_config cannot be used; {'; '.join(reasons)}")
    pattern = str(given.get("window_pattern") or "L").upper()  # before 11 January all windows were full
    if given["n_layer"] > 1000:
        raise UserError(f"{file}: n_layer={given['n_layer']}: no model of the ancestor is that deep")
    if era.unlike:
        raise UserError(f"{file}: a model of {era.name}, which is not supported: it has {era.unlike}")
    try:
        config = ModelConfig(**{name: given[name] for name in SIZES}, window_pattern=pattern, **era.switches)
    except ValueError as error:
        raise UserError(f"{file}: its model_config cannot be used; {printable(str(error))[:300]}") from error
    if not era.short_windows and set(config.windows) != {config.sequence_len}:
        raise UserError(
            f"{file}: a model of {era.name} with window_pattern={pattern}: its short windows were half the context, "
            "ours are a quarter; only models whose windows are all full (L) of that time are supported"
        )
    return config


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of our model, by name."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}


def _renamed(weights: Mapping[str, StoredTensor], config: ModelConfig, file: Path) -> dict[str, StoredTensor]:
    """The weights by our names. Raises UserError naming all that are missing, unknown, or of another shape."""
    shapes = parameter_shapes(config)
    pairs = {
        theirs.format(i=layer): ours.format(i=layer)
        for theirs, ours in RENAMES.items()
        for layer in range(config.n_layer)
        if ours.format(i=layer) in shapes
    }
    wrong = [
        f"{name}: {list(weights[name].shape)} instead of {list(shapes[ours])}"
        for name, ours in pairs.items()
        if name in weights and not _fits(weights[name], shapes[ours], config)
    ]
    lists = (("missing", pairs.keys() - weights.keys()), ("unknown", weights.keys() - pairs.keys()), ("shape", wrong))
    told = [f"{why}: {', '.join(sorted(map(printable, names)))}" for why, names in lists if names]
    if told:
        raise UserError(f"{file}: not the weights of this model; {'; '.join(told)}")
    return {ours: weights[theirs] for theirs, ours in pairs.items()}


def _fits(tensor: StoredTensor, shape: tuple[int, ...], config: ModelConfig) -> bool:
    """Whether a tensor can become ours: tables have as many rows as the vocabulary, or those and padding."""
    if not tensor.dtype.is_floating_point:
        return False
    if len(shape) == 1:
        return tensor.shape in (shape, ()) and int(np.prod(tensor.shape)) == shape[0]
    has_rows = shape[0] == config.padded_vocab_size and tensor.shape[:1] == (config.vocab_size,)
    return tensor.shape == shape or (has_rows and tensor.shape[1:] == shape[1:])


# Tokenizer -------------------------------------------------------------------------------------------------------

MAX_TOKEN_BYTES = 1_000  # finding a token's halves takes the square of its length
ENCODING = "tiktoken.core.Encoding"


def read_tokenizer(folder: Path) -> Tokenizer:
    """The ancestor's tokenizer as ours: every id stands for the same bytes, and every text gets the same ids.

    Raises UserError where that cannot be.
    """
    path = folder / "tokenizer.pkl"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the folder that has it with --tokenizer"
        ) from error
    pickled = read_pickle(content, str(path), {ENCODING})
    state = pickled.state if isinstance(pickled, Call) and pickled.name == ENCODING else None
    match state:
        case {"pat_str": str(pattern), "mergeable_ranks": dict(ranks), "special_tokens": dict(specials)}:
            pass
        case _:
            raise UserError(f"{path}: holds no tiktoken Encoding with its table of merges")
    if pattern != SPLIT_PATTERN:
        raise UserError(
            f"{path}: splits text by another pattern than ours, so texts would get other ids: {pattern[:300]!r}"
        )
    if not all(isinstance(token, bytes) and type(rank) is int for token, rank in ranks.items()):
        raise UserError(f"{path}: its table of merges is damaged")
    if (longest := max(map(len, ranks), default=0)) > MAX_TOKEN_BYTES:
        raise UserError(f"{path}: has a token of {longest:,} bytes; {MAX_TOKEN_BYTES:,} are the most that is read")
    if specials != {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}:
        raise UserError(f"{path}: its special tokens are not {', '.join(SPECIAL_TOKENS)}, last and in this order")
    try:
        tokenizer = Tokenizer.from_ranks(ranks)
    except ValueError as error:
        raise UserError(f"{path}: not a vocabulary that we can use: {error}") from error
    _check_token_bytes(folder / "token_bytes.pt", tokenizer)
    return tokenizer


def _check_token_bytes(path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where the file of token lengths is there and belongs to another vocabulary.

    Until July 2026 a token that is no UTF-8 of its own counted as the replacement characters it is shown as.
    """
    if not path.exists():
        return
    stored = read_tensors(path)
    if not isinstance(stored, StoredTensor) or stored.shape != (tokenizer.vocab_size,):
        raise UserError(f"{path}: not the lengths of {tokenizer.vocab_size:,} tokens; it belongs to another tokenizer")
    lengths = stored.load().double().numpy()  # whatever type they are of, bfloat16 included
    shown = [len(tokenizer.bytes_of(i).decode(errors="replace").encode()) for i in range(tokenizer.vocab_size)]
    shown[tokenizer.bos :] = [0] * len(SPECIAL_TOKENS)
    if wrong := int(np.sum((lengths != tokenizer.token_bytes) & (lengths != np.array(shown)))):
        raise UserError(f"{path}: {wrong:,} lengths are not those of tokenizer.pkl; one of them belongs elsewhere")
