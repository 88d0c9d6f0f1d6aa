"""Frames cropped on a device: Pillow's bytes, whatever the size, and no wait for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from tokenprune.testing.waiting import refusing
from tokenprune_adapters.backbones.pi0.image_transform import ResizePad
from tokenprune_adapters.backbones.prismatic import image_transform as preprocess
from tokenprune_adapters.backbones.prismatic.image_transform import ImageTransform
from tokenprune_adapters.inputs import observations, resample
from tokenprune_adapters.inputs.observations import crops_on_device, upload_frames

CPU = torch.device("cpu")
SIDES = st.one_of(st.sampled_from([64, 224, 256]), st.integers(64, 400))
KINDS = ("resize-naive", "letterbox", "resize-crop")

TRANSFORMS = [
    *(ImageTransform(224, kind, area) for kind in KINDS for area in (None, 0.9)),
    ImageTransform(65, "letterbox", 0.5),
    ResizePad(224),
    ResizePad(65),
]

NAMES = [
    f"{getattr(one, 'resize', 'resize-pad')}-{one.size}-{getattr(one, 'center_crop_area', None)}" for one in TRANSFORMS
]


def picture(height: int, width: int, kind: str, seed: int = 0) -> np.ndarray:
    """Noise in all levels or in the two extremes alone, where bicubic weights overshoot, or one level everywhere."""
    rng = np.random.default_rng(seed)
    levels = {"noise": range(256), "extremes": (0, 255), "black": (0,), "white": (255,)}[kind]
    return rng.choice(np.array(levels, np.uint8), (height, width, 3))


PICTURES = st.builds(picture, SIDES, SIDES, st.sampled_from(["noise", "extremes", "black", "white"]), st.integers(0, 9))


def resized(image: np.ndarray, width: int, height: int, kernel: Resampling) -> np.ndarray:
    batch = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    return resample.resample(batch, width, height, kernel)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kernel", [Resampling.BILINEAR, Resampling.BICUBIC])
@given(image=PICTURES, width=SIDES, height=SIDES)
# Rows go before columns, just do not, and must not count where there are none to leave out.
@example(image=picture(301, 250, "noise"), width=225, height=250)
@example(image=picture(300, 250, "noise"), width=225, height=250)
@example(image=picture(64, 400, "noise"), width=64, height=64)
@example(image=picture(400, 64, "noise"), width=64, height=64)
@example(image=picture(100, 64, "extremes"), width=400, height=120)
@settings(max_examples=40, deadline=None)
def test_resampling_is_pillows_to_the_bit(image: np.ndarray, width: int, height: int, kernel: Resampling) -> None:
    expected = Image.fromarray(image).resize((width, height), kernel)
    assert np.array_equal(resized(image, width, height, kernel), np.asarray(expected))


@pytest.mark.parametrize("kernel", [Resampling.BILINEAR, Resampling.BICUBIC])
def test_a_large_frame_has_weights_as_exact(kernel: Resampling) -> None:
    image = picture(64, 4096, "noise")
    assert np.array_equal(resized(image, 224, 64, kernel), np.asarray(Image.fromarray(image).resize((224, 64), kernel)))


def test_before_13_pillow_always_began_with_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resample, "_ROWS_MAY_GO_FIRST", False)
    image = picture(400, 200, "noise")
    passes = Image.fromarray(image).resize((224, 400), Resampling.BICUBIC).resize((224, 224), Resampling.BICUBIC)
    assert np.array_equal(resized(image, 224, 224, Resampling.BICUBIC), np.asarray(passes))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=NAMES)
@given(image=PICTURES)
@example(image=picture(224, 224, "noise"))
@example(image=picture(65, 90, "extremes"))
@example(image=picture(400, 64, "extremes"))
@example(image=picture(64, 400, "extremes"))
@settings(max_examples=12, deadline=None)
def test_a_device_crops_as_the_host_does(transform: ImageTransform | ResizePad, image: np.ndarray) -> None:
    frames = np.stack([image, image[::-1, ::-1]])
    got = transform.cropped_on_device(torch.from_numpy(frames))
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert torch.equal(got, torch.stack([transform.cropped(frame) for frame in frames]))


@pytest.mark.parametrize("area", [0.9, 0.5, 1.0])
def test_every_level_is_cropped_as_on_the_host(area: float) -> None:
    """Neighbours of all 256 x 256 kinds, which is where a last bit could tip a level."""
    first, second = np.divmod(np.arange(256 * 256, dtype=np.int64), 256)
    columns = np.stack([first, second], -1).reshape(1, 2048, 64).astype(np.uint8)
    for rows in columns.reshape(-1, 1, 64, 64):
        square = np.broadcast_to(rows, (3, 64, 64))
        expected = preprocess._center_crop(square, area)
        got = preprocess._center_crop_on_device(torch.from_numpy(square.copy())[None], area)
        assert np.array_equal(got[0].numpy(), expected)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=NAMES)
@pytest.mark.parametrize("size", [(240, 320), (320, 240), (224, 224)])
def test_cropping_does_not_wait_for_the_device(transform: ImageTransform | ResizePad, size: tuple[int, int]) -> None:
    frames = torch.from_numpy(np.stack([picture(*size, "noise", seed) for seed in range(2)]))
    before = transform.cropped_on_device(frames)
    with refusing():
        got = transform.cropped_on_device(frames)
    assert torch.equal(got, before)


def test_weights_and_taps_are_uploaded_once_per_size() -> None:
    caches = (resample._weights, preprocess._uploaded_taps)
    for cache in caches:
        cache.cache_clear()
    for height in (320, 320, 300):
        ImageTransform(center_crop_area=0.9).cropped_on_device(torch.zeros(1, height, 240, 3, dtype=torch.uint8))
    assert [cache.cache_info().misses for cache in caches] == [3, 1]


def frames(*sizes: tuple[int, int]) -> Mapping[str, np.ndarray]:
    views = ("primary", "wrist", "left")
    return {view: picture(*size, "noise", seed) for seed, (view, size) in enumerate(zip(views, sizes, strict=False))}


class Watched(ImageTransform):
    """Notes the shape of every batch it crops."""

    def cropped_on_device(self, frames: Tensor) -> Tensor:
        self.__dict__.setdefault("batches", []).append(tuple(frames.shape))
        return super().cropped_on_device(frames)


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        ([frames((80, 90), (80, 90))], [(2, 80, 90, 3)]),
        ([frames((80, 90), (80, 90))] * 3, [(6, 80, 90, 3)]),
        ([frames((80, 90), (80, 64))] * 2, [(2, 80, 90, 3), (2, 80, 64, 3)]),
        (
            [frames((80, 90), (64, 64), (80, 90)), frames((64, 64), (90, 80), (80, 90))],
            [(3, 80, 90, 3), (2, 64, 64, 3), (1, 90, 80, 3)],
        ),
    ],
)
def test_frames_of_one_size_go_up_together_and_each_comes_back_in_its_place(
    given: Sequence[Mapping[str, np.ndarray]], batches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    views, transform = tuple(given[0]), Watched(56, "letterbox", 0.9)
    expected = upload_frames(given, views, transform, CPU)
    assert "batches" not in transform.__dict__
    monkeypatch.setattr(observations, "crops_on_device", lambda device: True)
    got = upload_frames(given, views, transform, CPU)
    assert transform.__dict__["batches"] == batches
    assert list(got) == list(expected) == list(views)
    assert all(torch.equal(got[view], expected[view]) for view in views)
    assert all(got[view].shape == (len(given), 3, 56, 56) for view in views)


@pytest.mark.parametrize("spoil", [lambda image: image[::-1, ::-1], partial(np.transpose, axes=(1, 0, 2))])
def test_frames_may_be_views_that_nobody_may_write_to(spoil: object, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {view: spoil(image) for view, image in frames((80, 90), (80, 90)).items()}
    for image in given.values():
        image.setflags(write=False)
    expected = upload_frames([given], tuple(given), ResizePad(56), CPU)
    monkeypatch.setattr(observations, "crops_on_device", lambda device: True)
    got = upload_frames([given], tuple(given), ResizePad(56), CPU)
    assert all(torch.equal(got[view], expected[view]) for view in given)


def test_only_a_gpu_crops_for_itself() -> None:
    assert [crops_on_device(torch.device(kind)) for kind in ("cuda", "cuda:1", "cpu", "mps")] == [
        True,
        True,
        False,
        False,
    ]
