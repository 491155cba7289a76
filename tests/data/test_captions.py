"""Captions of rows: which count, which are missing, and which one of several is drawn."""

import datasets
import numpy as np
import pytest

from dq_hf.data.captions import CaptionDraw, all_captions, captions_of, with_wrong_captions


@pytest.mark.parametrize(
    "value, texts",
    [
        (None, []),
        ("", []),
        (" a snail ", ["a snail"]),
        (["a", "", None, "  ", "b"], ["a", "b"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        ([], []),
    ],
)
def test_a_row_has_a_caption_or_several_and_blank_ones_do_not_count(value, texts):
    assert captions_of(value) == texts


@pytest.mark.parametrize("value", [3, ["a", 3], [["a"]], {"en": "a cat"}, [{"en": "a cat"}], {"a cat"}, b"a cat"])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(TypeError, match="captions must be strings or lists of strings, got "):
        captions_of(value)


def rows_of(captions):
    return datasets.Dataset.from_dict(
        {"text": captions}, datasets.Features({"text": datasets.List(datasets.Value("string"))})
    )


def test_rows_without_a_caption_are_counted_and_too_many_are_refused(caplog):
    rows = rows_of([["a", "b"], ["b", "c"], [" "], ["a"]])
    assert all_captions(rows, "text", 0.25) == ["a", "b", "c"]
    assert "1 of 4 images have no caption" in caplog.text
    with pytest.raises(ValueError, match=r"at most 20.00% .* column 'text', got 1 of 4"):
        all_captions(rows, "text", 0.2)
    with pytest.raises(ValueError, match="got 2 of 2"):
        all_captions(rows_of([[], [""]]), "text", 1.0)
    with pytest.raises(ValueError, match="no column 'caption'; it has text"):
        all_captions(rows, "caption")


def test_a_caption_is_drawn_anew_in_each_epoch_and_alike_in_any_batch():
    rows = [{"text": ["a", "b", "c"]}] * 600
    draw, pictures = CaptionDraw("text", seed=1), list(range(600))
    drawn = [draw(rows, pictures, epoch) for epoch in (0, 1)]
    assert draw(rows[:5], pictures[5:10], 1) == drawn[1][5:10]
    for texts in (*drawn, CaptionDraw("text", seed=2)(rows, pictures, 0)):
        assert all(150 < texts.count(letter) < 250 for letter in "abc")  # 200 on average, 4.3 standard deviations
    assert 340 < sum(one != two for one, two in zip(*drawn)) < 460  # 400 on average, 5.2 standard deviations
    assert draw([{"text": None}, {"text": "alone"}], [1, 2], 0) == ["", "alone"]


def test_wrong_captions_are_those_of_other_rows():
    texts = [[f"caption {i}"] for i in range(20)]
    rows = with_wrong_captions(rows_of(texts), "text", "wrong")
    assert rows["text"][:] == texts and sorted(rows["wrong"][:]) == sorted(texts)
    assert all(row["text"] != row["wrong"] for row in rows)
