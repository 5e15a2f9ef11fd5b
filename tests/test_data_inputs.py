"""What is predicted on: found, read as training reads it, and named apart."""

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from PIL import Image

from dk_detectron.data.inputs import (
    Video,
    distinct_names,
    find_inputs,
    read_picture,
    read_pictures,
)


def noise(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], []),
        (["a/x.png", "a/y.png"], ["x", "y"]),
        (["a/x.png", "b/x.png", "b/y.png"], ["a_x", "b_x", "y"]),
        (["a/x.png", "a/x.jpg"], ["x_png", "x_jpg"]),
        (["a/x.png", "b/X.png"], ["a_x", "b_X"]),
        (["x.1.png", "x.2.png"], ["x.1", "x.2"]),
        (["/data/val/1.png", "/data/train/1.png"], ["val_1", "train_1"]),
        # What tells two apart is the name of a third: numbers, as a last resort.
        (["a/b/x.png", "a_b/x.png"], ["0_x", "1_x"]),
        (["x.png", "x.png"], ["0_x", "1_x"]),
        (["a" * 250 + ".png", "b.png"], ["0_" + "a" * 40, "1_b"]),
    ],
)
def test_names_are_short_and_distinct(paths, names):
    assert distinct_names(paths) == names
    assert len({name.casefold() for name in names}) == len(paths)


def test_folders_are_searched_but_for_what_is_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = "a/2.png a/1.JPG a/deep/3.webp a/._1.JPG a/.cache/4.png a/notes.txt a/out/5.png b.mp4 c"
    for name in files.split():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = find_inputs(
        ["c", "a", "b.mp4", "a/2.png", "0", "gone.png"], leave_out=tmp_path / "a/out"
    )
    assert found.pictures == ["c", "a/1.JPG", "a/2.png", "a/deep/3.webp", "gone.png"]
    assert found.videos == ["b.mp4", "0"]
    assert found.others == ["a/notes.txt"] and not found.faults
    (tmp_path / "0").touch()
    assert find_inputs(["0"], leave_out=tmp_path).pictures == ["0"]


def test_links_to_folders_are_followed_and_none_in_a_circle(tmp_path):
    for name in "inputs/x.png", "elsewhere/y.png", "elsewhere/notes.gif", "out/z.png":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = tmp_path / "inputs"
    (folder / "link").symlink_to("../elsewhere")
    (folder / "out").symlink_to("../out")
    (folder / "self").symlink_to(".")
    (tmp_path / "elsewhere" / "back").symlink_to("../inputs")
    found = find_inputs([str(folder)], leave_out=tmp_path / "out")
    assert found.pictures == [f"{folder}/x.png", f"{folder}/link/y.png"]
    assert found.others == [f"{folder}/link/notes.gif"] and not found.faults


def test_nothing_to_predict_on_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="INPUT: expected pictures .* got none but 1 other file"):
        find_inputs([str(tmp_path)], leave_out=tmp_path / "out")
    with pytest.raises(ValueError, match="INPUT: expected pictures .* in gone.png, gone.mp4, got"):
        find_inputs(["gone.png", "gone.mp4"], leave_out=tmp_path / "out")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "1"])
def test_pictures_are_read_as_training_reads_them(mode, tmp_path):
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    Image.fromarray(noise()).convert(mode).save(path)
    picture = read_picture(path)
    assert (picture == read_image(str(path), "BGR")).all()
    assert picture.flags.c_contiguous and picture.shape == (40, 60, 3)


def test_exif_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by 90° to the right when it is shown
    Image.fromarray(noise()).save(tmp_path / "x.png", exif=exif)
    assert (read_picture(tmp_path / "x.png") == np.rot90(noise(), -1)[:, :, ::-1]).all()


def test_what_would_be_read_wrongly_is_refused_by_name(tmp_path):
    whole = cv2.imencode(".jpg", noise(200, 300))[1].tobytes()
    damaged = bytearray(whole)
    middle = len(whole) // 2
    damaged[middle : middle + 200] = bytes(200)
    contents = {
        "whole.jpg": whole,
        "cut.jpg": whole[:middle],
        "damaged.jpg": bytes(damaged),
        "zeros.jpg": whole[:middle] + bytes(middle),
        "page.png": b"<html>",
        "empty.png": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(noise()[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray(noise()).save(tmp_path / "turned.tif", tiffinfo={0x0112: 3})
    faults = {
        "cut.jpg": "unreadable image",
        "damaged.jpg": "image that is damaged inside",
        "zeros.jpg": "image that is not whole",
        "page.png": "unreadable image, of no format that Pillow knows",
        "empty.png": "unreadable image, of no format that Pillow knows",
        "sixteen.png": "image of 16 bits",
        "turned.tif": "TIFF with an orientation",
        "gone.png": "missing image",
    }
    paths = [str(tmp_path / name) for name in ("whole.jpg", *faults)]
    picture, *found = read_pictures(paths)
    assert (picture == read_image(paths[0], "BGR")).all()
    for path, text, fault in zip(paths[1:], found, faults.values(), strict=True):
        assert text.startswith(f"{path}: {fault}")
    with pytest.raises(ValueError, match="sixteen.png: image of 16 bits"):
        read_picture(tmp_path / "sixteen.png")


def write_video(path, frames) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 40))
    for frame in frames:
        writer.write(frame)
    writer.release()


GREYS = [np.full((40, 60, 3), 20 * k, np.uint8) for k in range(5)]


def test_videos_are_read_frame_by_frame(tmp_path):
    write_video(tmp_path / "x.avi", GREYS)
    video = Video(str(tmp_path / "x.avi"))
    assert (video.frames_per_second, video.announced, video.is_live) == (10, 5, False)
    # MJPEG gives a grey of its own to within two levels.
    assert [round(frame.mean() / 20) for frame in video] == [0, 1, 2, 3, 4]
    assert video.fault is None


def test_a_video_that_breaks_off_is_named(tmp_path):
    path = tmp_path / "x.avi"
    write_video(path, [noise()] * 20)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    video = Video(str(path))
    assert 0 < len(list(video)) < 19
    assert video.fault and f"{path}: video of which {video.count} of 20 frames" in video.fault
    (tmp_path / "y.mp4").write_text("no video")
    with pytest.raises(ValueError, match="y.mp4: video that cannot be opened"):
        Video(str(tmp_path / "y.mp4"))


def test_a_stopped_video_ends(tmp_path):
    write_video(tmp_path / "x.avi", GREYS)
    video = Video(str(tmp_path / "x.avi"))
    for _ in video:
        video.stop()
    assert video.count == 1


@pytest.mark.parametrize(("count", "whole"), [(94, False), (95, True), (100, True)])
def test_of_the_announced_frames_nearly_all_are_to_come(count, whole, tmp_path):
    write_video(tmp_path / "x.avi", GREYS)
    video = Video(str(tmp_path / "x.avi"))
    video.announced, video.count = 100, count
    assert (video.fault is None) == whole
