"""GSM8K-Aug: conversion byte for byte, malformed lines, and the download script against a server of this machine."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from data import gsm
from dataset import clean_answer, extract_answer
from tokens import load_rows

# One line of each kind that the files have, or may have, and what the stock converter makes of it (written out by hand).
LINES = [
    (
        "Ann has 3 pens and buys 4.||<<3+4=7>> #### 7\n",
        '{"question": "Ann has 3 pens and buys 4.", "steps": ["<<3+4=7>>"], "answer": "7"}',
    ),
    (  # two spaces in the question stay, two between steps make an empty step
        "Two  spaces.||<<1+1=2>>  <<2*3=6>> #### 6\n",
        '{"question": "Two  spaces.", "steps": ["<<1+1=2>>", "", "<<2*3=6>>"], "answer": "6"}',
    ),
    ("No steps?|| #### 12\n", '{"question": "No steps?", "steps": [""], "answer": "12"}'),
    ("None, tight||####-3\n", '{"question": "None, tight", "steps": [""], "answer": "-3"}'),
    (
        "Sold for $1,200.||<<600*2=1200>> #### 1,200\n",
        '{"question": "Sold for $1,200.", "steps": ["<<600*2=1200>>"], "answer": "1,200"}',
    ),
    ("Debt||<<5-8=-3>> #### -3\n", '{"question": "Debt", "steps": ["<<5-8=-3>>"], "answer": "-3"}'),
    ("Bus #9 and ## signs||<<9=9>> #### 9\n", '{"question": "Bus #9 and ## signs", "steps": ["<<9=9>>"], "answer": "9"}'),
    ("A|B||<<1=1>>||<<2=2>> #### 2\n", '{"question": "A|B", "steps": ["<<1=1>>"], "answer": "2"}'),
    ("Hash||<<1=1>> ## no ## 5\n", '{"question": "Hash", "steps": ["<<1=1>>"], "answer": "5"}'),
    ("Odd||<<1=1>> ### 5\n", '{"question": "Odd", "steps": ["<<1=1>>"], "answer": "# 5"}'),
    (
        "\u00c9lodie\u2019s \u20ac\u2028 and\ttab||<<.5*4=2.0>> #### 2\n",
        '{"question": "\\u00c9lodie\\u2019s \\u20ac\\u2028 and\\ttab", "steps": ["<<.5*4=2.0>>"], "answer": "2"}',
    ),
    (  # CRLF ends a line as LF does
        "Windows||<<4/2=2>> #### 2\r\n",
        '{"question": "Windows", "steps": ["<<4/2=2>>"], "answer": "2"}',
    ),
    (' "Quoted" \\ || <<7-7=0>> ####  0 ', '{"question": " \\"Quoted\\" \\\\ ", "steps": ["<<7-7=0>>"], "answer": "0"}'),
]
TEXT = "".join(line for line, _ in LINES)
JSON = "[" + ", ".join(row for _, row in LINES) + "]"


def run(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "data/gsm.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def write(path: Path, text: str = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


# ---------------------------------------------------------------- conversion


def test_bytes_are_those_of_the_stock_converter(tmp_path):
    raw, out = write(tmp_path / "gsm_valid.txt"), tmp_path / "gsm_valid.json"
    done = run("--raw", raw, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == JSON.encode("ascii")
    assert raw.read_bytes() == TEXT.encode(), "the text file stays"
    assert "13 rows; steps 0:2 1:10 2:1; 3 with an empty step; 1 with a comma in the answer" in done.stdout


@pytest.mark.parametrize("i", range(len(LINES)))
def test_each_quirk_alone(i, tmp_path):
    (row,) = gsm.convert_file(write(tmp_path / "one.txt", LINES[i][0]))
    assert json.dumps(row) == LINES[i][1]


def test_rows_load_and_their_gold_answers_score(tmp_path):
    gsm.main(["--raw", str(write(tmp_path / "gsm_test.txt")), "--out", str(tmp_path)])
    rows = load_rows(tmp_path / "gsm_test.json")
    assert [clean_answer(row["answer"]) for row in rows[:6]] == ["7", "6", "12", "-3", "1200", "-3"]
    for row in rows:
        if "#" not in row["answer"]:
            continuation = "\n".join([*row["steps"], "### " + row["answer"]])
            assert extract_answer(continuation) == clean_answer(row["answer"])


def test_empty_steps_are_dropped_on_request_only(tmp_path):
    raw = write(tmp_path / "part.txt", "a|| #### 1\nb||<<1=1>>  <<2=2>> #### 2\n")
    kept, dropped = gsm.convert_file(raw), gsm.convert_file(raw, drop_empty_steps=True)
    assert [row["steps"] for row in kept] == [[""], ["<<1=1>>", "", "<<2=2>>"]]
    assert [row["steps"] for row in dropped] == [[], ["<<1=1>>", "<<2=2>>"]]
    assert run("--raw", raw, "--out", tmp_path / "part.json", "--drop-empty-steps").returncode == 0
    assert json.loads((tmp_path / "part.json").read_text()) == dropped


def test_a_folder_gives_three_files_and_keeps_or_deletes_its_texts(tmp_path):
    lines = {split: f"{split}||<<{i}+1={i + 1}>> #### {i + 1}\n" for i, split in enumerate(gsm.SPLITS)}
    for names in ("{}.txt", "gsm_{}.txt"):
        folder, out = tmp_path / names[:3], tmp_path / f"out-{names[:3]}"
        for split, line in lines.items():
            write(folder / names.format(split), line)
        assert run("--raw", folder, "--out", out).returncode == 0
        assert sorted(path.name for path in out.iterdir()) == ["gsm_test.json", "gsm_train.json", "gsm_valid.json"]
        assert json.loads((out / "gsm_valid.json").read_text()) == gsm.convert([lines["valid"]])
        assert len(list(folder.iterdir())) == 3
        assert run("--raw", folder, "--out", out, "--delete-raw").returncode == 0
        assert not list(folder.iterdir())


def test_importing_does_nothing_and_the_default_place_is_data(tmp_path):
    assert gsm.plan(write(tmp_path / "train.txt"), None) == {tmp_path / "train.txt": Path("data/gsm_train.json")}
    source = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data.gsm, os; print(os.listdir())"
    shown = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "['train.txt']"


# ---------------------------------------------------------------- mistakes


def test_all_malformed_lines_are_named_with_file_and_number(tmp_path):
    raw = write(tmp_path / "gsm_train.txt", "good||<<1=1>> #### 1\nno bars #### 1\n\nhash ## before|| <<1=1>>\n")
    out = tmp_path / "gsm_train.json"
    out.write_text("old")
    done = run("--raw", raw, "--out", out, "--delete-raw")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert f"{raw}: malformed lines 2 (no ||), 3 (is blank), 4 (no ## after ||); a line is" in done.stderr
    assert out.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["gsm_train.json", "gsm_train.txt"]


def test_ten_malformed_lines_are_shown_and_the_others_counted():
    with pytest.raises(ValueError, match=r"^malformed lines 1 \(no \|\|\), .*10 \(no \|\|\) and 15 more; "):
        gsm.convert(["x\n"] * 25)
    with pytest.raises(ValueError, match=r"^malformed line 2 \(no ## after \|\|\); "):
        gsm.convert(["q||#### 1\n", "q||<<1=1>> # 1\n"])


def test_one_bad_file_of_a_folder_leaves_all_unwritten(tmp_path):
    for split in gsm.SPLITS:
        write(tmp_path / "raw" / f"{split}.txt", "q||<<1=1>> #### 1\n" if split != "test" else "q\n")
    done = run("--raw", tmp_path / "raw", "--out", tmp_path / "out", "--delete-raw")
    assert done.returncode == 2 and "test.txt: malformed line 1" in done.stderr
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "raw").iterdir())) == 3


def test_a_file_that_cannot_be_written_leaves_the_others_as_they_were(tmp_path):
    old, new, folder = tmp_path / "old.json", tmp_path / "c" / "new.json", tmp_path / "folder.json"
    old.write_text("old")
    folder.mkdir()
    for impossible, error in ((old / "x.json", OSError), (folder, ValueError)):
        with pytest.raises(error):
            gsm.write_whole({old: "new", new: "new", impossible: "new"})
        assert old.read_text() == "old" and not new.exists() and not list(tmp_path.rglob(".tmp-*"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n"


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        (POINTER, [], "is a Git LFS pointer of 73 bytes, not the data"),
        ("", [], "is empty"),
        ("ok||<<1=1>> #### 1\n", ["--expect-rows", "2"], "has 1 rows, 2 are expected"),
        ("ok||<<1=1>> #### 1\n", ["--expect-rows", "1", "2"], "2 numbers for 1 files"),
    ],
)
def test_mistakes_give_one_line_and_exit_2(text, args, message, tmp_path):
    raw = write(tmp_path / "gsm_test.txt", text)
    done = run("--raw", raw, "--out", tmp_path / "out.json", *args)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["gsm_test.txt"]


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    raw = tmp_path / "gsm_test.txt"
    raw.write_bytes(b"ok||<<1=1>> #### 1\nq\xff||<<1=1>> #### 1\n")
    with pytest.raises(ValueError, match="gsm_test.txt: line 2 is not UTF-8"):
        gsm.convert_file(raw)


def test_names_that_tell_no_split_need_an_out(tmp_path):
    raw = write(tmp_path / "arith_gsm_train.txt")
    with pytest.raises(ValueError, match="name the file to write with --out"):
        gsm.plan(raw, None)
    with pytest.raises(ValueError, match="must be a JSON file for arith_gsm_train.txt"):
        gsm.plan(raw, tmp_path)
    with pytest.raises(ValueError, match="is a folder of three files"):
        gsm.plan(tmp_path, tmp_path / "x.json")
    with pytest.raises(ValueError, match="no gsm_train.txt or train.txt, no gsm_valid.txt or valid.txt, no gsm_test.txt or"):
        gsm.plan(tmp_path, None)
    with pytest.raises(ValueError, match="nothing.txt does not exist; bash scripts/get_gsm8k.sh"):
        gsm.plan(tmp_path / "nothing.txt", None)


# ---------------------------------------------------------------- download

FILES = {f"/{split}.txt": f"{split} \u20ac||<<1+1=2>> #### 2\n".encode() * n for split, n in zip(gsm.SPLITS, (400, 30, 50))}
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`. `asked`: (path, Range header) of each request. `ranges`: sends parts; `breaks`: ends within train.txt."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.ranges, self.breaks = dict(FILES), [], True, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        breaks = server.breaks and self.path == "/train.txt"
        self.wfile.write(content[start : start + 1000] if breaks else content[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path):
    """get(*arguments): the script, in a folder with a space in its name, with what it must expect of these files."""
    table = [
        f"{path[1:]} {len(content)} {hashlib.sha256(content).hexdigest()} {content.count(10)}" if path == "/train.txt"
        else f"{path[1:]} - - {content.count(10)}"
        for path, content in FILES.items()
    ]  # fmt: skip
    expect = tmp_path / "expect"
    expect.write_text("\n".join(table) + "\n")

    def call(*arguments, url=server.url):
        command = ["bash", "scripts/get_gsm8k.sh", "--out", str(tmp_path / "my data"), "--base-url", url]
        environment = {**os.environ, "PYTHON": sys.executable, "no_proxy": "127.0.0.1"}
        command += ["--expect", str(expect), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)

    return call


@needs_curl
def test_three_files_come_and_are_converted(get, server, tmp_path):
    done = get()
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "my data")) == ["gsm8k.sha256", "gsm_test.json", "gsm_train.json", "gsm_valid.json"]
    rows = load_rows(tmp_path / "my data/gsm_train.json")
    assert len(rows) == 400 and rows[0] == {"question": "train \u20ac", "steps": ["<<1+1=2>>"], "answer": "2"}
    assert [path for path, _ in server.asked] == list(FILES)

    assert get().returncode == 0 and len(server.asked) == 3, "what is there is not downloaded again"
    assert get("--force", "--keep-text").returncode == 0 and len(server.asked) == 6
    assert (tmp_path / "my data/gsm_test.txt").read_bytes() == FILES["/test.txt"]
    assert get("--force").returncode == 0 and len(server.asked) == 6, "texts that were kept are used"


@needs_curl
@pytest.mark.parametrize("ranges", [True, False], ids=["parts", "no parts"])
def test_a_broken_download_goes_on_where_it_stopped(ranges, get, server, tmp_path):
    server.breaks = True
    done = get()
    assert done.returncode == 2 and "the connection broke within train.txt (1000 bytes came)" in done.stderr
    assert (tmp_path / "my data/gsm_train.txt.part").read_bytes() == FILES["/train.txt"][:1000]
    server.breaks, server.ranges, server.asked = False, ranges, []
    assert get("--keep-text").returncode == 0
    assert server.asked[0] == ("/train.txt", "bytes=1000-")
    assert server.asked.count(("/train.txt", None)) == (0 if ranges else 1)
    assert (tmp_path / "my data/gsm_train.txt").read_bytes() == FILES["/train.txt"]


@needs_curl
def test_a_download_that_was_whole_but_not_yet_checked_is_used(get, server, tmp_path):
    for name in ("train", "valid"):  # of one the size is known, of the other the server says that there is no more
        write(tmp_path / f"my data/gsm_{name}.txt.part", FILES[f"/{name}.txt"].decode())
    done = get()
    assert done.returncode == 0, done.stderr
    assert [path for path, _ in server.asked] == ["/valid.txt", "/valid.txt", "/test.txt"]
    assert len(load_rows(tmp_path / "my data/gsm_valid.json")) == 30


@needs_curl
@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("/train.txt", POINTER.encode(), "train.txt is a Git LFS pointer, not the data"),
        ("/train.txt", FILES["/train.txt"] + b"more\n", "train.txt has 11205 bytes, must have 11200"),
        ("/train.txt", FILES["/train.txt"].replace(b"train", b"traim"), "train.txt has the SHA-256"),
        ("/valid.txt", FILES["/valid.txt"] * 2, "gsm_valid.txt has 60 rows, 30 are expected"),
        ("/test.txt", None, "/test.txt answers with 404"),
    ],
    ids=["pointer", "size", "sha256", "rows", "missing"],
)
def test_wrong_files_are_refused(path, content, message, get, server, tmp_path):
    server.files[path] = content
    done = get()
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not list((tmp_path / "my data").glob("*.json")) and not (tmp_path / "my data/gsm_train.txt.part").exists()


@needs_curl
def test_another_file_than_last_time_is_refused(get, server, tmp_path):
    assert get().returncode == 0
    server.files["/test.txt"] = FILES["/test.txt"].replace(b"test", b"tset")
    done = get("--force")
    assert done.returncode == 2 and "test.txt is not what came before" in done.stderr
    before = json.loads((tmp_path / "my data/gsm_test.json").read_text())
    assert before[0]["question"].startswith("test"), "the rows of last time stay"


@needs_curl
def test_without_a_network_the_stand_in_is_named(get, tmp_path):
    done = get(url="http://127.0.0.1:9")
    assert done.returncode == 2 and "no network" in done.stderr and "python data/arithmetic.py" in done.stderr
    assert not list((tmp_path / "my data").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out"], "--out needs a value"),
        (["--where", "x"], "unknown argument --where"),
        (["--expect", "nowhere"], "cannot be read"),
    ],
)
def test_mistakes_of_the_scripts_user(arguments, message):
    done = subprocess.run(["bash", "scripts/get_gsm8k.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr


def test_the_scripts_help_is_its_head():
    shown = subprocess.run(["bash", "scripts/get_gsm8k.sh", "-h"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "[--keep-text]" in shown.stdout and "stand-in" in shown.stdout
    assert "set -euo" not in shown.stdout
