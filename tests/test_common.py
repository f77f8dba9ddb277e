"""common/: files that appear whole or not at all, errors in one line, what users name."""

from pathlib import Path

import pytest
import torch

from batchnorm.common.errors import first_line, one_line
from batchnorm.common.files import replacing
from batchnorm.common.names import NoSuchName, is_path, named


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "model[1].onnx"
    with replacing(file, suffix=file.suffix) as part:
        part.write_text("new")
        assert part.suffix == ".onnx"
        assert not file.exists()
    assert file.read_text() == "new"

    def half() -> None:
        with replacing(file) as part:
            part.write_text("half")
            part.with_name(f"{part.name}.data").write_text("beside it")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        half()
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == "new"


def test_an_error_in_one_line_tells_where_in_the_users_code_it_came_from() -> None:
    def theirs() -> None:
        torch.zeros(2) @ torch.zeros(3)

    for broken, said in ((theirs, r"RuntimeError: .* \(test_common.py, line \d+, in theirs\)"), (named, "TypeError: ")):
        with pytest.raises((RuntimeError, TypeError)) as raised:
            broken()
        assert "\n" not in one_line(raised.value)
        with pytest.raises(ValueError, match=said):
            raise ValueError(one_line(raised.value))
    assert one_line(ValueError("\x1b[31mred\x1b[0m\nmore")) == "ValueError: red"
    assert first_line(ValueError()) == ""


def test_names_of_users_are_found_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_a_user.py").write_text("x = 3\nclass Net:\n    size = 4\n")
    assert [named("of_a_user:x"), named("of_a_user:Net.size")] == [3, 4]
    with pytest.raises(NoSuchName, match=r"of_a_user has no y\."):
        named("of_a_user:y")
    assert [is_path(spec) for spec in ("a:b", "a:", ":b", "a.b")] == [True, False, False, False]
