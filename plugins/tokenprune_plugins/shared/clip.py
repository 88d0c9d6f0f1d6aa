"""A CLIP model that runs beside the policy: image features by patch, and text embeddings.

The model is open_clip's, with weights that the user gives: none ship with tokenprune, and random weights are never
used. A checkpoint file is read as weights only, so nothing in it is executed.
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
"""Text embeddings that are cached, the most recently used ones."""


class Clip:
    """A CLIP model with its weights.

    Args:
        model: Model of open_clip.
        tokenizer: Turns a list with one sentence into token ids `[1, L]`.
        colours: Mean and standard deviation of the input channels, for pixels in [0, 1].
        layer: Block of the image tower whose output is read, counted from the end: -1 is the last.

    Attributes:
        grid: Rows and columns of the image tower's patches.

    Raises:
        ValueError: If the image tower has no such block.
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

    def move_to(self, like: Tensor) -> None:
        """Move the model to the device and dtype of a tensor; a move clears the cached text embeddings."""
        if (like.device, like.dtype) != (self._like.device, self._like.dtype):
            self._like = like.new_empty(0)
            self._model.to(like.device, like.dtype)
            self._mean, self._std = self._mean.to(like.device), self._std.to(like.device)
            self._texts.clear()

    def embed_text(self, sentence: str) -> Tensor:
        """Text embedding of a sentence `[D]`, computed once while it is among the last `TEXTS` sentences."""
        embedding = self._texts.pop(sentence, None)
        if embedding is None:
            tokens = self._tokenizer([sentence]).to(self._like.device)
            embedding = _wide(self._model.encode_text(tokens)[0])
        self._texts[sentence] = embedding
        if len(self._texts) > TEXTS:
            del self._texts[next(iter(self._texts))]
        return embedding

    def embed_patches(self, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Projected patch features `[B, rows * cols, D]` of each view, in one forward pass.

        Args:
            views: Pixels of each view, uint8 `[B, 3, S, S]`.
        """
        visual = self._model.visual
        outputs = visual.forward_intermediates(
            torch.cat([self._prepared(pixels) for pixels in views]),
            indices=[self._block],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )
        (features,) = outputs["image_intermediates"]
        return (_wide(features) @ _wide(visual.proj)).chunk(len(views))

    def _prepared(self, pixels: Tensor) -> Tensor:
        """Pixels resized and normalised for the image tower; they are rounded after resizing, as PIL does."""
        size = self._model.visual.image_size
        picture = pixels.to(torch.promote_types(self._like.dtype, torch.float32))
        if tuple(pixels.shape[2:]) != tuple(size):
            picture = interpolate(picture, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return ((picture / 255 - self._mean.to(picture)) / self._std.to(picture)).to(self._like.dtype)

    @property
    def flops(self) -> int:
        """FLOPs of the image tower for one picture: two per multiply-add, matrix products only."""
        visual = self._model.visual
        blocks = visual.transformer.resblocks[: self._block + 1]
        patches, width = self.grid[0] * self.grid[1], visual.proj.shape[0]
        tokens = patches + 1
        matrices: int = sum(weight.numel() for weight in blocks.parameters() if weight.dim() == 2)
        attention: int = 4 * tokens * tokens * width * len(blocks)
        outside: int = 2 * patches * (visual.conv1.weight.numel() + visual.proj.numel() + visual.proj.shape[1])
        return 2 * tokens * matrices + attention + outside


def load(model: str, checkpoint: str, layer: int) -> Clip:
    """Build a CLIP model and load its weights.

    Args:
        model: Name of a model of open_clip, or path of a JSON file in open_clip's model format.
        checkpoint: Path of a weights file, a pretrained tag of open_clip, or `hf-hub:` and a name; the latter brings
            its own model.
        layer: Block of the image tower whose output is read, counted from the end.

    Raises:
        MissingError: If open_clip is not installed.
        ValueError: If there is no such model or checkpoint, or the weights do not fit the model.
    """
    library = _open_clip()
    file = Path(checkpoint).expanduser()
    with torch.random.fork_rng(devices=[]):
        # Building a model initialises its weights at random; the fork keeps the caller's RNG as it was.
        if checkpoint.startswith(HUB):
            built, tokenizer, colours = _pretrained(library, checkpoint, None)
        elif file.is_file():
            built, tokenizer, colours = _without_weights(library, model)
        elif checkpoint in library.list_pretrained_tags_by_model(model):
            built, tokenizer, colours = _pretrained(library, model, checkpoint)
        else:
            tags = library.list_pretrained_tags_by_model(model)
            raise ValueError(
                f"checkpoint: there is no file '{checkpoint}', and open_clip knows no such weights of "
                f"'{model}'{nearest(checkpoint, [*tags, HUB + 'NAME'])}"
            )
    visual = built.visual
    if not isinstance(visual, library.transformer.VisionTransformer) or visual.attn_pool is not None:
        raise ValueError(f"model: '{model}' does not project single patches; valid: a plain ViT, such as ViT-B-16")
    if file.is_file():
        _load_weights(built, file)
    return Clip(built, tokenizer, colours, layer)


def _open_clip() -> Any:  # noqa: ANN401
    mend_torchvision()
    try:
        return importlib.import_module("open_clip")
    except Exception as error:
        raise MissingError(
            f"open_clip cannot be imported ({error}); install the extra: pip install 'tokenprune-vla[clip]'"
        ) from error


def _pretrained(library: Any, model: str, tag: str | None) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """Model, tokenizer and colours, with weights that open_clip finds or downloads; it reads weights only."""
    try:
        built = library.create_model(model, pretrained=tag, require_pretrained=True)
        tokenizer = library.get_tokenizer(model)
    except Exception as error:
        raise ValueError(f"checkpoint: open_clip cannot load '{tag or model}': {error}") from error
    return built, tokenizer, (built.visual.preprocess_cfg["mean"], built.visual.preprocess_cfg["std"])


def _without_weights(library: Any, model: str) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """Model, tokenizer and colours; the model's weights are still to be loaded."""
    colours: Mapping[str, Any] = {}
    try:
        if model.endswith(".json"):
            config = json.loads(Path(model).expanduser().read_text(encoding="utf-8"))
            # A hub's `open_clip_config.json` also holds mean and standard deviation of the colours.
            colours, config = config.get("preprocess_cfg", {}), config.get("model_cfg", config)
            tokenizer = library.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
        elif model in library.list_models():
            config, tokenizer = library.get_model_config(model), library.get_tokenizer(model)
        else:
            close = get_close_matches(model, library.list_models(), n=8, cutoff=0.3)
            raise ValueError(
                f"open_clip has no such model{nearest(model, close)}; valid: its names, or a path that ends in .json"
            )
        kind = library.CustomTextCLIP if config.pop("custom_text", False) else library.CLIP
        built = kind(**config)
    except Exception as error:
        raise ValueError(f"model: '{model}': {type(error).__name__}: {error}") from error
    mean, std = library.OPENAI_DATASET_MEAN, library.OPENAI_DATASET_STD
    return built, tokenizer, (colours.get("mean", mean), colours.get("std", std))


def _load_weights(model: nn.Module, file: Path) -> None:
    """Load a weights file whose names and shapes must be exactly the model's."""
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
        raise ValueError(f"checkpoint: '{file}' does not fit the model: {'; '.join(filter(None, wrong))}")
    model.load_state_dict(held)


def _and_more(what: str, named: Sequence[str]) -> str:
    more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    return f"{what}{named[0]}{more}" if named else ""


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
