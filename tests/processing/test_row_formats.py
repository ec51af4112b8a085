"""Each shape of row: a good one becomes the Example one expects, a bad one says file, line, id and both numbers."""

import json

import pytest

from processing.example import RowError, Source
from processing.row_formats import ROW_FORMATS, examples_from_row, recognise

HI = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ada."}]


def text(value):
    return {"type": "text", "text": value}


def only(row, **options):
    (example,) = examples_from_row(row, **options)
    return example


def reason_of(row, **options):
    with pytest.raises(RowError) as error:
        examples_from_row(row, source=Source("t.jsonl", 17), **options)
    assert str(error.value).startswith("t.jsonl:17")
    return str(error.value)


def test_qwenvl_reproduces_every_conversation_of_the_original_finetuning_code(shared):
    recorded = json.loads((shared / "reference" / "finetune_preprocess_reference.json").read_text())["examples"]
    assert len(recorded) == 12
    for number, record in enumerate(recorded):
        turns = record["conversation"]
        example = only({"conversations": turns})
        if turns[0]["from"] == "assistant":
            turns = turns[1:]
            assert example.left_out == {"leading assistant turn": 1}
        assert [message["role"] for message in example.messages] == [turn["from"] for turn in turns], number


def test_qwenvl_drops_a_leading_assistant_turn_and_counts_it():
    turns = [{"from": name, "value": name} for name in ("assistant", "user", "assistant")]
    example = only({"conversations": turns})
    assert [message["role"] for message in example.messages] == ["user", "assistant"]
    assert example.left_out == {"leading assistant turn": 1}


def test_qwenvl_joins_paths_to_the_root_and_lets_early_boxes_mean_the_first_picture():
    turns = [
        {"from": "user", "value": "<box>(1,2),(3,5)</box> in Picture 1: <img>a.png</img>"},
        {"from": "assistant", "value": "<box>(1,2)</box>"},
    ]
    example = only({"conversations": turns}, root="/data")
    assert example.pictures == ["/data/a.png"]
    assert example.messages[0]["content"][0]["image_index"] == 0
    assert "image_index" not in example.messages[1]["content"][0]


def test_qwenvl_refuses_boxes_in_a_conversation_without_a_picture():
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "<box>(1,2),(3,5)</box>"}]
    assert "messages[1] part 0 (type 'box') stands before any picture" in reason_of({"conversations": turns})


def test_llava_placeholders_meet_their_pictures_in_order_without_the_line_break_between_them():
    turns = [
        {"from": "human", "value": "<image>\n<image>\nCompare\nthem"},
        {"from": "gpt", "value": "ok"},
        {"from": "human", "value": "And this?\n<image>"},
        {"from": "gpt", "value": "ok"},
    ]
    example = only({"images": ["a.png", "b.png", "c.png"], "conversations": turns, "system": "Be brief."})
    assert example.messages[0] == {"role": "system", "content": "Be brief."}
    assert example.messages[1]["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "image", "image": "b.png"},
        text("Compare\nthem"),
    ]
    assert example.messages[3]["content"] == [text("And this?"), {"type": "image", "image": "c.png"}]


def test_llava_refuses_a_wrong_number_of_pictures_with_both_numbers():
    two = [{"from": "human", "value": "<image><image>"}, HI[1]]
    none = [{"from": "human", "value": "Who?"}, HI[1]]
    assert "t.jsonl:17 (id=vg_993): 2 <image> but 1 picture" in reason_of(
        {"id": "vg_993", "image": "a.png", "conversations": two}
    )
    assert "0 <image> but 1 picture" in reason_of({"image": "a.png", "conversations": none})
    assert "1 <image> but 0 picture" in reason_of({"conversations": HI})


def test_messages_take_pictures_from_the_column_in_both_notations_and_drop_what_arrow_filled_in():
    typed = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "Who?", "image": None}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Ada.", "image": None}], "weight": None},
    ]
    wanted = [{"type": "image", "image": b"png"}, text("Who?")]
    example = only({"messages": typed, "images": [{"bytes": b"png", "path": None}]})
    assert [message["content"] for message in example.messages] == [wanted, [text("Ada.")]]
    assert set(example.messages[1]) == {"role", "content"}
    written = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "Ada."}]
    assert only({"messages": written, "images": [b"png"]}).messages[0]["content"] == wanted
    unsaid = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    assert only({"messages": unsaid, "image": b"png"}).messages[0]["content"] == wanted


def test_messages_with_pictures_in_place_need_no_column_and_image_in_a_text_row_is_text():
    place = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "ok"},
    ]
    assert only({"messages": place}, root="/data").pictures == ["/data/a.png"]
    html = [{"role": "user", "content": "What is <image> in SVG?"}, {"role": "assistant", "content": "An element."}]
    assert only({"messages": html}).messages[0]["content"] == "What is <image> in SVG?"


def test_the_row_that_was_read_is_left_as_it_was():
    row = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "ok"}]}
    before = json.dumps(row)
    only({**row, "images": ["a.png"]})
    assert json.dumps(row) == before


def test_prefix_and_suffix_are_question_and_answer_and_html_with_boxes_is_a_document():
    example = only({"image": "a.png", "prefix": "Read.", "suffix": "STOP"})
    assert example.messages[0]["content"] == [{"type": "image", "image": "a.png"}, text("Read.")]
    assert example.messages[1]["content"] == "STOP"
    html = '<body><p data-bbox="1 2 3 5">STOP</p></body>'
    example = only({"image": "a.png", "prefix": "Read.", "suffix": html})
    assert example.messages[1]["content"] == [{"type": "document", "html": html}]
    plain = "<p>an attribute called data-bbox= is missing here</p>"
    assert only({"image": "a.png", "prefix": "Read.", "suffix": plain}).messages[1]["content"] == plain


def test_location_tokens_of_another_family_are_refused_instead_of_being_trained_as_text():
    assert "<loc0017>, a location token of PaliGemma" in reason_of(
        {"image": "a.png", "prefix": "detect cat", "suffix": "<loc0017><loc0019><loc0023><loc0029> cat"}
    )


def test_preference_rows_may_be_texts_or_messages():
    as_text = only({"images": ["a.png"], "prompt": "Who?", "chosen": "Ada.", "rejected": "Bob."})
    assert (as_text.kind, as_text.pictures) == ("preference", ["a.png"])
    as_messages = only(
        {
            "images": ["a.png"],
            "prompt": [{"role": "user", "content": "Who?"}],
            "chosen": [{"role": "assistant", "content": "Ada."}],
            "rejected": [{"role": "assistant", "content": "Bob."}],
        }
    )
    assert (as_text.messages, as_text.chosen, as_text.rejected) == (
        as_messages.messages,
        as_messages.chosen,
        as_messages.rejected,
    )
    assert "chosen must be text or a list of messages, it is 3" in reason_of(
        {"prompt": "Who?", "chosen": 3, "rejected": "Bob."}
    )


@pytest.mark.parametrize(
    "answers", [{"chosen": "7", "rejected": "8"}, {"solution": "7"}], ids=["preference", "reward"]
)
def test_the_videos_of_preference_and_reward_rows_stand_in_the_prompt(answers):
    example = only({"video": "goal.mp4", "image": "team.png", "prompt": "<image>Who scores in<video>?", **answers})
    assert [part["type"] for part in example.messages[0]["content"]] == ["image", "text", "video", "text"]
    assert [part["video"] for part in example.videos] == ["goal.mp4"]
    assert not example.columns


def test_reward_rows_keep_their_other_columns_for_the_reward_functions():
    example = only({"image": "a.png", "problem": "2+3?", "solution": "5", "difficulty": 7, "id": 3})
    assert (example.kind, example.solution, dict(example.columns)) == ("reward", "5", {"difficulty": 7})
    assert example.source.id == "3"
    assert "both 'problem' and 'prompt'" in reason_of({"problem": "a", "prompt": "b", "solution": "5"})


def test_rows_of_stage_2_name_their_task_and_its_fields():
    example = only({"task": "vqa", "image": "a.png", "question": "Who?", "answer": "Ada"}, root="/data")
    assert (example.style, example.task, example.pictures) == ("plain", "vqa", ["/data/a.png"])
    assert example.messages[1]["content"] == [text(" Ada")]
    assert only({"task": "pure_text", "text": "a", "corpus": "wiki"}).columns == {"corpus": "wiki"}
    assert only({"task": "pure_text", "text": "All of it."}).messages[1]["content"] == "All of it."


def test_a_task_column_in_a_row_of_another_shape_is_only_its_label():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert only({"messages": turns, "task": "vqa"}).style == "chat"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"task": "vqa", "image": "a.png", "question": "Who?", "answer": "a", "langage": "en"},
            "did you mean 'language'",
        ),
        (
            {"task": "vqa", "image": "a.png", "question": "Who?", "answer": "a", "bbox": [1]},
            "has the unknown key 'bbox'",
        ),
        ({"task": "vqa", "image": "a.png", "question": "Who?"}, "task 'vqa' needs answer"),
        ({"task": "vpa", "image": "a.png"}, "task is 'vpa', it must be one of caption, vqa"),
    ],
)
def test_malformed_rows_of_stage_2_are_refused(row, reason):
    assert reason in reason_of(row, format="task")


def test_task_and_weight_are_read_from_every_row():
    example = only({"image": "a.png", "prefix": "Read.", "suffix": "STOP", "task": "ocr", "weight": 0.5})
    assert (example.task, example.weight) == ("ocr", 0.5)
    assert "weight is 'much', it must be a number > 0" in reason_of({"prefix": "a", "suffix": "b", "weight": "much"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prefix": "a", "suffix": "b", "imagess": ["a.png"]}, "column 'imagess', did you mean 'images'?"),
        ({"prefix": "a", "suffix": "b", "wieght": 2}, "column 'wieght', did you mean 'weight'?"),
        ({"image": "a", "images": ["b"], "prefix": "a", "suffix": "b"}, "both 'image' and 'images'"),
        ({"image": {"bytes": None, "path": None}, "prefix": "a", "suffix": "b"}, "a picture is empty"),
        ({"image": {"file": "a.png"}, "prefix": "a", "suffix": "b"}, "a dictionary may hold bytes and path"),
        ({"image": "a.png", "prefix": "a", "suffix": 7}, "suffix must be text, it is 7"),
        ({"conversations": []}, "fits no format"),
        ({"conversations": [{"from": "human", "value": 7}]}, "conversations[0] has the value 7, it must be text"),
        ({"conversations": [{"from": "human", "text": "a"}]}, "must be {'from': .., 'value': ..}"),
        ({"messages": "hello"}, "a conversation must be a list of messages"),
        ({"prompt": "a", "chosen": "b"}, "fits no format"),
        ([1, 2], "a row must be a dictionary, this is [1, 2]"),
    ],
)
def test_a_malformed_row_is_refused_with_the_reason(row, reason):
    assert reason in reason_of(row)


def test_a_row_that_fits_two_formats_is_refused_with_both_names_until_one_is_named():
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "prefix": 1,
        "suffix": 2,
    }
    message = reason_of(row)
    assert "fits messages and prefix_suffix: name one with format=" in message
    assert all(f"  {name}: " in message for name in ROW_FORMATS)
    assert only(row, format="messages").columns == {"prefix": 1, "suffix": 2}


def test_a_row_of_mixed_speakers_fits_no_format_and_the_message_says_who_may_speak():
    turns = [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]
    message = reason_of({"conversations": turns})
    assert "fits no format" in message
    assert "qwenvl: conversations (from user and assistant)" in message
    assert "conversations[0] is from 'user', it must be one of human, gpt" in reason_of(
        {"conversations": turns}, format="llava"
    )


def test_unknown_format_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown row format 'lava', did you mean 'llava'"):
        examples_from_row({}, format="lava")
    with pytest.raises(ValueError, match="needs prefix, suffix; the row has image"):
        examples_from_row({"image": "a.png"}, format="prefix_suffix")


def test_columns_of_none_do_not_count_for_recognition():
    assert recognise({"messages": [], "prefix": None, "suffix": None}) == "messages"
