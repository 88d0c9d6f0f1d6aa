"""What releases of OpenVLA and OpenVLA-OFT have in common: a folder of JSON files, a tokenizer and safetensors.

Nothing in a folder is run. `auto_map` in `config.json` names remote code and is never followed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from tokenizers import Tokenizer

from tokenprune.engine.observations import MAX_SIDE
from tokenprune.errors import CheckpointError, nearest
from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.prismatic.config import TOWERS, PrismaticConfig
from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform
from tokenprune_adapters.backbones.prismatic.prompt import PromptTokenizer
from tokenprune_adapters.inputs.statistics import Statistics
from tokenprune_adapters.vision.transformer import DINOV2_L_REG4_224, SIGLIP_SO400M_224, ViTConfig
from tokenprune_adapters.weights.tensor_files import read_json

TIMM_TOWERS: Mapping[str, ViTConfig] = {
    "vit_large_patch14_reg4_dinov2.lvd142m": DINOV2_L_REG4_224,
    "vit_so400m_patch14_siglip_224": SIGLIP_SO400M_224,
}
"""Towers by timm's id; fused in this order, which is `dinosiglip-vit-so-224px`, or alone (upstream OpenVLA)."""

_MODEL_TYPE = "openvla"

# Beyond what any such model has, so that a wrong number is an error and not a model too large to be described.
_Size = Annotated[int, Field(ge=1, le=2**20)]
_Depth = Annotated[int, Field(ge=1, le=1024)]
_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


class _Fields(BaseModel):
    """JSON fields of exactly the type named; what is not named does not matter here."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class _Rope(_Fields):
    """Rotary embeddings; only unscaled ones are supported."""

    model_config = ConfigDict(extra="forbid")

    rope_type: Literal["default"] = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: PositiveFloat | None = None


class _TextConfig(_Fields):
    """The decoder's fields. The defaults are those of Llama-2-7B in transformers, on which the releases rely."""

    model_type: Literal["llama"] = "llama"
    hidden_size: _Size = 4096
    num_hidden_layers: _Depth = 32
    num_attention_heads: _Size = 32
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    intermediate_size: _Size = 11008
    vocab_size: _Size = 32064
    max_position_embeddings: _Size = 2048
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False


class _TowerArgs(_Fields):
    """timm's arguments for one tower that differ from those of its id."""

    model_config = ConfigDict(extra="forbid")

    embed_dim: _Size | None = None
    depth: Annotated[_Depth, Field(ge=2)] | None = None
    num_heads: _Size | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=1024)] | None = None
    patch_size: _Side | None = None
    reg_tokens: Annotated[int, Field(ge=0, le=1024)] | None = None
    img_size: _Side | None = None


class PrismaticFields(_Fields):
    """The fields of `config.json` that matter here; `parse_config` reads them."""

    timm_model_ids: list[str]
    image_sizes: list[_Side]
    use_fused_vision_backbone: bool
    timm_override_act_layers: list[None] | None = None
    timm_override_args: list[_TowerArgs | None] | None = None
    text_config: _TextConfig = _TextConfig()
    norm_stats: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrismaticRelease:
    """A folder without its weights.

    Attributes:
        body: Towers, projector and decoder.
        transform: Image preprocessing.
        tokenizer: The tokenizer.
        statistics: Dataset to its statistics, as the file has them.
        statistics_file: The file they are in.
    """

    body: PrismaticConfig
    transform: ImageTransform
    tokenizer: PromptTokenizer
    statistics: Mapping[str, Any]
    statistics_file: Path

    def read_statistics(
        self, key: str | None, dims: int, state_size: int | None, fields: tuple[str, str], epsilon: float
    ) -> Statistics:
        """Statistics of one dataset; see `Statistics.read`.

        Raises:
            CheckpointError: If the dataset is unknown or not given, or its statistics are incomplete.
        """
        where = str(self.statistics_file)
        with malformed(where):
            return Statistics.read(self.statistics, key, dims, state_size, where, fields=fields, epsilon=epsilon)


def read_bins(raw: Mapping[str, Any], vocab: int, where: str) -> tuple[int, int]:
    """Rows of the vocabulary that are padding, and bins of an action token.

    Args:
        raw: The fields of `config.json`; what it leaves out is as in upstream's configuration class.
        vocab: Rows of the embedding table.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If the vocabulary has no room for the bins.
    """
    padding, n_bins = raw.get("pad_to_multiple_of", 64), raw.get("n_action_bins", 256)
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in (padding, n_bins))
    if not whole or padding < 0 or not 2 <= n_bins <= vocab - padding:
        found = f"n_action_bins {n_bins!r}, pad_to_multiple_of {padding!r} and text_config.vocab_size {vocab}"
        raise CheckpointError(f"{where}: has {found}; valid: from 2 bins to as many as there are tokens before padding")
    return padding, n_bins


def read_release(folder: Path, *, causal: bool) -> PrismaticRelease:
    """Read a folder's configuration, tokenizer and statistics; no weights.

    A tower's shape cannot be told from its weights, since head counts leave no trace in them. It is timm's for the ids
    in `timm_model_ids`, unless `config.json` has `timm_override_args`: a list with, for each of these ids, null or an
    object with any of timm's `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `patch_size`, `reg_tokens`, `img_size`.
    The releases have no such field.

    Args:
        folder: A folder in the release's format.
        causal: Whether the decoder's tokens see only those before them; no file says so.

    Raises:
        CheckpointError: If a file is missing, malformed, of another backbone, or asks for what is not supported.
    """
    path = folder / "config.json"
    if not path.exists() and (folder / "assets").is_dir():
        raise CheckpointError(f"{path}: no such file; the folder looks like openpi's, whose policies are pi0 and pi05")
    raw = read_json(path)
    fields = parse_config(raw, str(path))
    body = prismatic_body(fields, str(path), causal=causal)
    preprocessor = folder / "preprocessor_config.json"
    transform = image_transform(read_json(preprocessor), raw, body.towers, str(preprocessor))
    tokenizer = fitting_tokenizer(folder / "tokenizer.json", body.vocab)
    statistics = folder / "dataset_statistics.json"
    if statistics.exists():
        return PrismaticRelease(body, transform, tokenizer, read_json(statistics), statistics)
    if fields.norm_stats is None:
        raise CheckpointError(f"{statistics}: no such file, and config.json has no 'norm_stats' either")
    return PrismaticRelease(body, transform, tokenizer, fields.norm_stats, path)


def parse_config(raw: Mapping[str, Any], where: str) -> PrismaticFields:
    """Check the fields of `config.json`, or of a loaded model's `config`.

    Args:
        raw: The fields.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If it is another backbone's, or a field is missing, malformed or not supported.
    """
    for name in ("model_type", "type"):
        if name in raw and raw[name] != _MODEL_TYPE:
            looks = f"this looks like a checkpoint of {reprlib.repr(raw[name])}"
            raise CheckpointError(f"{where}: '{name}' is {reprlib.repr(raw[name])}; valid: '{_MODEL_TYPE}'; {looks}")
    try:
        fields = PrismaticFields.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CheckpointError(f"{where}: '{field}' is missing") from error
        if first["type"] == "extra_forbidden":
            known = _TowerArgs if first["loc"][0] == "timm_override_args" else _Rope
            raise CheckpointError(
                f"{where}: '{field}' is not supported{nearest(str(first['loc'][-1]), known.model_fields)}"
            ) from error
        raise CheckpointError(f"{where}: '{field}' is {reprlib.repr(first['input'])}; {first['msg']}") from error
    fused, ids = fields.use_fused_vision_backbone, fields.timm_model_ids
    valid = [list(TIMM_TOWERS)] if fused else [[name] for name in TIMM_TOWERS]
    if ids not in valid:
        listed = " or ".join(map(str, valid))
        raise CheckpointError(
            f"{where}: 'timm_model_ids' is {ids}; valid: {listed}, since 'use_fused_vision_backbone' is {fused}"
        )
    for name in ("image_sizes", "timm_override_act_layers", "timm_override_args"):
        found = getattr(fields, name)
        if found is not None and len(found) != len(ids):
            raise CheckpointError(f"{where}: '{name}' has {len(found)} entries; valid: {len(ids)}, one for each tower")
    return fields


def prismatic_body(fields: PrismaticFields, where: str, *, causal: bool) -> PrismaticConfig:
    """Towers, projector and decoder.

    Args:
        fields: From `parse_config`.
        where: As given to it.
        causal: See `read_release`.

    Raises:
        CheckpointError: If the dimensions do not fit each other.
    """
    text = fields.text_config
    heads = text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    if heads % kv_heads or (text.head_dim is None and text.hidden_size % heads):
        shape = f"hidden_size {text.hidden_size}, num_attention_heads {heads}, num_key_value_heads {kv_heads}"
        raise CheckpointError(f"{where}: text_config has {shape}; valid: each a multiple of the next")
    head_dim = text.head_dim or text.hidden_size // heads
    if head_dim % 2:
        raise CheckpointError(f"{where}: text_config has heads of width {head_dim}; valid: an even width")
    rope = text.rope_parameters or _Rope()
    return PrismaticConfig(
        towers=_towers(fields, where),
        decoder=DecoderShape(
            depth=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=text.intermediate_size,
            causal=causal,
        ),
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
        eps=text.rms_norm_eps,
        rope_theta=rope.rope_theta or text.rope_theta,
    )


def image_transform(
    preprocessor: Mapping[str, Any], config: Mapping[str, Any], towers: Sequence[ViTConfig], where: str
) -> ImageTransform:
    """Image preprocessing, without a centre crop, which no file states.

    Args:
        preprocessor: Content of `preprocessor_config.json`.
        config: Content of `config.json`.
        towers: The towers.
        where: The preprocessor's file, for errors.

    Raises:
        CheckpointError: If a field is missing or malformed, or does not fit the towers.
    """
    with malformed(where):
        transform = ImageTransform.from_release(preprocessor, config)
    if len(transform.means) != len(towers):
        found = len(transform.means)
        raise CheckpointError(f"{where}: tvf_normalize_params has entries for {found} towers; valid: {len(towers)}")
    sizes = [tower.image_size for tower in towers]
    if any(size != transform.size for size in sizes):
        raise CheckpointError(f"{where}: makes images of side {transform.size}; config.json has image_sizes {sizes}")
    return transform


def unused_keys(towers: Sequence[ViTConfig], *more: str) -> re.Pattern[str]:
    """Keys of a release that no query needs: the towers' blocks after the tap, final norms and pooling heads.

    Args:
        towers: The towers.
        *more: Patterns of further keys.
    """
    patterns = list(more)
    for name, tower in zip(TOWERS, towers, strict=False):
        later = "|".join(str(block) for block in range(tower.tap + 1, tower.depth))
        patterns.append(rf"vision_backbone\.{name}\.(blocks\.({later})|norm|attn_pool)\..+")
    return re.compile("|".join(patterns))


def fitting_tokenizer(path: Path, vocab: int) -> PromptTokenizer:
    """A `tokenizer.json` whose tokens all have a row of the embedding table.

    Raises:
        CheckpointError: If there is none, it is not a tokenizer, or has a token beyond the table's `vocab` rows.
    """
    tokenizer = PromptTokenizer.from_file(path)
    largest = max(Tokenizer.from_file(str(path)).get_vocab().values())
    if largest >= vocab:
        raise CheckpointError(f"{path}: has token {largest}; config.json has 'text_config.vocab_size' {vocab}")
    return tokenizer


@contextmanager
def malformed(where: str | Path) -> Iterator[None]:
    """Blame the file where a value is of a kind its reader did not expect."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{where}: malformed ({error})") from error


def _towers(fields: PrismaticFields, where: str) -> tuple[ViTConfig, ...]:
    given = fields.timm_override_args or [None] * len(fields.timm_model_ids)
    towers = []
    for index, (timm_id, size) in enumerate(zip(fields.timm_model_ids, fields.image_sizes, strict=True)):
        base, args = TIMM_TOWERS[timm_id], given[index] or _TowerArgs()
        width, depth = args.embed_dim or base.hidden_size, args.depth or base.depth
        mlp = int(width * args.mlp_ratio) if args.mlp_ratio else width * base.mlp_size // base.hidden_size
        try:
            tower = replace(
                base,
                image_size=args.img_size or size,
                patch_size=args.patch_size or base.patch_size,
                hidden_size=width,
                depth=depth,
                heads=args.num_heads or base.heads,
                mlp_size=mlp,
                registers=base.registers if args.reg_tokens is None else args.reg_tokens,
                tap=depth - 2,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{where}: image_sizes or timm_override_args, entry {index}: {error}") from error
        towers.append(tower)
    if towers[0].grid != towers[-1].grid:
        grids = " and ".join(f"{rows}x{cols}" for rows, cols in (tower.grid for tower in towers))
        raise CheckpointError(f"{where}: image_sizes give the towers {grids} patches; valid: as many for both")
    return tuple(towers)
