"""pi0's images: geometry and interpolation against loops, black padding, the range of the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenprune_adapters.backbones.pi0.image_transform import ResizePad


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def channels_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def filled(pixels: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row and column that are not black."""
    rows, cols = (np.flatnonzero(channels_last(pixels).max(axis=(2, other))) for other in (1, 0))
    return rows[0], rows[-1], cols[0], cols[-1]


def bilinear(line: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis by a tent filter as wide as a source step or an output step, whichever is wider."""
    step = len(line) / size
    reach = max(step, 1.0)
    out = np.empty((size, *line.shape[1:]))
    for i in range(size):
        weights = [max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * step) / reach) for j in range(len(line))]
        out[i] = np.tensordot(np.array(weights) / sum(weights), line, axes=1)
    return out


# Height and width of the frame; first and last row and column of the picture in the 224 x 224 square. The last four
# come out a pixel short, because the exact length is missed from below in floating point.
GEOMETRY = [
    ((224, 224), (0, 223, 0, 223)),
    ((256, 256), (0, 223, 0, 223)),
    ((480, 640), (28, 195, 0, 223)),
    ((640, 480), (0, 223, 28, 195)),
    ((720, 1280), (49, 174, 0, 223)),
    ((100, 200), (56, 167, 0, 223)),
    ((64, 4096), (110, 112, 0, 223)),
    ((64, 65), (2, 221, 0, 222)),
    ((64, 72), (12, 210, 0, 222)),
    ((72, 64), (0, 222, 12, 210)),
    ((64, 165), (69, 154, 0, 222)),
]


@pytest.mark.parametrize(("frame", "picture"), GEOMETRY)
def test_the_picture_fits_and_is_centred(frame, picture):
    pixels = ResizePad().cropped(np.full((*frame, 3), 200, dtype=np.uint8))
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == torch.uint8
    top, bottom, left, right = picture
    assert filled(pixels) == picture
    assert (pixels[:, top : bottom + 1, left : right + 1] == 200).all()


@pytest.mark.parametrize("frame", [(70, 90), (90, 70), (30, 40)])
def test_interpolation_is_bilinear_and_antialiased(frame):
    image = noise(*frame)
    pixels = ResizePad(56).cropped(image)
    top, bottom, left, right = filled(pixels)
    rows = bilinear(image.astype(float), bottom - top + 1)
    expected = bilinear(rows.transpose(1, 0, 2), right - left + 1).transpose(1, 0, 2)
    got = channels_last(pixels)[top : bottom + 1, left : right + 1].astype(float)
    # Both passes round to whole levels.
    assert abs(got - expected).max() <= 1.1
    assert abs(got - expected).mean() < 0.4


def test_a_frame_of_the_right_size_is_left_alone():
    image = noise(56, 56)
    assert (channels_last(ResizePad(56).cropped(image)) == image).all()


def test_a_sliver_keeps_one_row():
    assert filled(ResizePad(56).cropped(np.full((64, 4096, 3), 200, dtype=np.uint8))) == (27, 27, 0, 55)


def test_values_span_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    got = ResizePad(16).normalise(pixels, 0, torch.float32)
    assert got.shape == (2, 3, 16, 16)
    assert got[0, 0].flatten().tolist() == pytest.approx([level / 127.5 - 1 for level in range(256)], abs=1e-6)
    assert (got.min(), got.max()) == (-1, 1)


def test_padding_becomes_minus_one():
    pixels = ResizePad(56).cropped(np.full((40, 80, 3), 255, dtype=np.uint8))[None]
    got = ResizePad(56).normalise(pixels, 0, torch.float32)
    assert (got[:, :, :14] == -1).all()
    assert (got[:, :, 14:42] == 1).all()
    assert (got[:, :, 42:] == -1).all()


def test_arithmetic_is_float32_whatever_the_result():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    exact = ResizePad(16).normalise(pixels, 0, torch.float32)
    got = ResizePad(16).normalise(pixels, 0, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, exact.to(torch.bfloat16))


def test_normalising_reads_no_value_on_the_host(monkeypatch):
    def refuse(*_):
        raise AssertionError("a value was read")

    pixels = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    assert ResizePad(56).normalise(pixels, 0, torch.bfloat16).shape == (2, 3, 56, 56)
