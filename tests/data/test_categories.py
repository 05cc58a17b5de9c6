# SPDX-License-Identifier: Apache-2.0
"""Classes of boxes: COCO's table against COCO's own file, names of the data, and what is refused."""

import json

import pytest

from vlp_jax.data import categories
from vlp_jax.types import UserError


def test_the_table_is_that_of_cocos_annotations(realdata):
    content = json.loads((realdata / "coco/annotations/instances_val2017.json").read_text())
    assert categories.COCO == {one["id"]: one["name"] for one in content["categories"]}
    assert len(categories.COCO) == 80 and list(categories.COCO) == sorted(categories.COCO)


def test_names():
    given = ["dog", "cat", "", "dog", "sofa"]
    assert categories.names("data", given) == ("cat", "dog", "sofa")
    raw = categories.names("coco91", given)
    assert len(raw) == 91 and raw[18] == "dog" and raw.count("") == 11 and raw[0] == raw[12] == raw[83] == ""
    dense = categories.names("coco80", given)
    assert len(dense) == 80 and "" not in dense and dense[0] == "person" and dense[-1] == "toothbrush"
    assert [name for name in raw if name] == list(dense)
    assert categories.names("coco91", ()) == raw  # nothing known of the data


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"'coco'.* Did you mean 'coco\d\d'\? Possible: data, coco91, coco80"):
        categories.names("coco", ["cat"])
    many = [f"thing {number:02}" for number in range(20)]
    with pytest.raises(UserError) as error:
        categories.names("coco80", many)
    for words in ("thing 07 and 12 more", "person, bicycle", "and 72 more", "--config.data.categories=data"):
        assert words in str(error.value)


def test_manifests():
    fields = ["boxes", "box_names", "captions"]
    one = {"fields": fields, "box_names": {"dog": 3}}
    two = {"fields": fields, "box_names": {"cat": 1, "": 5}}
    assert categories.of_data("data", [("a", one), ("b", two)]) == ("cat", "dog")
    assert categories.of_data("data", [("b", two), ("a", one)]) == ("cat", "dog")
    drawn = {"fields": ["boxes", "box_names"], "box_names": {"cube": 3}}
    with pytest.raises(UserError, match="none of the names"):  # of one source, though another has some
        categories.of_data("coco80", [("a", one), ("c", drawn)])
    for manifest, words in (
        ({"fields": ["captions"], "box_names": {}}, "have no boxes and no box_names; they hold captions"),
        ({"fields": ["boxes"], "box_names": {}}, "have no box_names; they hold boxes"),
        ({"fields": fields}, "Prepare it again, with --overwrite"),
        ({}, "Prepare it again, with --overwrite"),
        ({"fields": fields, "box_names": {}}, "No box of the data has a name"),
        ({"fields": fields, "box_names": {"": 4}}, "No box of the data has a name"),
    ):
        with pytest.raises(UserError, match=words):
            categories.of_data("data", [("DIR", manifest)])
