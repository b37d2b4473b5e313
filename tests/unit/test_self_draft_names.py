"""Names of drafts that are made of the target."""

from __future__ import annotations

import pytest

from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.core.self_draft import SelfDraft, is_self_draft, read_self_draft, split_names


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("self:int4", SelfDraft("int4")),
        ("self:int4-64", SelfDraft("int4", 64)),
        ("self:fp6", SelfDraft("fp6")),
        ("self:fp6-4", SelfDraft("fp6-4")),
        ("self:fp6-48", SelfDraft("fp6", 48)),
        ("self:fp6-4-64", SelfDraft("fp6-4", 64)),
        ("self:layers=8", SelfDraft(layers=8)),
        ("self:first=8", SelfDraft(layers=8, is_first=True)),
        ("self:int8,layers=12", SelfDraft("int8", layers=12)),
        ("self:first=2,int4-32", SelfDraft("int4", 32, 2, True)),
    ],
)
def test_what_they_mean(name: str, means: SelfDraft) -> None:
    assert is_self_draft(name)
    assert read_self_draft(name) == means


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("self:", "a word is missing"),
        ("self:int4,", "a word is missing"),
        ("self:int5", "unknown word 'int5'"),
        ("self:int4-", "unknown word 'int4-'"),
        ("self:fp6-4-", "unknown word"),
        ("self: int4", "unknown word ' int4'"),
        ("self:layers=-1", "unknown word 'layers=-1'"),
        ("self:layers=²", "unknown word"),
        ("self:layers=0", "at least one layer"),
        ("self:int4,int8", "int8 comes after another format"),
        ("self:layers=2,first=3", "first=3 comes after another number of layers"),
    ],
)
def test_what_means_nothing_is_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match="use self:int4") as refused:
        read_self_draft(name)
    assert says in str(refused.value) and name in str(refused.value)


def test_layers_are_spread_over_the_depth() -> None:
    assert SelfDraft(layers=4).kept(8) == [0, 2, 5, 7]
    assert SelfDraft(layers=1).kept(8) == [0]
    assert SelfDraft(layers=3, is_first=True).kept(8) == [0, 1, 2]
    assert SelfDraft("int4").kept(3) == [0, 1, 2]
    for count in range(1, 40):
        for layers in range(1, count + 1):
            kept = SelfDraft(layers=layers).kept(count)
            assert len(set(kept)) == layers and kept == sorted(kept) and kept[0] == 0
            assert layers == 1 or kept[-1] == count - 1


def test_words_belong_to_the_name_before_them() -> None:
    assert split_names("A,B,self:int4,none") == ["A", "B", "self:int4", "none"]
    several = ["self:int4,layers=8", "self:layers=2,int8-32,int4", "none"]
    assert split_names(",".join(several)) == several
    assert split_names("int4,self:first=2") == ["int4", "self:first=2"]


def test_their_files_are_the_targets() -> None:
    config = Config("somewhere", ("self:int4", "draft", "self:layers=2"))
    assert [str(place) for place in config.draft_directories] == ["somewhere", "draft", "somewhere"]
