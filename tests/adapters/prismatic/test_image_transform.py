"""Images on their way to the towers: geometry against plain numpy, constants, and every refusal."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenprune.engine.observations import check_image
from tokenprune.errors import CheckpointError, ConfigError, ObservationError
from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform

RELEASE = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 224, 224], [3, 224, 224]],
    "interpolations": ["bicubic", "bicubic"],
    "tvf_normalize_params": [
        {
            "inplace": False,
            "mean": [0.484375, 0.455078125, 0.40625],
            "std": [0.228515625, 0.2236328125, 0.224609375],
        },
        {"inplace": False, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    ],
    "tvf_resize_params": [
        {"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]},
        {"antialias": True, "interpolation": 3, "max_size": None, "size": [224, 224]},
    ],
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def crop_and_resize(image: np.ndarray, area: float) -> np.ndarray:
    """The centre crop by its definition, one output pixel at a time, as real numbers in 0..255."""
    size = image.shape[0]
    side = math.sqrt(area)
    out = np.empty(image.shape, dtype=np.float64)

    def source(i: int) -> float:
        return ((1 - side) / 2 + side * i / (size - 1)) * (size - 1)

    for row in range(size):
        y = source(row)
        top, bottom, v = math.floor(y), math.ceil(y), y - math.floor(y)
        for col in range(size):
            x = source(col)
            left, right, u = math.floor(x), math.ceil(x), x - math.floor(x)
            upper = image[top, left] * (1 - u) + image[top, right] * u
            lower = image[bottom, left] * (1 - u) + image[bottom, right] * u
            out[row, col] = upper * (1 - v) + lower * v
    return out


def to_uint8(image: np.ndarray) -> np.ndarray:
    """TensorFlow's conversion of [0, 1] to uint8: scale by 255.5 and truncate."""
    return np.minimum(image / 255 * 255.5, 255).astype(np.uint8)


def channels_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("area", [0.9, 0.5])
def test_center_crop_is_crop_and_resize(area):
    image = noise(64, 64)
    ours = channels_last(ImageTransform(size=64, center_crop_area=area).cropped(image)).astype(int)
    expected = to_uint8(crop_and_resize(image, area)).astype(int)
    assert abs(ours - expected).max() <= 1
    assert (ours != expected).mean() < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image: np.asarray(Image.fromarray(image[1:62, 1:62]).resize((64, 64), Image.Resampling.BILINEAR)),
        lambda image: to_uint8(crop_and_resize(image, 0.9**2)),
        lambda image: crop_and_resize(image, 0.9).round().astype(np.uint8),
    ],
    ids=["whole pixels", "side instead of area", "rounded to nearest"],
)
def test_other_crops_would_show(wrong):
    image = noise(64, 64)
    ours = channels_last(ImageTransform(size=64, center_crop_area=0.9).cropped(image))
    assert (ours != wrong(image)).mean() > 0.1


def test_crop_of_everything_is_no_crop():
    image = noise(64, 64)
    for area in (1.0, 1.0 - 2**-24):
        assert np.array_equal(channels_last(ImageTransform(size=64, center_crop_area=area).cropped(image)), image)


@pytest.mark.parametrize("area", [0.0, -0.5, 1.1, 90, math.nan])
def test_crop_area_is_a_share(area):
    with pytest.raises(ConfigError, match=r"center_crop_area is .*; valid: above 0 and up to 1"):
        ImageTransform(center_crop_area=area)


def test_center_crop_has_no_shift():
    image = noise(64, 64)
    transform = ImageTransform(size=64, center_crop_area=0.9)
    flipped = transform.cropped(np.ascontiguousarray(image[::-1, ::-1])).flip(1, 2)
    difference = (transform.cropped(image).int() - flipped.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-2


@given(level=st.integers(0, 255), height=st.integers(64, 150), width=st.integers(64, 150))
@settings(max_examples=30, deadline=None)
def test_flat_image_keeps_its_level(level, height, width):
    transform = ImageTransform(size=56, center_crop_area=0.9)
    pixels = transform.cropped(np.full((height, width, 3), level, dtype=np.uint8))
    assert pixels.shape == (3, 56, 56)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert (pixels == level).all()


def test_image_of_the_right_size_is_not_resampled():
    image = noise(224, 224)
    assert np.array_equal(channels_last(ImageTransform().cropped(image)), image)


def test_view_of_a_larger_array_is_read_as_it_is_seen():
    image = noise(224, 448)[:, ::-2]
    assert np.array_equal(channels_last(ImageTransform().cropped(image)), image)


def test_resize_naive_squashes_bicubically():
    image = noise(90, 160)
    expected = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.array_equal(channels_last(ImageTransform(size=64).cropped(image)), expected)


def test_resize_is_antialiased():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = ImageTransform(size=64).cropped(stripes)[:, :, 4:-4]
    assert (pixels.int() - 127).abs().max() <= 4


def test_resize_crop_keeps_the_middle_square():
    image = noise(64, 128)
    pixels = channels_last(ImageTransform(size=64, resize="resize-crop").cropped(image))
    assert np.array_equal(pixels, image[:, 32:96])

    scaled = np.asarray(Image.fromarray(noise(100, 150)).resize((96, 64), Image.Resampling.BICUBIC))
    pixels = channels_last(ImageTransform(size=64, resize="resize-crop").cropped(noise(100, 150)))
    assert np.array_equal(pixels, scaled[:, 16:80])


def test_letterbox_pads_symmetrically_with_the_mean_of_the_last_tower():
    transform = ImageTransform(size=128, resize="letterbox", means=((0.0,) * 3, (0.5, 0.25, 0.75)))
    image = noise(64, 128)
    pixels = channels_last(transform.cropped(image))
    assert np.array_equal(pixels[32:96], image)
    assert (pixels[:32] == (127, 63, 191)).all()
    assert (pixels[96:] == (127, 63, 191)).all()

    tall = channels_last(transform.cropped(np.ascontiguousarray(image.transpose(1, 0, 2))))
    assert np.array_equal(tall, pixels.transpose(1, 0, 2))


def test_letterbox_takes_an_odd_difference():
    pixels = ImageTransform(size=64, resize="letterbox").cropped(noise(65, 90))
    assert pixels.shape == (3, 64, 64)


def test_strategies_agree_on_a_square_and_differ_on_a_wide_image():
    def pixels(image: np.ndarray) -> list[torch.Tensor]:
        return [
            ImageTransform(64, strategy).cropped(image) for strategy in ("resize-naive", "letterbox", "resize-crop")
        ]

    naive, letterbox, crop = pixels(noise(100, 100))
    assert torch.equal(naive, letterbox)
    assert torch.equal(naive, crop)
    naive, letterbox, crop = pixels(noise(64, 128))
    assert not torch.equal(naive, letterbox)
    assert not torch.equal(naive, crop)
    assert not torch.equal(letterbox, crop)


@pytest.mark.parametrize("tower", [0, 1])
def test_normalise_is_the_definition_in_float32(tower):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    params = RELEASE["tvf_normalize_params"][tower]
    out = ImageTransform().normalise(pixels, tower, torch.float32)
    assert out.dtype == torch.float32
    for channel in range(3):
        expected = (np.arange(256) / 255 - params["mean"][channel]) / params["std"][channel]
        np.testing.assert_allclose(out[1, channel, 0].numpy(), expected, atol=1e-6)


def test_normalise_rounds_only_at_the_end():
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    transform = ImageTransform()
    exact = transform.normalise(pixels, 0, torch.float32)
    half = transform.normalise(pixels, 0, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("elsewhere", [FakeTensorMode, partial(torch.device, "meta")])
def test_normalise_copies_nothing_from_the_host_and_keeps_nothing(elsewhere):
    transform = ImageTransform(means=((0.1, 0.2, 0.3),), stds=((0.4, 0.5, 0.6),))
    with elsewhere():
        pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        shadow = transform.normalise(pixels, 0, torch.float32)
    assert (shadow.shape, shadow.device) == (pixels.shape, pixels.device)
    real = transform.normalise(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0, torch.float32)
    torch.testing.assert_close(real[0, :, 0, 0], torch.tensor([-0.25, -0.4, -0.5]))


def test_dino_constants_are_imagenet_in_bfloat16():
    transform = ImageTransform()
    for ours, digits in ((transform.means[0], (0.485, 0.456, 0.406)), (transform.stds[0], (0.229, 0.224, 0.225))):
        assert ours == tuple(torch.tensor(digits).bfloat16().tolist())


def test_release_file_gives_the_default_transform():
    assert ImageTransform.from_release(RELEASE) == ImageTransform()
    assert ImageTransform.from_release(RELEASE, center_crop_area=0.9) == ImageTransform(center_crop_area=0.9)


def test_towers_keep_the_order_of_the_file():
    swapped = {**RELEASE, "tvf_normalize_params": RELEASE["tvf_normalize_params"][::-1]}
    assert ImageTransform.from_release(swapped).means == ((0.5, 0.5, 0.5), (0.484375, 0.455078125, 0.40625))


def test_strategy_may_stand_in_the_model_config():
    rest = {name: value for name, value in RELEASE.items() if name != "image_resize_strategy"}
    assert ImageTransform.from_release(rest, {"image_resize_strategy": "letterbox"}).resize == "letterbox"
    assert ImageTransform.from_release(RELEASE, {"image_resize_strategy": "letterbox"}).resize == "resize-naive"


@pytest.mark.parametrize("size", [96, [96, 96]])
def test_size_may_stand_in_the_resize_step(size):
    rest = {name: value for name, value in RELEASE.items() if name != "input_sizes"}
    rest["tvf_resize_params"] = [{"size": size}] * 2
    assert ImageTransform.from_release(rest).size == 96


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_resize_strategy": None}, "'image_resize_strategy' is missing; it has: input_sizes"),
        ({"image_resize_strategy": "resize-naiv"}, "'resize-naiv'; did you mean 'resize-naive'"),
        ({"tvf_normalize_params": None}, "'tvf_normalize_params' is missing"),
        ({"tvf_normalize_params": {}}, "one entry per tower"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3}]}, r"\[0\] has std None; valid: three numbers"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 2, "std": [0.5] * 3}]}, r"\[0\] has mean"),
        ({"tvf_normalize_params": [{"mean": [math.nan] * 3, "std": [0.5] * 3}]}, r"\[0\] has mean"),
        ({"tvf_normalize_params": [{"mean": ["a"] * 3, "std": [0.5] * 3}]}, r"\[0\] has mean"),
        ({"tvf_normalize_params": ["0.5"]}, r"\[0\] has mean None"),
        ({"tvf_normalize_params": [{"mean": [0.5] * 3, "std": [0.0] * 3}]}, "positive"),
        ({"input_sizes": None, "tvf_resize_params": None}, "'input_sizes' and 'tvf_resize_params' are missing"),
        ({"input_sizes": [[3, 224, 224], [3, 384, 384]]}, "one square size for every tower"),
        ({"input_sizes": [[3, 224, 384]]}, "one square size for every tower"),
        ({"input_sizes": [[3, "224", "224"]]}, "one square size for every tower"),
        ({"interpolations": ["bilinear", "bicubic"]}, "bilinear.*valid: bicubic"),
        ({"tvf_resize_params": [{"size": 224, "interpolation": 2}]}, "valid: bicubic"),
    ],
)
def test_release_files_that_cannot_be_followed_are_refused(change, message):
    changed = {name: value for name, value in {**RELEASE, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        ImageTransform.from_release(changed)


@given(height=st.sampled_from([64, 65, 480, 4096]), width=st.sampled_from([64, 224, 4096]))
@settings(max_examples=12, deadline=None)
def test_camera_frames_pass_unchanged(height, width):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    assert check_image("primary", image) is image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "is a NoneType; valid: a numpy array"),
        ([[0]], "is a list; valid"),
        (torch.zeros(64, 64, 3), r"is a torch\.Tensor; valid"),
        (np.zeros((64, 64, 3)), r"is float64 with shape \[64, 64, 3\]; convert \[0, 1\] with \(255 \* image\)"),
        (np.zeros((64, 64, 3), dtype=np.int64), "is int64.*convert to 0..255 uint8"),
        (np.zeros((64, 64), dtype=np.uint8), r"with shape \[64, 64\]; give height, width and three channels"),
        (np.zeros((1, 64, 64, 3), dtype=np.uint8), r"with shape \[1, 64, 64, 3\]; give one frame, not a batch"),
        (np.zeros((3, 64, 64), dtype=np.uint8), r"channels come first, transpose to \[H, W, 3\]"),
        (np.zeros((64, 64, 4), dtype=np.uint8), "three channels are needed"),
        (np.zeros((63, 64, 3), dtype=np.uint8), r"with shape \[63, 64, 3\]; valid: .* sides from 64 to 4096"),
        (np.zeros((64, 4097, 3), dtype=np.uint8), r"with shape \[64, 4097, 3\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_everything_else_is_refused_by_name(image, message):
    with pytest.raises(ObservationError, match=f"^image 'wrist' {message}|^image 'wrist' .*{message}"):
        check_image("wrist", image)
