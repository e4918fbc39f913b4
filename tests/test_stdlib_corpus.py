"""The library of the running Python as documents: complete, split without leaks, the same in every process."""

import itertools
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat import stdlib_corpus
from nanochat.common import UserError
from nanochat.dataset import open_corpus
from nanochat.stdlib_corpus import Document, first_sentences, read_library, train_documents, val_documents, words


def size(documents: tuple[Document, ...]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def by_name() -> dict[str, Document]:
    return {document.name: document for document in train_documents() + val_documents()}


def dedented(documents: tuple[Document, ...]) -> tuple[Document, ...]:
    return tuple(
        replace(document, text="\n".join(line.strip() for line in document.text.split("\n"))) for document in documents
    )


def leaks(train: tuple[Document, ...], val: tuple[Document, ...]) -> set[str]:
    """Runs of lines, 50 bytes or more without boilerplate, that stand on both sides. Written apart from the splitter.

    Boilerplate: imports, lines without a letter, lines that stand in four or more modules or topics.
    """
    owners: dict[str, set[str]] = {}
    for document in train + val:
        for line in document.text.split("\n"):
            owners.setdefault(line, set()).add(document.owner)

    def weight(line: str) -> int:
        words_of = line.split()
        is_import = words_of[:1] == ["import"] or (words_of[:1] == ["from"] and words_of[2:3] == ["import"])
        has_letter = any(c.isascii() and c.isalpha() for c in line)
        return 0 if is_import or not has_letter or len(owners[line]) >= 4 else len(line.encode()) + 1

    def runs(documents: tuple[Document, ...]) -> set[str]:
        found = set()
        for document in documents:
            lines = document.text.split("\n")
            for start, line in enumerate(lines):
                if weight(line) and len(owners[line]) > 1:
                    held = 0
                    for end in range(start, min(start + 60, len(lines))):
                        held += weight(lines[end])
                        if held >= 50:
                            found.add("\n".join(lines[start : end + 1]))
                            break
        return found

    return runs(train) & runs(val)


def write_library(root: Path, modules: dict[str, str]) -> None:
    """A library large enough to be one: every module is padded with lines of its own."""
    for path, text in modules.items():
        letters = ("".join(pick) for pick in itertools.product("abcdefghijklmno", repeat=3))
        padding = "".join(f"{Path(path).stem}_has_a_line_named_{word} = only_here\n" for word in letters)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + padding, encoding="utf-8")


SHARED = "def a_function_that_was_copied(from_one_module, to_another):\n    return from_one_module + to_another\n"
NAMES = [
    "abc", "argparse", "ast", "base64", "bdb", "bisect", "calendar", "cmd", "code", "codecs", "colorsys", "copy", "csv",
    "difflib", "dis", "doctest", "enum", "fileinput", "fnmatch", "ftplib", "functools", "glob", "gzip", "hashlib",
    "heapq", "hmac", "inspect", "io", "keyword", "linecache", "locale", "mailbox", "numbers", "operator", "optparse",
]  # fmt: skip


def test_the_sides_are_large_enough_and_hold_a_tenth_for_validation():
    assert size(train_documents()) > 6_000_000  # parts of the library are missing on some systems; 9.3 MB on 3.11
    assert 1_000_000 <= size(val_documents()) <= 1_500_000
    assert size(val_documents()) < 0.16 * size(train_documents())


def test_no_run_of_50_bytes_is_on_both_sides():
    assert leaks(train_documents(), val_documents()) == set()
    moved = leaks(dedented(train_documents()), dedented(val_documents()))  # to another indentation: 0.3 kB on 3.11
    assert sum(map(len, moved)) < 0.01 * size(val_documents())


def test_a_planted_leak_is_found():
    a_train_line = next(
        line
        for document in train_documents()
        for line in document.text.split("\n")
        if len(line) > 70 and not line.strip().startswith(("#", "from", "import"))
    )
    planted = Document("planted", f"x = 1\n{a_train_line}\ny = 2\n", "planted")
    assert len(leaks(train_documents(), (*val_documents(), planted))) >= 1


def test_modules_that_share_a_run_of_lines_are_on_one_side(tmp_path):
    write_library(tmp_path / "apart", {f"{name}.py": f"# the module {name} alone\n" for name in NAMES})
    apart = read_library(tmp_path / "apart")
    held_out = [document.name for document in apart.val]
    trained = [document.name for document in apart.train]
    assert held_out and trained
    copies = {held_out[0], trained[0]}
    write_library(
        tmp_path / "tied",
        {f"{name}.py": SHARED if name in copies else f"# the module {name} alone\n" for name in NAMES},
    )
    tied = read_library(tmp_path / "tied")
    sides = [{document.name for document in side} & copies for side in (tied.train, tied.val)]
    assert sorted(sides, key=len) == [set(), copies]


def test_a_package_stays_whole_and_implementations_follow_their_module():
    library = read_library()
    assert {d.name.partition(".")[0] for d in library.train}.isdisjoint(d.name.partition(".")[0] for d in library.val)
    assert {d.owner for d in library.train}.isdisjoint(d.owner for d in library.val)
    documents = by_name()
    assert documents["_pydecimal"].owner == "decimal"
    assert documents["_collections_abc"].owner == documents["collections"].owner
    assert documents["posixpath"].owner == documents["os"].owner
    assert documents["topic debugger"].owner == "pdb"


def test_topics_are_documents_on_both_sides():
    topics = [[d for d in side if d.name.startswith("topic ")] for side in (train_documents(), val_documents())]
    assert all(len(side) > 5 for side in topics)
    assert by_name()["topic assert"].text.startswith('The "assert" statement')


def test_tests_tables_and_what_is_no_library_are_left_out():
    names = set(by_name())
    assert {"json.decoder", "asyncio", "email.message"} <= names
    assert not names & {"encodings.cp437", "stringprep", "pydoc_data.topics", "html.entities", "this_is_no_module"}
    assert not any({"test", "tests", "idle_test", "site-packages", "__hello__"} & set(n.split(".")) for n in names)


def test_the_library_is_the_same_in_another_process_with_another_hash_seed():
    program = textwrap.dedent("""
        from pathlib import Path
        from nanochat.dataset import open_corpus
        corpus = open_corpus(Path("stdlib"))
        print(corpus.train.fingerprint(), corpus.val.fingerprint())
    """)
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    corpus = open_corpus(Path("stdlib"))
    assert output == [corpus.train.fingerprint(), corpus.val.fingerprint()]


def test_the_word_stdlib_opens_the_library_as_a_corpus():
    corpus = open_corpus(Path("stdlib"))
    for split, documents in ((corpus.train, train_documents()), (corpus.val, val_documents())):
        texts = [document.text for document in documents]
        assert list(split.documents()) == texts
        assert [text for block in split.blocks() for text in block.read()] == texts
    assert "standard library of Python 3." in corpus.describe()
    assert corpus.train.fingerprint() != corpus.val.fingerprint()


def test_a_folder_named_stdlib_wins_over_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stdlib").mkdir()
    Path("stdlib/a.txt").write_text("one\ntwo\nthree\nfour\n")
    assert list(open_corpus(Path("stdlib")).val.documents()) == ["four\n"]


def test_the_fingerprint_changes_with_the_content(tmp_path, monkeypatch):
    before = open_corpus(Path("stdlib")).train.fingerprint()
    source = stdlib_corpus.LibrarySource("train")
    source._texts[0] += "\n# changed"
    assert source.stamp() != stdlib_corpus.LibrarySource("train").stamp()
    assert open_corpus(Path("stdlib")).train.fingerprint() == before


@pytest.mark.parametrize("has_bytecode", [False, True])
def test_a_python_without_library_sources_is_told_so(tmp_path, has_bytecode):
    if has_bytecode:
        (tmp_path / "json").mkdir()
        (tmp_path / "json" / "decoder.pyc").write_bytes(b"\0" * 5000)
    with pytest.raises(UserError, match="no sources of its standard library") as error:
        read_library(tmp_path)
    assert "\n" not in str(error.value)
    assert "--data-dir" in str(error.value)


def test_missing_and_unreadable_parts_do_not_stop_the_rest(tmp_path):
    write_library(tmp_path, {f"{name}.py": f"# the module {name} alone\n" for name in NAMES})
    (tmp_path / "json.py").write_bytes(b"# \xff\xfe not UTF-8\n")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = broken(\n")
    library = read_library(tmp_path)
    assert {document.name for document in library.train + library.val} == set(NAMES)


def test_a_source_that_does_not_parse_has_no_docstrings():
    broken = Document("textwrap", 'def wrap(:\n    """Wrap a single paragraph."""\n', "textwrap")
    assert first_sentences([broken]) == {}


def test_words_are_whole_and_lower_case():
    document = Document("x", "The quick_brown fox jumps over2 lazy dogs, unbelievably Xylophone self.target", "x")
    assert words([document]) == [
        *("brown", "dogs", "jumps", "lazy", "over", "quick", "self", "target", "unbelievably"),
    ]
    assert len(words(train_documents())) >= 8_500  # 12,087 on 3.11


def test_first_sentences_name_functions_as_they_are_imported():
    source = textwrap.dedent('''
        def shown(a):
            """shown(a) -> int

            Tell how much
            it is. More text.
            """
        def _hidden():
            """Not for the public at all."""
        class Thing:
            """A thing that holds others; mostly."""
            def method(self):
                """Do something with the thing."""
    ''')
    found = first_sentences([Document("posixpath", source, "os"), Document("_private", source, "_private")])
    assert found == {
        "os.path.shown": "Tell how much it is.",
        "os.path.Thing": "A thing that holds others.",
    }
    assert first_sentences(train_documents())["os.path.join"].startswith("Join two or more pathname components")
