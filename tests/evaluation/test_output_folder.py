"""Where results go by default, and how new ones replace old ones."""

import pytest

from utils.evaluation.output_folder import (
    NEW,
    check_free,
    default_out,
    remove_unfinished,
    replace_results,
)
from utils.system.errors import UserError
from utils.system.files import is_file_name


def test_default_folder_has_the_names_of_the_runs():
    assert default_out(["ablation"]).as_posix() == "work_dir/eval/ablation"
    assert default_out(["first", "second"]).as_posix() == "work_dir/eval/first+second"
    odd = ["../a:b", "../a/b", "x" * 300, "x" * 301, "é" * 300]  # no plain names, or too long
    names = [default_out([name]).name for name in odd]
    assert len(set(names)) == len(odd)
    assert all(is_file_name(name) and len(name.encode()) < 255 for name in names)


def write(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old" if folder.name == "out" else "new")


@pytest.mark.parametrize("name", ["report.md", "fig4.png", "predictions/a/p1.nii.gz"])
def test_folder_with_results_is_refused(tmp_path, name):
    out = tmp_path / "out"
    check_free(out, overwrite=False)
    write(out, "notes.txt", f"{NEW}/report.md")  # no results, and what a killed process left
    check_free(out, overwrite=False)
    write(out, name)
    with pytest.raises(UserError, match="out: holds results already; .*--overwrite"):
        check_free(out, overwrite=False)
    check_free(out, overwrite=True)


def test_new_results_leave_nothing_old_beside_them_but_what_is_not_theirs(tmp_path):
    out = tmp_path / "out"
    write(out, "report.md", "volumes.csv", "predictions/a/p1.nii.gz", "predictions/b/toy/p.nii.gz")
    write(out, "notes.txt", "predictions/b/notes.txt")
    write(tmp_path, "mine/p1.nii.gz")
    (out / "predictions" / "linked").symlink_to(tmp_path / "mine")
    write(out / NEW, "report.md", "predictions/a/p2.nii.gz")
    replace_results(out)
    left = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*") if p.is_file()}
    assert left == {
        "report.md": "new",
        "predictions/a/p2.nii.gz": "new",
        "notes.txt": "old",
        "predictions/b/notes.txt": "old",
    }
    assert not (out / NEW).exists() and not (out / "predictions" / "linked").exists()
    assert (tmp_path / "mine" / "p1.nii.gz").is_file()
    write(out / NEW, "report.md")
    remove_unfinished(out)
    assert not (out / NEW).exists() and (out / "report.md").read_text() == "new"
