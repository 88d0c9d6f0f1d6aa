"""From a camera frame to the pixels stages see, and from those to what each vision tower reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tokenprune.errors import CheckpointError, ConfigError, ObservationError, nearest

Triple = tuple[float, float, float]
Resize = Literal["resize-naive", "letterbox", "resize-crop"]

# The releases hold ImageNet's constants rounded to bfloat16, not the usual three digits.
DINO_MEAN: Triple = (0.484375, 0.455078125, 0.40625)
DINO_STD: Triple = (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN: Triple = (0.5, 0.5, 0.5)
SIGLIP_STD: Triple = (0.5, 0.5, 0.5)

MIN_SIDE, MAX_SIDE = 64, 4096
_BICUBIC = (int(Image.Resampling.BICUBIC), "bicubic")
_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImageTransform:
    """How a release prepares an image (upstream OpenVLA's processor, upstream OpenVLA-OFT's centre crop).

    Attributes:
        size: Side `S` of the square image the towers read, in pixels.
        resize: `resize-naive` squashes to a square; `letterbox` first pads the shorter side symmetrically with
            the mean colour of the last tower; `resize-crop` scales the shorter side to `size` and crops the
            middle of the longer one.
        center_crop_area: Share of the area kept by the centre crop that follows and is scaled back to `size`,
            or None for no crop. 0.9 for fine-tunes that were trained with random crops, such as LIBERO's.
        means: Mean per channel in [0, 1], one triple per tower in the order of the checkpoint.
        stds: Standard deviation per channel, likewise.

    Raises:
        ConfigError: If `center_crop_area` is not a share.
    """

    size: int = 224
    resize: Resize = "resize-naive"
    center_crop_area: float | None = None
    means: tuple[Triple, ...] = (DINO_MEAN, SIGLIP_MEAN)
    stds: tuple[Triple, ...] = (DINO_STD, SIGLIP_STD)

    def __post_init__(self) -> None:
        """Refuse a crop larger than the image."""
        if self.center_crop_area is not None and not 0 < self.center_crop_area <= 1:
            raise ConfigError(f"center_crop_area is {self.center_crop_area}; valid: above 0 and up to 1, or None")

    @classmethod
    def from_release(
        cls,
        preprocessor: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        center_crop_area: float | None = None,
    ) -> ImageTransform:
        """Read the transform a release was trained with.

        Args:
            preprocessor: Contents of `preprocessor_config.json`.
            config: Contents of `config.json`, where some releases keep `image_resize_strategy`.
            center_crop_area: See the attribute; no release file states it.

        Returns:
            The transform.

        Raises:
            CheckpointError: If a field is missing, malformed, or asks for something else than these steps.
        """
        strategy = _field({**(config or {}), **preprocessor}, "image_resize_strategy")
        if strategy not in get_args(Resize):
            raise CheckpointError(
                f"{_FILE}: unknown image_resize_strategy '{strategy}'{nearest(str(strategy), get_args(Resize))}"
            )
        towers = _field(preprocessor, "tvf_normalize_params")
        if not isinstance(towers, list) or not towers:
            raise CheckpointError(f"{_FILE}: tvf_normalize_params is {towers!r}, not a list with one entry per tower")
        means = tuple(_triple(tower, "mean", n) for n, tower in enumerate(towers))
        stds = tuple(_triple(tower, "std", n) for n, tower in enumerate(towers))
        if not all(value > 0 for std in stds for value in std):
            raise CheckpointError(f"{_FILE}: tvf_normalize_params has std {stds}; valid: positive numbers")
        return cls(_square_size(preprocessor), strategy, center_crop_area, means, stds)

    def cropped(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Resize and crop one camera frame.

        Args:
            image: `[H, W, 3]` uint8 RGB, as `check_image` returns it.

        Returns:
            `[3, S, S]` uint8: the pixels that the towers and the stages see.
        """
        frame = Image.fromarray(image)
        if self.resize == "resize-naive":
            frame = frame.resize((self.size, self.size), Image.Resampling.BICUBIC)
        else:
            if self.resize == "letterbox":
                frame = _pad_to_square(frame, self.means[-1])
            frame = _resize_shorter_side(frame, self.size)
        pixels = np.array(frame).transpose(2, 0, 1)
        if self.center_crop_area is not None:
            pixels = _center_crop(pixels, self.center_crop_area)
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def normalise(self, pixels: Tensor, tower: int, dtype: torch.dtype) -> Tensor:
        """Normalise a batch for one tower, on the device it lies on and without waiting for it.

        Args:
            pixels: `[B, 3, S, S]` uint8.
            tower: Index of the tower, in the order of `means`.
            dtype: Type of the result; the arithmetic is float32.

        Returns:
            `[B, 3, S, S]`.
        """
        # Numbers rather than tensors: constants on the host would have to be copied, which waits for the device.
        constants = zip((pixels.float() / 255).unbind(1), self.means[tower], self.stds[tower], strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in constants], dim=1).to(dtype)


def check_image(view: str, image: object) -> npt.NDArray[np.uint8]:
    """Refuse anything that is not a camera frame.

    Args:
        view: Name of the camera, for the message.
        image: What the observation holds.

    Returns:
        The same array, `[H, W, 3]` uint8.

    Raises:
        ObservationError: Saying what was found, what is valid and how to get there.
    """
    valid = f"valid: a numpy array [H, W, 3], uint8, RGB, sides from {MIN_SIDE} to {MAX_SIDE}"
    if not isinstance(image, np.ndarray):
        kind = f"{type(image).__module__}.{type(image).__qualname__}".removeprefix("builtins.")
        raise ObservationError(f"image '{view}' is a {kind}; {valid}")
    found = f"image '{view}' is {image.dtype} with shape {list(image.shape)}"
    if image.ndim != 3:
        hint = "give one frame, not a batch" if image.ndim == 4 else "give height, width and three channels"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if image.shape[2] != 3:
        hint = "channels come first, transpose to [H, W, 3]" if image.shape[0] == 3 else "three channels are needed"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if image.dtype != np.uint8:
        floating = np.issubdtype(image.dtype, np.floating)
        hint = "convert [0, 1] with (255 * image).round().astype(np.uint8)" if floating else "convert to 0..255 uint8"
        raise ObservationError(f"{found}; {hint}; {valid}")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in image.shape[:2]):
        raise ObservationError(f"{found}; {valid}")
    return image


def _pad_to_square(frame: Image.Image, mean: Triple) -> Image.Image:
    """Pad both ends of the shorter side; an odd difference leaves one pixel for the crop, as upstream."""
    longer = max(frame.size)
    left, top = ((longer - side) // 2 for side in frame.size)
    colour = (int(255 * mean[0]), int(255 * mean[1]), int(255 * mean[2]))
    padded = Image.new("RGB", (frame.width + 2 * left, frame.height + 2 * top), colour)
    padded.paste(frame, (left, top))
    return padded


def _resize_shorter_side(frame: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size`, keeping proportions, then crop the middle square."""
    shorter = min(frame.size)
    width, height = (size * side // shorter for side in frame.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = frame.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def _center_crop(pixels: npt.NDArray[np.uint8], area: float) -> npt.NDArray[np.uint8]:
    """Crop the central `area` of `[3, S, S]` and scale it back, bilinear with aligned corners.

    In numpy, because torch's thread pool makes an image this small wait where other processes keep the cores busy.
    """
    low, high, weight = _crop_taps(pixels.shape[-1], area)
    image = pixels.astype(np.float32) / np.float32(255)
    for axis, along in ((2, weight), (1, weight[:, None])):
        first = image.take(low, axis)
        image = first + (image.take(high, axis) - first) * along
    # Upstream's conversion back to uint8 scales by 255.5 and truncates; it does not round to nearest.
    return (image * np.float32(255.5)).astype(np.uint8)


@lru_cache(maxsize=8)
def _crop_taps(size: int, area: float) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Return the two source pixels of each output pixel and the weight of the second, `[S]` each."""
    side = np.sqrt(np.float32(area))
    position = (1 - side) / 2 * (size - 1) + side * np.arange(size, dtype=np.float32)
    low = np.floor(position)
    return low.astype(np.intp), np.ceil(position).astype(np.intp), position - low


def _field(mapping: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401
    if name not in mapping:
        raise CheckpointError(f"{_FILE}: '{name}' is missing; it has: {', '.join(sorted(mapping)) or '(nothing)'}")
    return mapping[name]


def _triple(tower: object, name: str, index: int) -> Triple:
    values = tower.get(name) if isinstance(tower, Mapping) else None
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(isinstance(value, int | float) and isfinite(value) for value in values)
    ):
        raise CheckpointError(f"{_FILE}: tvf_normalize_params[{index}] has {name} {values!r}; valid: three numbers")
    return float(values[0]), float(values[1]), float(values[2])


def _square_size(preprocessor: Mapping[str, Any]) -> int:
    """Return the one side all towers read, after checking that images are square and resized bicubically."""
    resizes = preprocessor.get("tvf_resize_params", [])
    steps = [step for step in resizes if isinstance(step, Mapping)]
    modes = [*preprocessor.get("interpolations", []), *(step.get("interpolation", "bicubic") for step in steps)]
    if any(mode not in _BICUBIC for mode in modes):
        raise CheckpointError(f"{_FILE}: interpolations {modes} are not supported; valid: bicubic for every tower")
    sizes = preprocessor.get("input_sizes") or [step.get("size") for step in steps]
    if not sizes:
        raise CheckpointError(f"{_FILE}: 'input_sizes' and 'tvf_resize_params' are missing; one must give the size")
    sides = {side for size in sizes for side in (size[-2:] if isinstance(size, list | tuple) else [size])}
    side = sides.pop()
    if sides or not isinstance(side, int) or side < 1:
        raise CheckpointError(f"{_FILE}: input sizes {sizes} are not valid; valid: one square size for every tower")
    return side
