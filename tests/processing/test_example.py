"""An Example refuses what later steps could not handle, and says which part and which number."""

import pickle
import re

import pytest

from processing.example import Example, RowError, Source

PICTURE = {"type": "image", "image": "a.png"}
ANSWER = {"role": "assistant", "content": "ok"}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def test_source_says_file_line_and_id_and_leaves_out_what_it_does_not_know():
    assert Source("t.jsonl", 17, "vg_993").where == "t.jsonl:17 (id=vg_993)"
    assert Source("t.jsonl", 17).where == "t.jsonl:17"
    assert Source("coco.json", None, "5").where == "coco.json (id=5)"


def test_a_row_error_survives_the_way_out_of_a_worker_process():
    error = pickle.loads(pickle.dumps(RowError(Source("t.jsonl", 3), "no good")))
    assert (str(error), error.source.line, error.reason) == ("t.jsonl:3: no good", 3, "no good")


def test_pictures_are_counted_over_all_turns_whichever_key_holds_them():
    turns = [user(PICTURE, {"type": "image", "url": "https://x.org/b.png"}), ANSWER, user(PICTURE), ANSWER]
    assert Example(turns).pictures == ["a.png", "https://x.org/b.png", "a.png"]


def test_base64_without_its_head_becomes_a_data_uri_that_can_be_loaded():
    example = Example(
        [user({"type": "image", "base64": "iVBO"}, {"type": "image", "base64": "data:x;base64,iVBO"}), ANSWER]
    )
    assert example.pictures == ["data:image/*;base64,iVBO", "data:x;base64,iVBO"]


def test_two_user_turns_in_a_row_are_a_conversation():
    Example([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, ANSWER])


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "boxx", "bbox": [1, 2, 3, 5]}, "unknown type 'boxx', did you mean 'box'?"),
        ({"type": "box", "box": [1, 2, 3, 5]}, "unknown key 'box', did you mean 'bbox'?"),
        ({"type": "text", "txt": "hi"}, "unknown key 'txt', did you mean 'text'?"),
        ({"type": "text", "text": 7}, "needs 'text' to be text, it is 7"),
        ({"type": "image"}, "needs one of image, path, url, base64, it has none"),
        ({"type": "image", "image": "a", "url": "b"}, "it has 'image' and 'url'"),
        ({"type": "image", "image": " "}, "has an empty 'image'"),
        ({"type": "image", "image": "a", "numbered": "no"}, "numbered 'no', it must be true or false"),
        ({"type": "video"}, "needs one of video, path, url, it has none"),
        ({"type": "box", "bbox": [1, 2, 3]}, "has bbox [1, 2, 3], it must be 4 finite numbers"),
        ({"type": "box", "bbox": [[1, 2, 3, 5], [1, 2, 3]]}, "has bbox [1, 2, 3], it must be 4 finite numbers"),
        ({"type": "box", "bbox": [1, 2, 3, "5"]}, "must be 4 finite numbers"),
        ({"type": "box", "bbox": [1, 2, 3, float("nan")]}, "must be 4 finite numbers"),
        ({"type": "box", "bbox": [1, 2, 3, True]}, "must be 4 finite numbers"),
        ({"type": "box", "bbox": []}, "needs 'bbox' to be a list of numbers, it is []"),
        ({"type": "box", "bbox": [-1, 2, 3, 5]}, "left of or above the picture"),
        ({"type": "box", "bbox": [7, 2, 3, 5]}, "xyxy is wanted, not xywh"),
        ({"type": "box", "bbox": [1, 7, 3, 5]}, "xyxy is wanted, not xywh"),
        ({"type": "box", "bbox": [0, 0, 1, 1.5], "normalized": 1}, "whose range is [0, 1]"),
        ({"type": "box", "bbox": [0, 0, 1, 1000], "normalized": 1000}, "whose range is [0, 1000)"),
        ({"type": "box", "bbox": [0, 0, 1, 1], "normalized": 100}, "normalized 100, it must be 1, 1000, or absent"),
        ({"type": "box", "bbox": [0, 0, 1, 1], "normalized": True}, "normalized True, it must be 1, 1000, or absent"),
        ({"type": "box", "bbox": [0, 0, 1, 1], "label": 3}, "label 3, it must be text"),
        ({"type": "box", "bbox": [0, 0, 1, 1], "image_index": 1}, "image_index 1, but the conversation has 1 picture"),
        ({"type": "quad", "quad": [1, 2, 3, 5]}, "must be 8 finite numbers"),
        ({"type": "point", "point": [1, 2, 3]}, "must be 2 finite numbers"),
        ({"type": "document", "html": ""}, "needs 'html' to be text"),
        ({"type": "document", "html": "<p>\n<b></p>"}, "1 problem(s): line 2: <b> is not closed before </p>"),
        ({"type": "document", "html": '<p data-bbox="1 2 3">a</p>'}, "data-bbox '1 2 3' is not four numbers"),
        ("hello", "must be a dictionary with a type, it is 'hello'"),
    ],
)
def test_a_malformed_part_is_refused_with_its_place_and_the_reason(part, reason):
    with pytest.raises(ValueError, match=rf"messages\[0\] part 1.*{re.escape(reason)}"):
        Example([user(PICTURE, part), ANSWER])


def test_shapes_may_touch_the_last_value_of_their_range_and_have_no_width():
    Example(
        [
            user(
                PICTURE,
                {"type": "box", "bbox": [0, 0, 1, 1], "normalized": 1},
                {"type": "box", "bbox": [999, 5, 999, 5], "normalized": 1000, "label": None},
                {"type": "point", "point": [[1, 2], [3, 5]]},
            ),
            ANSWER,
        ]
    )


def test_a_box_before_every_picture_must_say_which_one_it_means():
    box = {"type": "box", "bbox": [1, 2, 3, 5]}
    with pytest.raises(
        ValueError, match=r"before any picture; the conversation has 1 after it: name one with image_in"
    ):
        Example([user(box, PICTURE), ANSWER])
    with pytest.raises(ValueError, match=r"stands before any picture$"):
        Example([user(box), ANSWER])
    Example([user({**box, "image_index": 0}, PICTURE), ANSWER])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "must be a list with at least one message"),
        ("hi", "must be a list with at least one message, it is 'hi'"),
        (["hi", ANSWER], r"messages\[0\] must be a dictionary"),
        ([{"role": "human", "content": "a"}, ANSWER], "role 'human', it must be one of system, user, assistant"),
        ([{"role": "user", "contents": "a"}, ANSWER], "unknown key 'contents', did you mean 'content'"),
        ([{"role": "user", "content": None}, ANSWER], "content None, it must be text or a list of parts"),
        ([{"role": "user", "content": "a"}], "ends with a user turn, so there is no answer to train on"),
        ([ANSWER, {"role": "system", "content": "a"}], r"messages\[1\] is a system turn"),
        ([{**ANSWER, "weight": -1}], "weight -1, it must be a number >= 0"),
        ([{**ANSWER, "train": "yes"}], "train 'yes', it must be true or false"),
        ([{**ANSWER, "train": False}], "no assistant turn is trained"),
        ([{**ANSWER, "weight": 0}], "no assistant turn is trained"),
    ],
)
def test_a_malformed_conversation_is_refused_with_the_reason(messages, reason):
    with pytest.raises(ValueError, match=reason):
        Example(messages)


def test_preference_needs_both_answers_and_they_must_differ_and_hold_no_picture():
    prompt = [{"role": "user", "content": "a"}]
    other = [{"role": "assistant", "content": "no"}]
    Example(prompt, kind="preference", chosen=[ANSWER], rejected=other)
    with pytest.raises(ValueError, match="kind 'preference' needs 'rejected'"):
        Example(prompt, kind="preference", chosen=[ANSWER])
    with pytest.raises(ValueError, match="chosen and rejected are equal"):
        Example(prompt, kind="preference", chosen=[ANSWER], rejected=[dict(ANSWER)])
    with pytest.raises(ValueError, match=r"rejected\[0\] has role None"):
        Example(prompt, kind="preference", chosen=[ANSWER], rejected=[{"content": "x"}])
    with pytest.raises(ValueError, match="chosen may hold assistant turns only, it holds a user turn"):
        Example(prompt, kind="preference", chosen=prompt, rejected=other)
    with pytest.raises(ValueError, match=r"chosen holds 1 picture\(s\)"):
        Example(prompt, kind="preference", chosen=[{"role": "assistant", "content": [PICTURE]}], rejected=other)
    with pytest.raises(ValueError, match="a preference prompt must end with a user turn"):
        Example([*prompt, ANSWER], kind="preference", chosen=[ANSWER], rejected=other)


def test_boxes_in_a_chosen_answer_may_mean_a_picture_of_the_prompt():
    answer = [{"role": "assistant", "content": [{"type": "box", "bbox": [1, 2, 3, 5]}]}]
    Example([user(PICTURE)], kind="preference", chosen=answer, rejected=[ANSWER])
    with pytest.raises(ValueError, match=r"chosen\[0\] part 0 \(type 'box'\) stands before any picture"):
        Example([user({"type": "text", "text": "a"})], kind="preference", chosen=answer, rejected=[ANSWER])


def test_fields_that_a_kind_does_not_read_are_refused():
    prompt = [{"role": "user", "content": "a"}]
    Example(prompt, kind="reward", solution=0)
    with pytest.raises(ValueError, match="kind 'reward' needs 'solution'"):
        Example(prompt, kind="reward")
    with pytest.raises(ValueError, match="kind 'sft' has no 'solution'"):
        Example([*prompt, ANSWER], solution="2")
    with pytest.raises(ValueError, match="kind is 'dpo'"):
        Example(prompt, kind="dpo")
    with pytest.raises(ValueError, match="task is 7, it must be text, or None"):
        Example([*prompt, ANSWER], task=7)
    with pytest.raises(ValueError, match="weight is 0, it must be a number > 0"):
        Example([*prompt, ANSWER], weight=0)


def test_plain_style_is_one_prompt_and_one_answer():
    prompt = {"role": "user", "content": "a"}
    Example([prompt, ANSWER], style="plain")
    with pytest.raises(ValueError, match="one user turn and one assistant turn, this has: user, user, assistant"):
        Example([prompt, prompt, ANSWER], style="plain")
    with pytest.raises(ValueError, match="style is 'raw'"):
        Example([prompt, ANSWER], style="raw")
