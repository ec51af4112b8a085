"""Videos: which frames are seen, how they are read, and that training, the processor and the model agree about them.

The videos are written here with PyAV: 24 frames at 8 per second, frame i grey with brightness about 10 i.
"""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from qwen_vl_utils.vision_process import smart_nframes
from transformers import AutoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from processing.checking import check_rows
from processing.collators import PaddedCollator
from processing.example import Example, RowError
from processing.inspection import inspect_example
from processing.length import LengthPolicy, video_tokens, with_fewer_frames, with_max_pixels
from processing.pictures import PictureLimits
from processing.processing_families import FAMILIES, load_processor
from processing.row_formats import examples_from_row
from processing.rows import read_rows
from processing.supervision import Supervision, encode
from processing.videos import open_clip

BY_FAMILY = {cls.convention.name: cls for cls in FAMILIES}


def write_video(path, num_frames=24, fps=8, height=48, width=64, codec="mpeg4"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(num_frames):
            pixels = np.full((height, width, 3), 10 * number, np.uint8)
            pixels[: height // 2, : width // 2] = 255  # a white corner, to tell how it is turned
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return str(write_video(tmp_path_factory.mktemp("videos") / "clip.mp4"))


@pytest.fixture
def make_processor(byte_processor):
    """make_processor("qwen3_vl") -> frames of 48 x 64 pixels in patches of 4 x 4, merged 2 x 2: 48 tokens per step."""

    def make(family):
        processor = byte_processor(family, cls=BY_FAMILY[family])
        if family == "qwen3_vl":
            processor.video_processor = Qwen3VLVideoProcessor(
                patch_size=4, size={"shortest_edge": 64, "longest_edge": 24 * 48 * 64}, cap_pixels_per_frame=False
            )
        else:
            processor.video_processor = Qwen2VLVideoProcessor(
                patch_size=4, size={"shortest_edge": 64, "longest_edge": 48 * 64}, cap_pixels_per_frame=False
            )
        processor.image_processor.patch_size = 4
        return processor

    return make


@pytest.fixture(params=list(BY_FAMILY))
def processor(request, make_processor):
    return make_processor(request.param)


def part(source, **options):
    return {"type": "video", "video": source, **options}


def about(*parts):
    content = [*parts, {"type": "text", "text": "What happens?"}]
    return Example([{"role": "user", "content": content}, {"role": "assistant", "content": "It brightens."}])


# Which frames


def test_the_head_of_a_file_says_how_many_frames_it_has_and_how_fast_they_are(video, tmp_path):
    clip = open_clip(part(video))
    assert (clip.num_frames, clip.frames_per_second, clip.height, clip.width) == (24, 8.0, 48, 64)
    webm = write_video(tmp_path / "clip.webm", num_frames=11, codec="libvpx")  # does not say how many frames it has
    assert open_clip(part(str(webm))).num_frames == 11


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, [0, 5, 9, 14, 18, 23]),  # 3 seconds x 2
        ({"fps": 4}, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
        ({"fps": 0.1}, [0, 8, 15, 23]),  # at least 4
        ({"fps": 4, "max_frames": 6}, [0, 5, 9, 14, 18, 23]),
        ({"nframes": 3}, [0, 8, 15, 23]),  # the nearest even number
        ({"video_start": 1.0, "video_end": 2.0}, [8, 11, 13, 16]),
    ],
)
def test_frames_are_chosen_as_qwen_vl_utils_does(video, make_processor, options, seen):
    clip = open_clip(part(video, **options))
    assert clip.frames_seen(make_processor("qwen2_vl").video_processor) == seen


def test_the_number_of_frames_is_qwen_vl_utils_own_for_any_length(make_processor):
    processor = make_processor("qwen2_vl").video_processor
    clip = open_clip(part([Image.new("RGB", (4, 4))] * 2))
    for num_frames in (2, 3, 5, 17, 100, 2000):
        for fps in (1.0, 7.5, 29.97):
            long = replace(clip, part=part("a.mp4"), num_frames=num_frames, frames_per_second=fps)
            theirs = smart_nframes({}, total_frames=num_frames, video_fps=fps)
            assert len(long.frames_seen(processor)) == theirs, (num_frames, fps)


def test_the_defaults_stand_on_the_video_processor(video, make_processor):
    video_processor = make_processor("qwen3_vl").video_processor
    video_processor.fps, video_processor.max_frames = 4, 8
    assert len(open_clip(part(video)).frames_seen(video_processor)) == 8
    assert len(open_clip(part(video, nframes=20)).frames_seen(video_processor)) == 8  # its maximum is the limit
    assert len(open_clip(part([Image.new("RGB", (4, 4))] * 11)).frames_seen(video_processor)) == 8


def test_frames_are_the_ones_that_were_chosen(video, make_processor):
    frames = open_clip(part(video, fps=4)).load(make_processor("qwen2_vl").video_processor)
    assert (frames.shape, frames.dtype) == ((12, 3, 48, 64), torch.uint8)
    brightness = frames[:, :, 40, 50].float().mean(1)
    assert torch.allclose(brightness, torch.tensor([0, 20, 40, 60, 80, 100, 130, 150, 170, 190, 210, 230.0]), atol=6)


def test_a_video_that_was_filmed_upright_is_turned_upright(tmp_path, make_processor):
    data = write_video(tmp_path / "a.mp4").read_bytes()
    # The matrix in the track's head: (1 0 0, 0 1 0, 0 0 1) becomes a quarter turn clockwise, as phones write it.
    straight = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    turned = b"".join(n.to_bytes(4, "big") for n in (0, 1 << 16, 0, 0xFFFF0000, 0, 0, 0, 0, 1 << 30))
    start = data.index(straight, data.index(b"tkhd"))
    (tmp_path / "b.mp4").write_bytes(data[:start] + turned + data[start + len(straight) :])
    clip = open_clip(part(str(tmp_path / "b.mp4")))
    frame = clip.load(make_processor("qwen2_vl").video_processor)[0, 0].float()
    assert (clip.height, clip.width) == tuple(frame.shape) == (64, 48)
    top_left, top_right, bottom_right = frame[:20, :20].mean(), frame[:20, 28:].mean(), frame[44:, 28:].mean()
    assert top_right > 200 > max(top_left, bottom_right)  # the white corner was top left


def test_frames_given_as_pictures_and_bytes_of_a_file_are_videos_too(video, tmp_path, make_processor):
    video_processor = make_processor("qwen2_vl").video_processor
    from_file = open_clip(part(video, nframes=4))
    paths = []
    for number, frame in enumerate(from_file.load(video_processor)):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(paths[-1])
    as_list = open_clip(part(paths, sample_fps=2.0))
    assert torch.equal(as_list.load(video_processor), from_file.load(video_processor))
    with open(video, "rb") as file:
        from_bytes = open_clip(part(file.read(), nframes=4))
    assert torch.equal(from_bytes.load(video_processor), from_file.load(video_processor))


# Training and use agree


@pytest.mark.parametrize("options", [{}, {"fps": 3}, {"nframes": 5}, {"video_start": 0.5, "video_end": 2.6}])
def test_training_and_inference_see_the_same_ids_and_pixels(processor, video, options):
    example = about(part(video, **options))
    encoded = encode(example, processor)
    inputs = processor.apply_chat_template(
        list(example.messages), tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt"}
    )
    assert inputs["input_ids"][0].tolist() == encoded.input_ids.tolist()
    assert inputs["mm_token_type_ids"][0].tolist() == encoded.mm_token_type_ids.tolist()
    assert set(encoded.vision) == set(inputs) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    for name, value in encoded.vision.items():
        assert torch.equal(torch.as_tensor(inputs[name]), value), name


def test_plain_autoprocessor_given_the_frames_sees_the_same(processor, video, tmp_path):
    """What somebody without this package does: process_vision_info's frames, or any others, and their metadata."""
    processor.save_pretrained(tmp_path)
    plain = AutoProcessor.from_pretrained(tmp_path)
    assert type(plain).__module__.startswith("transformers.")
    encoded = encode(about(part(video)), processor)
    clip = open_clip(part(video))
    text = plain.apply_chat_template(list(about(part(video)).messages), tokenize=False)
    inputs = plain(
        text=text,
        videos=[clip.load(processor.video_processor)],
        video_metadata=[clip.metadata(processor.video_processor)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert inputs["input_ids"][0].tolist() == encoded.input_ids.tolist()
    assert torch.equal(inputs["pixel_values_videos"], encoded.vision["pixel_values_videos"])


def test_process_vision_info_of_a_list_of_frames_has_the_same_seconds_and_size(make_processor):
    """Its frames differ by its own second resize; their number, grid and time are the same."""
    processor = make_processor("qwen2_5_vl")
    frames = [Image.new("RGB", (64, 48), (20 * i,) * 3) for i in range(6)]
    message = {"role": "user", "content": [part(frames, sample_fps=3.0)]}
    _, videos, options = process_vision_info([message], return_video_kwargs=True, return_video_metadata=True)
    (theirs, metadata) = videos[0]
    ours = open_clip(part(frames, sample_fps=3.0))
    assert ours.metadata(processor.video_processor)["frames_indices"] == metadata["frames_indices"]
    assert (ours.frames_per_second, options) == (metadata["fps"], {"do_sample_frames": False})
    assert len(ours.load(processor.video_processor)) == len(theirs) == 6


def test_qwen2_5_vl_knows_the_seconds_of_a_step_and_qwen3_vl_reads_the_time_in_the_text(make_processor, video):
    encoded = encode(about(part(video, fps=4)), make_processor("qwen2_5_vl"))
    assert encoded.vision["second_per_grid_ts"].tolist() == [0.5]  # two frames of 1/4 second
    processor = make_processor("qwen3_vl")
    encoded = encode(about(part(video, nframes=4)), processor)
    text = processor.tokenizer.decode(encoded.input_ids)
    assert "<0.5 seconds>" in text  # frames 0 and 8 of 8 per second: 0 s and 1 s
    assert "<2.4 seconds>" in text  # frames 15 and 23: 1.875 s and 2.875 s


def test_several_videos_and_pictures_keep_their_order(processor, video, tmp_path):
    short = str(write_video(tmp_path / "short.mp4", num_frames=4, height=32, width=32))
    picture = {"type": "image", "image": Image.new("RGB", (32, 24))}
    encoded = encode(about(part(short), picture, part(video)), processor)
    assert encoded.vision["video_grid_thw"].tolist() == [[2, 8, 8], [3, 12, 16]]
    assert len(encoded.vision["image_grid_thw"]) == 1
    kinds = [kind for kind in encoded.mm_token_type_ids.tolist() if kind]
    assert kinds == [2] * 2 * 16 + [1] * kinds.count(1) + [2] * 3 * 48
    batch = PaddedCollator(0)([encoded, encode(about(part(short)), processor)])
    assert batch["video_grid_thw"].tolist() == [[2, 8, 8], [3, 12, 16], [2, 8, 8]]


def test_nothing_of_a_video_is_supervised(processor, video):
    encoded = encode(about(part(video)), processor)
    assert (encoded.labels[encoded.mm_token_type_ids == 2] == -100).all()
    answer = processor.tokenizer.decode(encoded.input_ids[encoded.labels != -100])
    assert answer == "It brightens.<|im_end|>"


# Length


def test_the_length_is_known_without_decoding(processor, video):
    example = about(part(video, fps=4))
    assert Supervision(processor).measure(example) == encode(example, processor).length


def test_a_long_video_gets_fewer_pixels_and_then_fewer_frames_and_its_text_stays(processor, video):
    example = about(part(video, fps=8))  # 24 frames: 12 steps of 48 tokens
    whole = encode(example, processor)
    assert int((whole.mm_token_type_ids == 2).sum()) == 12 * 48
    smaller = encode(example, processor, length=LengthPolicy(whole.length - 1))
    assert smaller.fitted == ("shrink",)
    assert smaller.vision["video_grid_thw"][0, 0] == 12
    assert int((smaller.mm_token_type_ids == 2).sum()) < 12 * 48
    text_alone = whole.length - 12 * 48
    shortest = encode(example, processor, length=LengthPolicy(text_alone + 11))  # less than one token per step
    assert shortest.vision["video_grid_thw"][0, 0] == 6
    assert shortest.length <= text_alone + 11
    kept = processor.tokenizer.decode(shortest.input_ids)
    assert "What happens?" in kept
    assert "It brightens.<|im_end|>" in kept


def test_a_video_that_does_not_fit_with_the_fewest_frames_is_refused_with_its_length(processor, video):
    with pytest.raises(RowError, match=r"\d+ tokens \(288 of them for 0 pictures and 1 videos\).*max_length is 50"):
        encode(about(part(video, fps=4)), processor, length=LengthPolicy(50, ("shrink", "raise")))


def test_one_limit_bounds_pictures_and_frames(processor, video):
    limited = with_max_pixels(processor, 24 * 32)
    assert video_tokens(limited, [open_clip(part(video, nframes=4))]) == [2 * 12]
    separate = with_max_pixels(processor, 48 * 64, max_frame_pixels=24 * 32)
    assert video_tokens(separate, [open_clip(part(video, nframes=4))]) == [2 * 12]
    assert separate.pixel_limits["max_pixels"] == 48 * 64
    encoded = encode(about(part(video, nframes=4)), limited)
    assert encoded.vision["video_grid_thw"].tolist() == [[2, 6, 8]]


def test_halving_frames_ends_at_the_fewest(processor, video):
    clips = [open_clip(part(video, nframes=16))]
    counts = []
    while processor is not None:
        counts.append(len(clips[0].frames_seen(processor.video_processor)))
        processor = with_fewer_frames(processor, clips)
    assert counts == [16, 8, 4]


# Refusals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"video": "missing.mp4"}, "video missing.mp4 does not exist"),
        ({"video": "a.mp4", "fps": 2, "nframes": 4}, "both 'fps' and 'nframes'"),
        ({"video": "a.mp4", "fps": 0}, "fps 0, it must be a number > 0"),
        ({"video": "a.mp4", "sample_fps": 2}, "'sample_fps', but it holds no list of frames"),
        ({"video": ["1.png", "2.png"], "fps": 2}, "'fps', but it holds a list of frames, which is taken whole"),
        ({"video": "a.mp4", "max_pixels": 100352}, "'max_pixels': sizes are set in one place, on the processor"),
        ({"video": []}, "an empty list of frames"),
        ({"video": "a.mp4", "frames": 2}, "unknown key 'frames', did you mean 'nframes'"),
    ],
)
def test_a_video_that_cannot_be_is_refused_by_name(make_processor, given, message):
    with pytest.raises(ValueError, match=message):
        encode(about({"type": "video", **given}), make_processor("qwen2_vl"))


def test_damaged_short_and_outside_videos_are_refused_by_name(video, tmp_path, make_processor):
    video_processor = make_processor("qwen2_vl").video_processor
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be read: "):
        open_clip(part(str(tmp_path / "text.mp4")))
    single = str(write_video(tmp_path / "single.mp4", num_frames=1))
    with pytest.raises(ValueError, match=r"single\.mp4 has 1 frame\(s\) to choose from, it needs at least 2"):
        open_clip(part(single)).frames_seen(video_processor)
    with pytest.raises(ValueError, match=r"clip\.mp4: Invalid time range"):
        open_clip(part(video, video_start=5.0)).frames_seen(video_processor)
    with pytest.raises(ValueError, match=r"video .*clip\.mp4 lies outside"):
        open_clip(part(video), PictureLimits(root=tmp_path))
    mixed = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 10))]
    with pytest.raises(ValueError, match="frames of 8x8 and of 10x8 pixels"):
        open_clip(part(mixed)).load(video_processor)


def test_a_video_that_ends_before_its_head_says_is_refused(video, make_processor):
    clip = replace(open_clip(part(video)), num_frames=48)
    with pytest.raises(ValueError, match=r"ends early: frame 2\d is wanted"):
        clip.load(make_processor("qwen2_vl").video_processor)


def test_options_of_videos_in_the_call_are_refused(processor, video):
    with pytest.raises(ValueError, match="fps in the call: say it in the video part"):
        processor.apply_chat_template(list(about(part(video)).messages), tokenize=True, processor_kwargs={"fps": 1})


def test_the_first_qwen_vl_refuses_videos(byte_qwen_vl_processor, video):
    with pytest.raises(RowError, match="video"):
        encode(about(part(video)), byte_qwen_vl_processor)


def test_the_pil_backend_is_for_pictures_and_leaves_videos_alone(processor, video, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = load_processor(tmp_path, backend="pil")
    assert type(loaded.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert type(loaded.video_processor) is type(processor.video_processor)
    one, other = (encode(about(part(video)), p).vision["pixel_values_videos"] for p in (processor, loaded))
    assert torch.equal(one, other)


# Rows


def videos_of(row, **options):
    (example,) = examples_from_row(row, **options)
    return example, [part["video"] for part in example.videos]


def test_rows_name_videos_by_column_by_placeholder_or_in_their_parts():
    example, videos = videos_of({"video": "a.mp4", "prefix": "Who?", "suffix": "Ada."}, root="/data")
    assert videos == ["/data/a.mp4"]
    assert [part["type"] for part in example.messages[0]["content"]] == ["video", "text"]
    turns = [{"from": "human", "value": "<image>\nand\n<video>\nWho?"}, {"from": "gpt", "value": "Ada."}]
    example, videos = videos_of({"image": "a.png", "video": "a.mp4", "conversations": turns})
    assert (example.pictures, videos) == (["a.png"], ["a.mp4"])
    assert [part["type"] for part in example.messages[0]["content"]] == ["image", "text", "video", "text"]
    frames = {"type": "video", "video": ["1.png", "2.png"]}
    turns = [{"role": "user", "content": [frames]}, {"role": "assistant", "content": "Ada."}]
    assert videos_of({"messages": turns}, root="/data")[1] == [["/data/1.png", "/data/2.png"]]


def test_the_word_video_in_angle_brackets_is_text_where_a_row_has_none():
    example, videos = videos_of({"prefix": "What does <video> mean?", "suffix": "A place."})
    assert (example.messages[0]["content"], videos) == ("What does <video> mean?", [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"videos": ["a.mp4", "b.mp4"], "messages": "<video> Who?"},
            r"1 <video> but 2 video\(s\): give one placeholder",
        ),
        ({"video": "a.mp4", "videos": ["a.mp4"], "messages": "Who?"}, "both 'video' and 'videos'"),
        ({"videos": "a.mp4", "messages": "Who?"}, "videos must be a list of videos, it is 'a.mp4'; a single one goes"),
    ],
)
def test_rows_whose_videos_do_not_fit_are_refused(row, message):
    turns = [{"role": "user", "content": row["messages"]}, {"role": "assistant", "content": "Ada."}]
    with pytest.raises(RowError, match=message):
        videos_of({**row, "messages": turns})


def test_an_answer_that_is_preferred_holds_no_video():
    prompt = [{"role": "user", "content": "Which?"}]
    answer = [{"role": "assistant", "content": [part("a.mp4")]}]
    with pytest.raises(ValueError, match="chosen holds a video: videos belong to the prompt"):
        Example(prompt, kind="preference", chosen=answer, rejected=[{"role": "assistant", "content": "b"}])


def test_data_check_opens_videos(video, tmp_path):
    rows = [{"video": name, "prefix": "Who?", "suffix": "Ada."} for name in (video, "missing.mp4")]
    (problem,) = check_rows(read_rows(rows)).problems
    assert "<memory>:2: video missing.mp4 does not exist" in str(problem)


def test_the_inspector_shows_a_video_as_one_run_per_step(processor, video):
    seen = inspect_example(about(part(video, nframes=4)), Supervision(processor))
    runs = [token.number for token in seen.tokens if token.text == processor.video_token]
    assert sum(runs) == seen.num_picture_tokens == 2 * 48
