"""A CLIP beside the policy: what its image tower makes of each patch, and its text tower of a sentence.

It is open_clip's, of the user's own weights: none come with tokenprune, and none are ever drawn at random. A file is
read as weights alone, so nothing in it is executed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokenprune import MissingError, mend_torchvision, nearest

HUB = "hf-hub:"


TEXTS = 64
"""Sentences whose embeddings are kept."""


class Clip:
    """One CLIP with its weights.

    Args:
        model: open_clip's model.
        tokenizer: What makes `[1, L]` token ids of a list with one sentence.
        colours: Mean and standard deviation of its pictures' channels in [0, 1].
        layer: Block whose output is read, counted from the end: -1 is the last.

    Attributes:
        grid: Rows and columns of the image tower's patches.
    """

    def __init__(self, model: Any, tokenizer: Any, colours: Sequence[Sequence[float]], layer: int) -> None:  # noqa: ANN401
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        depth = len(self._model.visual.transformer.resblocks)
        if -layer > depth:
            raise ValueError(f"layer: {layer}: the image tower has {depth} blocks; valid: -{depth} to -1")
        self._block = depth + layer
        self.grid: tuple[int, int] = tuple(self._model.visual.grid_size)
        self._mean, self._std = (torch.tensor(colour, dtype=torch.float64).view(3, 1, 1) for colour in colours)
        self._like = torch.empty(0)
        self._texts: dict[str, Tensor] = {}

    def follow(self, like: Tensor) -> None:
        """Move to a tensor's device and type, unless it is there; texts encoded elsewhere are forgotten."""
        if (like.device, like.dtype) != (self._like.device, self._like.dtype):
            self._like = like.new_empty(0)
            self._model.to(like.device, like.dtype)
            self._mean, self._std = self._mean.to(like.device), self._std.to(like.device)
            self._texts.clear()

    def text(self, sentence: str) -> Tensor:
        """What a sentence is to the text tower `[D]`, which is asked once for each of the last few."""
        embedding = self._texts.pop(sentence, None)
        if embedding is None:
            tokens = self._tokenizer([sentence]).to(self._like.device)
            embedding = _wide(self._model.encode_text(tokens)[0])
        self._texts[sentence] = embedding
        if len(self._texts) > TEXTS:
            del self._texts[next(iter(self._texts))]
        return embedding

    def patches(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Projected features `[B, rows * cols, D]` of each view's pixels, uint8 `[B, 3, S, S]`, all in one pass."""
        visual = self._model.visual
        seen = visual.forward_intermediates(
            torch.cat([self._prepared(pixels) for pixels in views]),
            indices=[self._block],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        (features,) = seen["image_intermediates"]
        return (_wide(features) @ _wide(visual.proj)).chunk(len(views))

    def _prepared(self, pixels: Tensor) -> Tensor:
        """Pixels as the image tower wants them, resized the way PIL does it."""
        size = self._model.visual.image_size
        picture = pixels.to(torch.promote_types(self._like.dtype, torch.float32))
        if tuple(pixels.shape[2:]) != tuple(size):
            picture = interpolate(picture, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return ((picture / 255 - self._mean.to(picture)) / self._std.to(picture)).to(self._like.dtype)

    @property
    def flops(self) -> int:
        """Multiply-adds times two of one picture, matrix products only."""
        visual = self._model.visual
        blocks = visual.transformer.resblocks[: self._block + 1]
        patches, width = self.grid[0] * self.grid[1], visual.proj.shape[0]
        tokens = patches + 1
        matrices: int = sum(weight.numel() for weight in blocks.parameters() if weight.dim() == 2)
        attention: int = 4 * tokens * tokens * width * len(blocks)
        outside: int = 2 * patches * (visual.conv1.weight.numel() + visual.proj.numel() + visual.proj.shape[1])
        return 2 * tokens * matrices + attention + outside


def load(model: str, checkpoint: str, layer: int) -> Clip:
    """Make a CLIP and fill it.

    Args:
        model: A name open_clip knows, or the path of a JSON file as open_clip describes a model.
        checkpoint: Path of its weights, a tag of open_clip's, or `hf-hub:` and a name, which brings its own model.
        layer: Block whose output is read, counted from the end.

    Raises:
        MissingError: If open_clip is not installed.
        ValueError: If there is no such model or checkpoint, or they do not fit.
    """
    library = _open_clip()
    file = Path(checkpoint).expanduser()
    with torch.random.fork_rng(devices=[]):
        # The weights that are drawn here and overwritten below leave the caller's random numbers as they were.
        if checkpoint.startswith(HUB):
            made, tokenizer, colours = _fetched(library, checkpoint, None)
        elif file.is_file():
            made, tokenizer, colours = _described(library, model)
        elif checkpoint in library.list_pretrained_tags_by_model(model):
            made, tokenizer, colours = _fetched(library, model, checkpoint)
        else:
            tags = library.list_pretrained_tags_by_model(model)
            raise ValueError(
                f"checkpoint: there is no file '{checkpoint}', and open_clip knows no such weights of "
                f"'{model}'{nearest(checkpoint, [*tags, HUB + 'NAME'])}"
            )
    visual = made.visual
    if not isinstance(visual, library.transformer.VisionTransformer) or visual.attn_pool is not None:
        raise ValueError(f"model: '{model}' does not project single patches; valid: a plain ViT, such as ViT-B-16")
    if file.is_file():
        _fill(made, file)
    return Clip(made, tokenizer, colours, layer)


def _open_clip() -> Any:  # noqa: ANN401
    mend_torchvision()
    try:
        return importlib.import_module("open_clip")
    except Exception as error:
        raise MissingError(
            f"open_clip cannot be imported ({error}); install the extra: pip install 'tokenprune-vla[clip]'"
        ) from error


def _fetched(library: Any, model: str, tag: str | None) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """A model with weights that open_clip finds or downloads, as weights alone, which is its default."""
    try:
        made = library.create_model(model, pretrained=tag, require_pretrained=True)
        tokenizer = library.get_tokenizer(model)
    except Exception as error:
        raise ValueError(f"checkpoint: open_clip cannot load '{tag or model}': {error}") from error
    return made, tokenizer, (made.visual.preprocess_cfg["mean"], made.visual.preprocess_cfg["std"])


def _described(library: Any, model: str) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """A model that is still to be filled, with its tokenizer and colours."""
    colours: Mapping[str, Any] = {}
    try:
        if model.endswith(".json"):
            config = json.loads(Path(model).expanduser().read_text(encoding="utf-8"))
            # The hub's `open_clip_config.json` holds both.
            colours, config = config.get("preprocess_cfg", {}), config.get("model_cfg", config)
            tokenizer = library.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
        elif model in library.list_models():
            config, tokenizer = library.get_model_config(model), library.get_tokenizer(model)
        else:
            close = get_close_matches(model, library.list_models(), n=8, cutoff=0.3)
            raise ValueError(f"open_clip has no such model{nearest(model, close)}, or a path that ends in .json")
        kind = library.CustomTextCLIP if config.pop("custom_text", False) else library.CLIP
        made = kind(**config)
    except Exception as error:
        raise ValueError(f"model: '{model}': {type(error).__name__}: {error}") from error
    mean, std = library.OPENAI_DATASET_MEAN, library.OPENAI_DATASET_STD
    return made, tokenizer, (colours.get("mean", mean), colours.get("std", std))


def _fill(model: nn.Module, file: Path) -> None:
    """Load weights that must fit exactly."""
    try:
        safe = file.suffix == ".safetensors"
        held: Any = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        held = held.get("state_dict", held)
        held = {name.removeprefix("module."): weight for name, weight in held.items()}
        found = {name: list(weight.shape) for name, weight in held.items()}
    except Exception as error:
        raise ValueError(
            f"checkpoint: '{file}' cannot be read as weights alone ({type(error).__name__}); valid: a .safetensors "
            "file, or a state dict that torch.load reads with weights_only=True"
        ) from error
    wanted = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    shapes = [f"{n} is {found[n]} and must be {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    wrong = [_and_more("it lacks ", sorted(wanted.keys() - found.keys())), _and_more("", shapes)]
    wrong.append(_and_more("the model has no ", sorted(found.keys() - wanted.keys())))
    if any(wrong):
        said = "; ".join(filter(None, wrong))
        raise ValueError(f"checkpoint: '{file}' does not fit the model: {said}")
    model.load_state_dict(held)


def _and_more(what: str, named: Sequence[str]) -> str:
    more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    return f"{what}{named[0]}{more}" if named else ""


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
