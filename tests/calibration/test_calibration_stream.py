"""A stream gives back what was written, in memory and in a file alike."""

from __future__ import annotations

import pytest
import torch

from bitwright.calibration import stream as module
from bitwright.calibration.stream import Stream

SHAPE = (5, 7, 3)


@pytest.fixture(params=[None, 0], ids=["memory", "file"])
def stream(request, tmp_path):
    with Stream(SHAPE, 2, request.param, tmp_path) as made:
        assert made.spilled == (request.param == 0)
        yield made


def fill(stream, seed=0):
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    for index, part in enumerate(values.split(stream.batch)):
        stream.write(index, part)
    return values


def test_batches_come_back_in_order(stream):
    values = fill(stream)
    assert [len(batch) for batch in stream] == [2, 2, 1]
    assert len(stream) == 3
    assert torch.equal(torch.cat(list(stream)), values)
    assert torch.equal(stream.read(1), values[2:4])
    assert stream.bytes == values.nbytes


def test_batches_are_replaced_while_they_are_looked_at(stream):
    values = fill(stream)
    for index, batch in enumerate(stream):
        stream.write(index, 2 * batch + index)
    assert torch.equal(torch.cat(list(stream)), 2 * values + torch.tensor([0, 0, 1, 1, 2])[:, None, None])


def test_what_is_written_is_float32_without_gradients(stream):
    value = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    stream.write(0, value)
    found = stream.read(0)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    assert torch.equal(found, value.detach().float())
    stream.write(0, value.detach().float().transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(stream.read(0), found)


def test_a_copy_is_independent(stream):
    values = fill(stream)
    with stream.copy() as other:
        assert other.spilled == stream.spilled
        other.write(0, torch.zeros(2, 7, 3))
        assert torch.equal(torch.cat(list(stream)), values)
        assert torch.equal(other.read(2), values[4:])


def test_misuse_is_refused(stream):
    with pytest.raises(ValueError, match="batch 1 of the stream was read before it was written"):
        stream.read(1)
    with pytest.raises(ValueError, match=r"batch 2 of the stream: got \[2, 7, 3\], needed \[1, 7, 3\]"):
        stream.write(2, torch.zeros(2, 7, 3))
    fill(stream)
    stream.close()
    with pytest.raises(ValueError, match="before it was written"):
        stream.read(0)


def test_the_file_has_no_name_and_a_missing_folder_is_an_error(tmp_path):
    with Stream(SHAPE, 2, 0, tmp_path) as stream:
        fill(stream)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        Stream(SHAPE, 2, 0, tmp_path / "none")


def test_a_file_cut_short_is_an_error(tmp_path):
    with Stream(SHAPE, 2, 0, tmp_path) as stream:
        fill(stream)
        stream._file.truncate(10)
        with pytest.raises(OSError, match="shorter than what was written"):
            stream.read(0)


@pytest.mark.parametrize(("available", "spilled"), [(4 * 420, False), (4 * 420 - 4, True), (None, False)])
def test_the_bound_is_a_quarter_of_the_available_memory(monkeypatch, tmp_path, available, spilled):
    monkeypatch.setattr(module, "available_memory_bytes", lambda: available)
    with Stream(SHAPE, 2, folder=tmp_path) as stream:
        assert stream.bytes == 420
        assert stream.spilled is spilled
