"""What is left out of a folder or a shard, and the sentence that tells it; lists with labels."""

import os

import pytest
from test_dataset import find, photograph, why_bad

from dinofast.data import names
from dinofast.data.dataset import scan
from dinofast.data.names import Ignored, kind_of, kind_of_member

COMPANIONS = (
    *("._a.jpg", ".DS_Store", ".hidden.png", "Thumbs.db", "desktop.ini"),
    *(".thumbnails/t.jpg", ".git/x.png", ".ipynb_checkpoints/c.png", "__MACOSX/._a.jpg"),
    *("@eaDir/a.jpg/SYNOPHOTO.jpg", "$RECYCLE.BIN/d.jpg", "System Volume Information/i.png"),
    *("lost+found/1.jpg", "b/.cache/deep/2.jpg"),
)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    photograph(root / "a.jpg"), photograph(root / "b" / "b.png")
    for name in COMPANIONS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7")
    return root


def test_companions_are_left_out_and_not_bad(folder):
    images = scan(str(folder))
    assert find(str(folder)) == [f"{folder}/a.jpg", f"{folder}/b/b.png"] and not why_bad(images)
    assert not images.bad_files and images.ignored.startswith("5 files ignored: 5 hidden; ")
    assert "9 folders ignored: " in images.ignored and "1 .git" in images.ignored


def test_a_hidden_folder_can_be_the_source(folder):
    hidden = folder.rename(folder.with_name(".data"))
    assert len(scan(str(hidden))) == 2
    photograph(hidden / ".git" / "y.png")
    assert find(str(hidden / ".git")) == [f"{hidden}/.git/x.png", f"{hidden}/.git/y.png"]
    (hidden / "list.txt").write_text(".hidden.png\n.git/y.png\n")  # what is named is taken
    assert len(scan(str(hidden / "list.txt"))) == 2


def test_what_is_ignored_is_counted_by_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "has_plugin", lambda extension: False)
    photograph(tmp_path / "a.jpg")
    for name in ("1.heic", "2.HEIC", "b/3.heic", "b/x.txt", "b/y.TXT", "README", "z.0001", "q.svg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    what, kinds = scan(str(tmp_path)).ignored.split(": ")
    assert what == "8 files ignored" and set(kinds.split(", ")) == {
        "3 .heic (pip install pillow-heif)",
        "2 .txt",
        "2 without a known ending",
        "1 .svg",
    }
    os.remove(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="has no images: .*3 .heic .pip install pillow-heif"):
        scan(str(tmp_path))


def test_many_kinds_make_no_long_line():
    ignored = Ignored()
    for i in range(1000):
        ignored.files[f".x{i}"] += 1 + (i < 8)
    assert str(ignored).count(",") == 9 and str(ignored).endswith(", 992 others")
    assert not str(Ignored())
    assert kind_of(b"a." + b"x" * 50) == kind_of(b"a.17") == "without a known ending"


def test_a_plain_folder_tells_nothing(photographs):
    assert scan(str(photographs)).ignored == ""


@pytest.mark.parametrize(
    "member, kind",
    [
        *((name, "image") for name in ("x.jpg", "photo.v1.jpg", "2020.01.02.jpg", "IMG.0001.JPG")),
        *((name, "image") for name in ("000.image.jpg", "000.left.jpg", "./d.e/3.gif", "mask.png")),
        *((name, "hidden") for name in ("._x.jpg", "__MACOSX/x.jpg", ".a/x.jpg", "d/.DS_Store")),
        *((name, "hidden") for name in ("PaxHeaders.7/x.jpg", "./.x.jpg", "a/./.b/x.jpg", ".jpg")),
        *((name, "") for name in ("000.json", "000.cls", "000.CLS", "a.b.txt", "d/", "x.png/")),
        *(("000.seg.png", ".seg.png"), ("0.Mask.PNG", ".mask.png"), ("a.svg", ".svg")),
        ("png", "without a known ending"),
    ],
)
def test_members_of_shards(member, kind):
    assert kind_of_member(member.encode()) == kind


# ---- lists
LISTS = {
    "a path a line": "1.jpg\n2.jpg\na b/3 4.jpg\n",
    "labels behind": "1.jpg 0\na b/3 4.jpg 1\n",
    "behind a tab": "1.jpg\t0\na b/3 4.jpg\t1\n",
    "several labels": "1.jpg 0 1 1\n2.jpg 1 0 0\n",
    "before the path": "0 1.jpg\n1 a b/3 4.jpg\n",
    "CSV": "1.jpg,cat\n2.jpg,dog\n",
    "CSV with a header": "path,label\n1.jpg,0\n2.jpg,1\n",
    "an index": ",filename,label\n0,1.jpg,a\n1,2.jpg,b\n",
    "semicolons": "1.jpg;0\n2.jpg;1\n",
    "lines of Windows": "1.jpg 0\r\n2.jpg 1\r\n",
    "lines of old Macs": "1.jpg 0\r2.jpg 1\r",
    "a mark at the start": "\ufeff1.jpg,0\n2.jpg,1\n",
    "quotes": '"1.jpg"\n"a b/3 4.jpg"\n',
    "some quotes": '1.jpg\n"a b/3 4.jpg"\n',
    "quotes and commas": '"a b/3 4.jpg","x, y"\n1.jpg,z\n',
    "comments": "# mine\n1.jpg\n#x.jpg\n",
    "addresses": "file://{root}/1.jpg\nfile://{root}/a%20b/3%204.jpg\n",
    "backslashes": "a b\\3 4.jpg\n1.jpg\n",
    "absolute": "{root}/1.jpg 3\n{root}/2.jpg 4\n",
    "a header alone": "filename\n1.jpg\n2.jpg\n",
    "the first is gone": "gone.jpg 0\n1.jpg 1\n",
}


@pytest.fixture
def listed(tmp_path):
    for name in ("1.jpg", "2.jpg", "a b/3 4.jpg", "#x.jpg"):
        photograph(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_other_tools_write_them(listed, name):
    text = LISTS[name].replace("{root}", str(listed))
    (listed / "list.txt").write_text(text, newline="")
    images = scan(str(listed / "list.txt"))
    expected = [
        f"{listed}/{image}"
        for _, image in sorted(
            (text.replace("%20", " ").replace("\\", "/").find(image), image)
            for image in ("1.jpg", "2.jpg", "a b/3 4.jpg", "#x.jpg", "gone.jpg")
        )
        if _ >= 0
    ]
    assert find(str(listed / "list.txt")) == expected
    assert set(why_bad(images)) == {path for path in expected if "gone" in path}
    plain = name in ("a path a line", "some quotes", "comments", "a header alone")
    assert ("is read, as in " in images.ignored) == (not plain)


def test_a_list_in_utf_16(listed):
    (listed / "list.txt").write_bytes("1.jpg 0\r\na b/3 4.jpg 1\r\n".encode("utf-16"))
    assert find(str(listed / "list.txt")) == [f"{listed}/1.jpg", f"{listed}/a b/3 4.jpg"]


@pytest.mark.parametrize(
    "text", ['["1.jpg", "2.jpg"]', '{"a": "1.jpg"}\n', "['1.jpg']", '[\n"1.jpg"]']
)
def test_a_list_in_json_is_refused(listed, text):
    """It would be read in part."""
    (listed / "list.txt").write_text(text)
    with pytest.raises(ValueError, match="is JSON or the like, which is not read: write its paths"):
        scan(str(listed / "list.txt"))


def test_brackets_in_a_list_are_no_json(listed):
    for name in ("[a]/5.jpg", "{b}/6.jpg", "[[c]]/7.jpg"):
        (listed / name).parent.mkdir()
        (listed / "1.jpg").rename(listed / name)
        (listed / "list.txt").write_text(f"{name} 0\n2.jpg 1\n")
        assert find(str(listed / "list.txt")) == [f"{listed}/{name}", f"{listed}/2.jpg"]
        (listed / name).rename(listed / "1.jpg")
    (listed / "list.txt").write_text("[train]\n1.jpg\n2.jpg\n")
    assert find(str(listed / "list.txt")) == [f"{listed}/1.jpg", f"{listed}/2.jpg"]


@pytest.mark.parametrize("header", ["image.path,label", "file.name,y.true", "a.b"])
def test_a_header_with_dots_is_no_image(listed, header):
    (listed / "list.txt").write_text(f"{header}\r\n1.jpg,0\r\n2.jpg,1\r\n")
    assert find(str(listed / "list.txt"))[0] == f"{listed}/1.jpg"
    assert len(find(str(listed / "list.txt"))) == 2


@pytest.mark.parametrize("text", ["x/1.jpg 0\nx/2.jpg 1\n", "n01440764/1 1\n"])
def test_a_list_of_nothing_that_is_there_is_refused(listed, text):
    (listed / "list.txt").write_text(text)
    with pytest.raises(ValueError, match="none of its first lines names a file.*before a label; "):
        scan(str(listed / "list.txt"))
