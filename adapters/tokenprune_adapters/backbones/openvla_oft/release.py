"""OpenVLA-OFT checkpoints in the format of the release: a folder of JSON files, safetensors and two small `.pt` files.

Nothing in a folder is run. `auto_map` in `config.json` names remote code and is never followed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from tokenizers import Tokenizer

from tokenprune.backbone import DecoderShape
from tokenprune.errors import CheckpointError, nearest
from tokenprune_adapters.backbones.openvla_oft.backbone import OFTModel, OpenVLAOFT
from tokenprune_adapters.backbones.openvla_oft.config import SEVEN_B, OFTConfig, with_options
from tokenprune_adapters.preprocess import MAX_SIDE, ImageTransform
from tokenprune_adapters.prismatic import TOWERS, PrismaticConfig
from tokenprune_adapters.prompt import PromptTokenizer
from tokenprune_adapters.statistics import Statistics
from tokenprune_adapters.tensors import StoredTensor, check_fit, read_json, stored_pt, stored_safetensors
from tokenprune_adapters.vision import ViTConfig

_JSON = ("*.json",)
# FiLM's file is fetched only to be noticed: its language-conditioned towers would otherwise run without the language.
_ALL = (*_JSON, "*.safetensors", "action_head--*", "proprio_projector--*", "vision_backbone--*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Both towers of `dinosiglip-vit-so-224px` (upstream OpenVLA).
_TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
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


class _Config(_Fields):
    """`config.json`."""

    timm_model_ids: list[str]
    image_sizes: Annotated[list[_Side], Field(min_length=2, max_length=2)]
    use_fused_vision_backbone: Literal[True]
    timm_override_act_layers: list[None] | None = None
    timm_override_args: Annotated[list[_TowerArgs | None], Field(min_length=2, max_length=2)] | None = None
    text_config: _TextConfig = _TextConfig()
    norm_stats: dict[str, Any] | None = None


def read_config(folder: Path, options: Mapping[str, Any]) -> tuple[OFTConfig, PromptTokenizer]:
    """Read a release's configuration and tokenizer; no weights are read or downloaded.

    A tower's shape cannot be told from its weights, since head counts leave no trace in them. It is timm's for the ids
    in `timm_model_ids`, unless `config.json` has `timm_override_args`: a list with, for DINOv2 and then SigLIP, null or
    an object with any of timm's `embed_dim`, `depth`, `num_heads`, `mlp_ratio`, `patch_size`, `reg_tokens`, `img_size`.
    The releases have no such field. The chunk is LIBERO's, 8 actions of 7 numbers, and the robot state has 8 numbers;
    no file states the chunk's length.

    Args:
        folder: A folder in the release's format, or a hub id `owner/name`.
        options: `views` (primary and wrist by default), `proprio` and `center_crop` (both true by default), and
            `unnorm_key`, the dataset whose statistics are used.

    Returns:
        The configuration and the tokenizer.

    Raises:
        CheckpointError: If a file is missing, malformed, or asks for something that is not supported.
        ConfigError: If an option is wrong.
    """
    config, tokenizer, _ = _read(_local(folder, _JSON), options)
    return config, tokenizer


def load_oft(folder: Path, options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> OpenVLAOFT:
    """Load a release.

    Every tensor of every file is accounted for before the first is read. Left out by name are only those that no
    query needs: `lm_head`, the towers' blocks after the tap, their final norms and their pooling heads. Tensors are
    read one by one into a model that holds no memory until then.

    Args:
        folder: See `read_config`.
        options: See `read_config`.
        device: Where the weights go.
        dtype: Their type, whatever the files hold.

    Returns:
        The policy's backbone.

    Raises:
        CheckpointError: If a file is missing, damaged or unsafe, or does not fit the configuration.
        ConfigError: If an option is wrong.
    """
    local = _local(folder, _ALL)
    config, tokenizer, statistics = _read(local, options)
    with torch.device("meta"):
        model = OFTModel(config)
    # The decoder loop computes rotary angles itself; this module's buffers are in no file.
    del model.language_model.model.rotary_emb
    stored = _stored(local, config, model)
    state = {name: tensor.read(device, dtype) for name, tensor in stored.items()}
    model.load_state_dict(state, assign=True)
    return OpenVLAOFT(config, model, tokenizer, statistics, config.info(str(folder), untrained=False))


def _local(checkpoint: Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or the one a hub id was downloaded to."""
    if checkpoint.is_dir():
        return checkpoint
    name = checkpoint.as_posix()
    if checkpoint.exists() or _HUB_ID.fullmatch(name) is None:
        raise CheckpointError(f"{name}: no such folder; valid: one in the release's format, or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's errors and those of its HTTP library have no narrower base
        raise CheckpointError(f"'{name}' is no folder here, and the hub did not give it: {error}") from error


def _read(folder: Path, options: Mapping[str, Any]) -> tuple[OFTConfig, PromptTokenizer, Statistics]:
    film = sorted(path.name for path in folder.glob("vision_backbone--*"))
    if film:
        raise CheckpointError(f"{folder / film[0]}: the checkpoint uses FiLM, which this adapter does not support")
    path = folder / "config.json"
    raw = read_json(path)
    parsed = _parsed(raw, path)
    towers = _towers(parsed, path)
    body = _body(parsed.text_config, towers, path)
    transform = _transform(folder / "preprocessor_config.json", raw, towers)
    config = with_options(replace(SEVEN_B, body=body, transform=transform), options)
    tokenizer = _tokenizer(folder / "tokenizer.json", body.vocab)
    return config, tokenizer, _statistics(folder, parsed, config, options.get("unnorm_key"))


def _parsed(raw: Mapping[str, Any], path: Path) -> _Config:
    try:
        config = _Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CheckpointError(f"{path}: '{field}' is missing") from error
        if first["type"] == "extra_forbidden":
            known = _TowerArgs if first["loc"][0] == "timm_override_args" else _Rope
            raise CheckpointError(
                f"{path}: '{field}' is not supported{nearest(str(first['loc'][-1]), known.model_fields)}"
            ) from error
        raise CheckpointError(f"{path}: '{field}' is {reprlib.repr(first['input'])}; {first['msg']}") from error
    if tuple(config.timm_model_ids) != _TIMM_IDS:
        raise CheckpointError(f"{path}: 'timm_model_ids' is {config.timm_model_ids}; valid: {list(_TIMM_IDS)}")
    return config


def _towers(config: _Config, path: Path) -> tuple[ViTConfig, ...]:
    given = config.timm_override_args or [None, None]
    towers = []
    for index, (base, size) in enumerate(zip(SEVEN_B.body.towers, config.image_sizes, strict=True)):
        args = given[index] or _TowerArgs()
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
            raise CheckpointError(f"{path}: image_sizes or timm_override_args, entry {index}: {error}") from error
        towers.append(tower)
    if towers[0].grid != towers[1].grid:
        grids = " and ".join(f"{rows}x{cols}" for rows, cols in (tower.grid for tower in towers))
        raise CheckpointError(f"{path}: image_sizes give the towers {grids} patches; valid: as many for both")
    return tuple(towers)


def _transform(path: Path, config: Mapping[str, Any], towers: Sequence[ViTConfig]) -> ImageTransform:
    with _malformed(path):
        # Fine-tunes for LIBERO are trained with random crops of this area; no file says so.
        transform = ImageTransform.from_release(read_json(path), config, center_crop_area=0.9)
    if len(transform.means) != len(towers):
        found = len(transform.means)
        raise CheckpointError(f"{path}: tvf_normalize_params has entries for {found} towers; valid: {len(towers)}")
    sizes = [tower.image_size for tower in towers]
    if any(size != transform.size for size in sizes):
        raise CheckpointError(f"{path}: makes images of side {transform.size}; config.json has image_sizes {sizes}")
    return transform


def _body(text: _TextConfig, towers: tuple[ViTConfig, ...], path: Path) -> PrismaticConfig:
    heads = text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    if heads % kv_heads or (text.head_dim is None and text.hidden_size % heads):
        shape = f"hidden_size {text.hidden_size}, num_attention_heads {heads}, num_key_value_heads {kv_heads}"
        raise CheckpointError(f"{path}: text_config has {shape}; valid: each a multiple of the next")
    head_dim = text.head_dim or text.hidden_size // heads
    if head_dim % 2:
        raise CheckpointError(f"{path}: text_config has heads of width {head_dim}; valid: an even width")
    rope = text.rope_parameters or _Rope()
    return PrismaticConfig(
        towers=towers,
        decoder=DecoderShape(
            depth=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp=text.intermediate_size,
            causal=False,
        ),
        vocab=text.vocab_size,
        max_positions=text.max_position_embeddings,
        eps=text.rms_norm_eps,
        rope_theta=rope.rope_theta or text.rope_theta,
    )


def _tokenizer(path: Path, vocab: int) -> PromptTokenizer:
    tokenizer = PromptTokenizer.from_file(path)
    largest = max(Tokenizer.from_file(str(path)).get_vocab().values())
    if largest >= vocab:
        raise CheckpointError(f"{path}: has token {largest}; config.json has 'text_config.vocab_size' {vocab}")
    return tokenizer


def _statistics(folder: Path, parsed: _Config, config: OFTConfig, key: str | None) -> Statistics:
    path, data = folder / "dataset_statistics.json", parsed.norm_stats
    if path.exists():
        data = read_json(path)
    elif data is None:
        raise CheckpointError(f"{path}: no such file, and config.json has no 'norm_stats' either")
    else:
        path = folder / "config.json"
    with _malformed(path):
        return Statistics.read(data, key, config.action.dims, config.state_size, str(path))


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """Blame the file where a value is of a kind its reader did not expect."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed ({error})") from error


def _stored(folder: Path, config: OFTConfig, model: OFTModel) -> dict[str, StoredTensor]:
    """The model's tensors in their files, checked one by one."""
    small = {"action_head": _only(folder, "action_head", "this adapter runs checkpoints with the L1 head")}
    if config.state_size is not None:
        hint = "set the option proprio to false where the policy reads no robot state"
        small["proprio_projector"] = _only(folder, "proprio_projector", hint)
    wanted = model.state_dict()
    unused = _unused(config)
    body = {key: tensor for key, tensor in stored_safetensors(folder).items() if unused.fullmatch(key) is None}
    check_fit({key: t for key, t in wanted.items() if key.split(".")[0] not in small}, body, folder)
    for part, path in small.items():
        tensors = stored_pt(path)
        prefix = f"{part}."
        check_fit({k.removeprefix(prefix): t for k, t in wanted.items() if k.startswith(prefix)}, tensors, path)
        body |= {prefix + key: tensor for key, tensor in tensors.items()}
    return body


def _only(folder: Path, part: str, hint: str) -> Path:
    found = sorted(folder.glob(f"{part}--*.pt"))
    if not found:
        raise CheckpointError(f"{folder}: there is no {part}--*.pt; {hint}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{folder}: there are several {part}--*.pt; keep the one that is meant of {names}")
    return found[0]


def _unused(config: OFTConfig) -> re.Pattern[str]:
    """Keys of the release that no query needs."""
    patterns = [r"language_model\.lm_head\.weight"]
    for name, tower in zip(TOWERS, config.body.towers, strict=True):
        later = "|".join(str(block) for block in range(tower.tap + 1, tower.depth))
        patterns.append(rf"vision_backbone\.{name}\.(blocks\.({later})|norm|attn_pool)\..+")
    return re.compile("|".join(patterns))
