"""Image preprocessing: from a camera frame to cropped pixels, and from those to each tower's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from tokenprune.errors import CheckpointError, ConfigError, nearest
from tokenprune_adapters.inputs.resample import resample

Triple = tuple[float, float, float]
Resize = Literal["resize-naive", "letterbox", "resize-crop"]

# The releases hold ImageNet's constants rounded to bfloat16, not the usual three digits.
DINO_MEAN: Triple = (0.484375, 0.455078125, 0.40625)
DINO_STD: Triple = (0.228515625, 0.2236328125, 0.224609375)
SIGLIP_MEAN: Triple = (0.5, 0.5, 0.5)
SIGLIP_STD: Triple = (0.5, 0.5, 0.5)
CENTER_CROP_AREA = 0.9
"""Share of the area kept by fine-tunes that were trained with random crops, such as LIBERO's."""

_BICUBIC = (int(Image.Resampling.BICUBIC), "bicubic")
_FILE = "preprocessor_config.json"


class _Geometry(NamedTuple):
    """Padding on both ends (left, top), size after resizing, and corner (x, y) of the square cut out; in pixels."""

    left: int
    top: int
    width: int
    height: int
    x: int
    y: int


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
        stds: Standard deviation per channel, one triple per tower.

    Raises:
        ConfigError: If `center_crop_area` is not above 0 and up to 1.
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
            CheckpointError: If a field is missing or malformed, or asks for a step that is not supported.
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
        frame, size = Image.fromarray(image), self.size
        left, top, width, height, x, y = self._geometry(*frame.size)
        if left or top:
            padded = Image.new("RGB", (frame.width + 2 * left, frame.height + 2 * top), self._padding)
            padded.paste(frame, (left, top))
            frame = padded
        resized = np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC))
        pixels = resized[y : y + size, x : x + size].transpose(2, 0, 1)
        if self.center_crop_area is not None:
            pixels = _center_crop(pixels, self.center_crop_area)
        return torch.from_numpy(np.array(pixels, order="C"))

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        """Do what `cropped` does, bit for bit, for a batch on its device and without waiting for the device.

        Args:
            frames: `[B, H, W, 3]` uint8 RGB.

        Returns:
            `[B, 3, S, S]` uint8.
        """
        pixels, size = frames.permute(0, 3, 1, 2), self.size
        left, top, width, height, x, y = self._geometry(pixels.shape[3], pixels.shape[2])
        if left or top:
            # One number per channel, because a tensor of them would have to be copied, which waits for the device.
            channels = zip(pixels.unbind(1), self._padding, strict=True)
            pixels = torch.stack([pad(channel, (left, left, top, top), value=level) for channel, level in channels], 1)
        resized = resample(pixels, width, height, Image.Resampling.BICUBIC)
        pixels = resized[..., y : y + size, x : x + size]
        if self.center_crop_area is not None:
            pixels = _center_crop_on_device(pixels, self.center_crop_area)
        return pixels.contiguous()

    def _geometry(self, width: int, height: int) -> _Geometry:
        """Sizes and offsets of the steps for a frame of this size."""
        left = top = 0
        if self.resize == "letterbox":
            # Both ends of the shorter side; an odd difference leaves one pixel for the crop, like upstream's.
            longer = max(width, height)
            left, top = (longer - width) // 2, (longer - height) // 2
            width, height = width + 2 * left, height + 2 * top
        shorter = min(width, height)
        if self.resize == "resize-naive":
            width = height = self.size
        else:
            width, height = (self.size * side // shorter for side in (width, height))
        return _Geometry(left, top, width, height, round((width - self.size) / 2), round((height - self.size) / 2))

    @property
    def _padding(self) -> tuple[int, int, int]:
        """The mean colour of the last tower."""
        red, green, blue = (int(255 * mean) for mean in self.means[-1])
        return red, green, blue

    def normalise(self, pixels: Tensor, tower: int, dtype: torch.dtype) -> Tensor:
        """Normalise a batch for one tower, on its device and without waiting for the device.

        Args:
            pixels: `[B, 3, S, S]` uint8.
            tower: Index of the tower, in the order of `means`.
            dtype: Type of the result; the arithmetic is float32.

        Returns:
            `[B, 3, S, S]`.
        """
        # Numbers and not tensors: a constant on the host would have to be copied, which waits for the device.
        constants = zip((pixels.float() / 255).unbind(1), self.means[tower], self.stds[tower], strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in constants], dim=1).to(dtype)


def _center_crop(pixels: npt.NDArray[np.uint8], area: float) -> npt.NDArray[np.uint8]:
    """Crop the central `area` of `[3, S, S]` and scale it back, bilinear with aligned corners.

    In numpy, because torch's thread pool is slow for an image this small when other processes keep the cores busy.
    """
    low, high, weight = _crop_taps(pixels.shape[-1], area)
    image = pixels.astype(np.float32) / np.float32(255)
    for axis, along in ((2, weight), (1, weight[:, None])):
        first = image.take(low, axis)
        image = first + (image.take(high, axis) - first) * along
    # Upstream's conversion back to uint8 scales by 255.5 and truncates; it does not round to nearest.
    return (image * np.float32(255.5)).astype(np.uint8)


def _center_crop_on_device(pixels: Tensor, area: float) -> Tensor:
    """`_center_crop` of `[B, 3, S, S]`: the same operations in the same order, none fused with the next."""
    low, high, weight = _uploaded_taps(pixels.shape[-1], area, pixels.device)
    # A tensor, because a GPU divides by a number by multiplying with its inverse, and the last bit can differ.
    image = pixels.float() / torch.full((), 255.0, device=pixels.device)
    for axis, along in ((3, weight), (2, weight[:, None])):
        first = image.index_select(axis, low)
        image = first + (image.index_select(axis, high) - first) * along
    return (image * 255.5).to(torch.uint8)


@lru_cache(maxsize=8)
def _uploaded_taps(size: int, area: float, device: torch.device) -> tuple[Tensor, ...]:  # cold: once per transform
    return tuple(torch.from_numpy(taps).to(device) for taps in _crop_taps(size, area))


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
