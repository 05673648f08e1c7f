"""Lists of labels: what they give, and every way in which they can be wrong."""

import pytest
from source_cases import both, examples, folder, names, write

from lasad_jax.config import DataConfig


def listed(tmp_path, text: str) -> DataConfig:
    for value, name in enumerate(("a", "b", "c", "d")):
        write(tmp_path / "images" / f"{name}.png", value)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return folder(tmp_path / "images", labels=str(tmp_path / "list.csv"))


def test_a_list_gives_numbers_or_names(tmp_path):
    text = "\ufefflabel, path\n2,c.png\n0,a.png\n1,./b.png\n"
    train, test = both(listed(tmp_path, text))
    assert train.class_names == ("0", "1", "2") and len(train) + len(test) == 3
    found = {
        source.name(i): source[i].label for source in (train, test) for i in range(len(source))
    }
    assert found == {"a.png": 0, "b.png": 1, "c.png": 2}
    text = 'path,label,note\na.png,"salt, pepper",x\nb.png,10th,y\n\nc.png,10th,z\n'
    train, test = both(listed(tmp_path, text))
    assert train.class_names == ("10th", "salt, pepper")
    found = {
        source.name(i): source[i].label for source in (train, test) for i in range(len(source))
    }
    assert found == {"a.png": 1, "b.png": 0, "c.png": 0}


def test_a_list_gives_the_splits(tmp_path):
    text = "path,label,split\na.png,x,train\nb.png,y,{}\nc.png,x,Train\nd.png,y,val\n"
    train, test = both(listed(tmp_path, text.format("test")))
    assert (names(train), names(test)) == (["a.png", "c.png"], ["b.png"])
    assert [example.label for example in examples(test)] == [1]
    assert names(both(listed(tmp_path, text.format("validation")))[1]) == ["b.png"]
    assert names(both(listed(tmp_path, text.format("val")))[1]) == ["b.png", "d.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0\nb.png,-1\n", "line 3: label -1 is outside 0 to 1"),
        ("path,label\na.png,0\nb.png,1\nc.png,10\n", "line 4: label 10 is outside 0 to 2.*gaps"),
        ("path,label\na.png,0\nb.png,cat\n", "line 3: label 'cat' is no whole number, unlike '0'"),
        ("path,label\na.png,cat\nb.png,1\n", "line 3: label '1' is a whole number, unlike"),
        ("path,label\na.png,0\nb.png,\n", "line 3: label is empty"),
        ("path,label\na.png,0\nb.png\n", "line 3: 1 values for 2 columns"),
        ("path,label\na.png,0\n./a.png,0\n", r"line 3: path './a\.png' is on line 2 already"),
        ("path,class\na.png,0\n", "columns path, class but no column label"),
        ("file,class\na.png,0\n", "no column path and no label"),
        ("", "no column path"),
        ("path,label\n", "lists no images"),
        ("path,label,split\na.png,0,train\nb.png,0,dev\n", "line 3: split 'dev' is not one of"),
        ("path,label,split\na.png,0,train\nb.png,0,train\n", "no line with test"),
        ("path,label,split\na.png,0,test\nb.png,0,val\n", "no line with train"),
        ("path,label\na.png,0\n", "a single image is used"),
    ],
)
def test_lists_that_do_not_hold_together_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        both(listed(tmp_path, text))
    assert "data.labels" in str(caught.value) or "data.directory" in str(caught.value)


def test_missing_files_of_a_list_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"line 3: path 'x\.png' is not in.*2 of 3 paths"):
        both(listed(tmp_path, "path,label\na.png,0\nx.png,0\ny.png,0\n"))
    with pytest.raises(FileNotFoundError, match=r"data\.labels: .*gone\.csv is no file"):
        both(folder(tmp_path, labels=str(tmp_path / "gone.csv")))
    data = listed(tmp_path, "path,label\n")
    (tmp_path / "list.csv").write_bytes(b"path,label\n\xff\xfe,0\n")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        both(data)
