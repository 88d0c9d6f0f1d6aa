"""`config.json` in the three formats pi0 and pi0.5 come in: openpi's, lerobot's and transformers'."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from tokenprune.engine.observations import MAX_SIDE
from tokenprune.errors import CheckpointError, ConfigError, nearest
from tokenprune.model.info import DecoderShape
from tokenprune_adapters.backbones.pi0.config import BASE, PI0Config, Variant
from tokenprune_adapters.vision.transformer import ViTConfig
from tokenprune_adapters.weights.tensor_files import SINGLE, read_json

Format = Literal["openpi", "lerobot", "transformers"]


SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
"""openpi's camera slots; transformers names none."""


# By openpi's names, which lerobot keeps.
_GEMMA: Mapping[str, DecoderShape] = {"gemma_2b": BASE.decoder, "gemma_300m": BASE.expert}


_CAMERAS, _EMPTY = "observation.images.", "empty_camera_"


# Beyond what any such model has, so that a wrong number is an error and not a model too large to be described.
_Size = Annotated[int, Field(ge=1, le=2**20)]


_Depth = Annotated[int, Field(ge=1, le=1024)]


_Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]


# Periods of the time embedding; no release has others.
_Shortest = Annotated[float, Field(ge=4e-3, le=4e-3)]


_Longest = Annotated[float, Field(ge=4.0, le=4.0)]


class _Fields(BaseModel):
    """JSON fields of exactly the type named; what is not named does not matter here."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class _OpenPI(_Fields):
    """What openpi's conversion from JAX writes; its training writes no such file."""

    action_dim: _Size = BASE.width
    action_horizon: _Size | None = None
    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"


class _Feature(_Fields):
    """An input or output of a lerobot policy."""

    type: str
    shape: list[_Size]


class _LeRobot(_Fields):
    """A lerobot policy's configuration; the defaults are lerobot's."""

    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"
    n_obs_steps: Literal[1] = 1
    chunk_size: _Size = 50
    max_state_dim: _Size = 32
    max_action_dim: _Size = 32
    num_inference_steps: _Size = 10
    min_period: _Shortest = 4e-3
    max_period: _Longest = 4.0
    image_resolution: Annotated[list[_Side], Field(min_length=2, max_length=2)] = [224, 224]
    input_features: dict[str, _Feature]
    output_features: dict[str, _Feature]
    use_relative_actions: Literal[False] = False
    use_peft: Literal[False] | None = None


class _Rope(_Fields):
    """Rotary embeddings; only unscaled ones are supported."""

    rope_type: Literal["default"] = "default"
    rope_theta: PositiveFloat = 10000.0


class _Gemma(_Fields):
    """A decoder of transformers' model."""

    model_type: Literal["gemma"]
    hidden_size: _Size
    num_hidden_layers: _Depth
    intermediate_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: Annotated[_Size, Field(multiple_of=2)]
    vocab_size: _Size
    rms_norm_eps: PositiveFloat = 1e-6
    rope_parameters: _Rope = _Rope()
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False

    @property
    def shape(self) -> DecoderShape:
        """Its dimensions."""
        return DecoderShape(
            depth=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            mlp=self.intermediate_size,
            causal=False,
        )


class _Siglip(_Fields):
    """The tower of transformers' model."""

    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Depth
    num_attention_heads: _Size
    image_size: _Side
    patch_size: _Side
    num_channels: Literal[3] = 3
    layer_norm_eps: PositiveFloat = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


class _PaliGemma(_Fields):
    """Tower and prefix decoder of transformers' model."""

    text_config: _Gemma
    vision_config: _Siglip


class _Transformers(_Fields):
    """transformers' configuration; the defaults outside the parts are its own."""

    vlm_config: _PaliGemma
    dit_config: _Gemma
    chunk_size: _Size = 50
    max_state_dim: _Size = 32
    max_action_dim: _Size = 32
    num_inference_steps: _Size = 10
    min_period: _Shortest = 4e-3
    max_period: _Longest = 4.0


_Read = TypeVar("_Read", bound=_Fields)


@dataclass(frozen=True)
class Stated:
    """What a checkpoint's `config.json` states.

    Attributes:
        config: The policy; its chunk, state and views are still those of the preset.
        options: Options that the file gives: `horizon`, `steps`, `dims`, `state_size`; not all formats state all.
        slots: Names of the cameras, in slot order.
    """

    config: PI0Config
    options: Mapping[str, Any]
    slots: tuple[str, ...]


def find_format(folder: Path, chosen: object) -> Format:
    """Which format a folder is in: its `config.json` says so, and a folder `assets` is openpi's.

    Args:
        folder: The checkpoint.
        chosen: The user's option `format`, None where it is not given.

    Raises:
        ConfigError: If there is no such format.
        CheckpointError: If the files say nothing, or something else than the option.
    """
    if chosen is not None and chosen not in get_args(Format):
        raise ConfigError(f"format is {chosen!r}{nearest(str(chosen), get_args(Format))}")
    path = folder / "config.json"
    raw = read_json(path) if path.exists() else {}
    told: Format | None = None
    if "type" in raw or "model_type" in raw:
        told = "lerobot" if "type" in raw else "transformers"
        if chosen is not None and chosen != told:
            raise CheckpointError(f"{path}: is lerobot's with 'type', transformers' with 'model_type', not {chosen}'s")
    elif (folder / "params").is_dir() and not (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder / 'params'}: weights for JAX are not read; openpi's examples/convert_jax_model_to_pytorch.py "
            f"makes {SINGLE} of them"
        )
    elif chosen is None and (folder / "assets").is_dir():
        told = "openpi"
    found: Format | None = told or chosen  # type: ignore[assignment]  # one of the formats, as was checked
    if found is None:
        lacks = "has neither 'type' nor 'model_type'" if raw else "no such file"
        raise CheckpointError(f"{path}: {lacks}, and there is no {folder / 'assets'}; give the option format")
    return found


def read_stated(variant: Variant, folder: Path, found: Format) -> Stated:
    """Read `config.json`; what an openpi checkpoint leaves out is the release's.

    Raises:
        CheckpointError: If it is missing or malformed, of another policy, or asks for what is not supported.
    """
    path = folder / "config.json"
    if found == "openpi":
        return _openpi(variant, read_json(path) if path.exists() else {}, str(path))
    raw = read_json(path)
    return _lerobot(variant, raw, str(path)) if found == "lerobot" else read_transformers(variant, raw, str(path))


def read_transformers(variant: Variant, raw: Mapping[str, Any], where: str) -> Stated:
    """Read the configuration of a transformers model.

    Args:
        variant: The policy that is asked for.
        raw: `config.json`, or the `config` of a loaded model as a mapping.
        where: The file, or what to call the model, for errors.

    Raises:
        CheckpointError: If it is malformed, of another model, or asks for what is not supported.
    """
    _check_kind("model_type", raw, variant if variant == "pi0" else None, where)
    fields = _parsed(_Transformers, raw, where)
    text, vision, expert = fields.vlm_config.text_config, fields.vlm_config.vision_config, fields.dit_config
    shared = ("rms_norm_eps", "rope_parameters")
    if any(getattr(text, name) != getattr(expert, name) for name in shared):
        raise CheckpointError(f"{where}: vlm_config.text_config and dit_config differ in {' or '.join(shared)}")
    config = replace(
        _based(variant, text.shape, expert.shape, fields.max_action_dim, where),
        tower=_tower(
            where,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_size=vision.hidden_size,
            depth=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            mlp_size=vision.intermediate_size,
            tap=vision.num_hidden_layers - 1,
            eps=vision.layer_norm_eps,
        ),
        vocab=text.vocab_size,
        eps=text.rms_norm_eps,
        rope_theta=text.rope_parameters.rope_theta,
    )
    _check_width(config, fields.max_state_dim, where)
    return Stated(config, {"horizon": fields.chunk_size, "steps": fields.num_inference_steps}, SLOTS)


def _openpi(variant: Variant, raw: Mapping[str, Any], where: str) -> Stated:
    fields = _parsed(_OpenPI, raw, where)
    decoder, expert = (_gemma(fields, name, where) for name in ("paligemma_variant", "action_expert_variant"))
    horizon = {} if fields.action_horizon is None else {"horizon": fields.action_horizon}
    return Stated(_based(variant, decoder, expert, fields.action_dim, where), horizon, SLOTS)


def _lerobot(variant: Variant, raw: Mapping[str, Any], where: str) -> Stated:
    _check_kind("type", raw, variant, where)
    fields = _parsed(_LeRobot, raw, where)
    decoder, expert = (_gemma(fields, name, where) for name in ("paligemma_variant", "action_expert_variant"))
    config = _based(variant, decoder, expert, fields.max_action_dim, where)
    _check_width(config, fields.max_state_dim, where)
    side, other = fields.image_resolution
    if side != other:
        raise CheckpointError(f"{where}: 'image_resolution' is {fields.image_resolution}; valid: a square")
    cameras = [name for name, feature in fields.input_features.items() if feature.type == "VISUAL"]
    slots = [name.removeprefix(_CAMERAS) for name in cameras if not name.startswith(_CAMERAS + _EMPTY)]
    if not slots:
        raise CheckpointError(f"{where}: 'input_features' has no camera")
    options = {
        "horizon": fields.chunk_size,
        "steps": fields.num_inference_steps,
        "dims": _numbers(fields.output_features, "action", config, where),
        "state_size": _numbers(fields.input_features, "observation.state", config, where),
    }
    return Stated(replace(config, tower=_tower(where, image_size=side)), options, tuple(slots))


def _parsed(kind: type[_Read], raw: Mapping[str, Any], where: str) -> _Read:
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise CheckpointError(f"{where}: '{field}' is missing") from error
        raise CheckpointError(f"{where}: '{field}' is {reprlib.repr(first['input'])}; {first['msg']}") from error


def _check_kind(field: str, raw: Mapping[str, Any], wanted: str | None, where: str) -> None:
    found = raw.get(field)
    if wanted is None or found != wanted:
        valid = f"'{wanted}'" if wanted else "none, transformers has no pi0.5"
        looks = f"this looks like a checkpoint of {reprlib.repr(found)}"
        raise CheckpointError(f"{where}: '{field}' is {reprlib.repr(found)}; valid: {valid}; {looks}")


def _gemma(fields: _OpenPI | _LeRobot, name: str, where: str) -> DecoderShape:
    variant: str = getattr(fields, name)
    if variant not in _GEMMA:
        raise CheckpointError(f"{where}: '{name}' is '{variant}'{nearest(variant, _GEMMA)}")
    return _GEMMA[variant]


def _based(variant: Variant, decoder: DecoderShape, expert: DecoderShape, width: int, where: str) -> PI0Config:
    """The release with other decoders, which attend together layer by layer."""
    for name in ("depth", "heads", "kv_heads", "head_dim"):
        left, right = getattr(decoder, name), getattr(expert, name)
        if left != right:
            raise CheckpointError(f"{where}: the two decoders have {name} {left} and {right}; valid: the same")
    if decoder.heads % decoder.kv_heads or expert.hidden % 2:
        shape = f"{decoder.heads} heads, {decoder.kv_heads} of keys and values, an expert of width {expert.hidden}"
        raise CheckpointError(f"{where}: {shape}; valid: heads a multiple of those of keys, an even width")
    return replace(BASE, variant=variant, decoder=decoder, expert=expert, width=width)


def _tower(where: str, **sizes: Any) -> ViTConfig:  # noqa: ANN401 - the fields of the tower
    try:
        return replace(BASE.tower, **sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _check_width(config: PI0Config, state: int, where: str) -> None:
    if config.has_state_token and state != config.width:
        raise CheckpointError(
            f"{where}: 'max_state_dim' is {state}, 'max_action_dim' {config.width}; valid here: the same number"
        )


def _numbers(features: Mapping[str, _Feature], name: str, config: PI0Config, where: str) -> int:
    """Numbers of the state or per action; where the file has no such feature, lerobot takes all there could be."""
    shape = features[name].shape if name in features else [config.width]
    if len(shape) != 1 or shape[0] > config.width:
        raise CheckpointError(f"{where}: '{name}' has shape {shape}; valid: one length, {config.width} at most")
    return shape[0]
