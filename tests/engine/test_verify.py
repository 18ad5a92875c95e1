"""Outputs that are missing, truncated or changed are named, and their runs no longer complete."""

import json
from pathlib import Path

import pytest

from keepstill import manifest
from keepstill.__main__ import main
from keepstill.errors import InputError
from keepstill.settings import RealignSettings
from keepstill.summary import summarise
from keepstill.verify import in_words, verify

RUN, ECHO = "sub-01_task-rest", "sub-01_task-rest_echo-1"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run with two outputs, and one echo of it with one."""
    for run, names, leader_key in ((RUN, ("a.tsv", "b.txt"), ""), (ECHO, ("c.nii.gz",), "key")):
        for name in names:
            (tmp_path / name).write_text(f"content of {name}")
        outputs = manifest.describe_outputs(tmp_path, [tmp_path / name for name in names])
        manifest.write_manifest(
            tmp_path,
            manifest.Manifest(
                run, "0" * 64, 3, {}, RealignSettings(), outputs, {}, leader_key=leader_key
            ),
        )
    return tmp_path


def lines(out: Path, *, is_deep: bool = False) -> list[str]:
    return in_words(verify(out, is_deep=is_deep, n_threads=2), is_deep=is_deep)


def is_whole(out: Path, run: str) -> bool:
    return manifest.whole_manifest(out, run, is_echo=run == ECHO) is not None


@pytest.mark.parametrize("is_deep", [False, True])
def test_all_is_well(out: Path, is_deep: bool) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    how = "size and sha256" if is_deep else "size"
    assert lines(out, is_deep=is_deep) == [
        f"3 outputs of 2 runs compared by {how}: all as they were written"
    ]
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_missing_and_truncated(out: Path) -> None:
    (out / "a.tsv").unlink()
    (out / "c.nii.gz").write_text("con")
    assert lines(out) == [
        f"{RUN}: a.tsv: missing",
        f"{ECHO}: c.nii.gz: 3 of 19 bytes",
        "3 outputs of 2 runs compared by size: 2 damaged; "
        "the next call of the workflow does 2 runs again",
    ]
    assert not is_whole(out, RUN) and not is_whole(out, ECHO)


@pytest.mark.parametrize(("run", "name"), [(RUN, "b.txt"), (ECHO, "c.nii.gz")])
def test_a_flipped_byte_marks_the_run_until_it_is_mended(out: Path, run: str, name: str) -> None:
    content = (out / name).read_bytes()
    written = manifest.manifest_path(out, run, is_echo=run == ECHO).read_bytes()
    (out / name).write_bytes(content[:-1] + b"x")
    assert lines(out)[0].endswith("all as they were written")  # the size is right
    assert is_whole(out, run)
    assert lines(out, is_deep=True)[0] == f"{run}: {name}: another content (sha256)"
    assert not is_whole(out, run)
    assert lines(out)[0] == f"{run}: {name}: marked as damaged"
    (out / name).write_bytes(content)
    assert lines(out, is_deep=True)[0].endswith("all as they were written")
    assert is_whole(out, run)
    assert manifest.manifest_path(out, run, is_echo=run == ECHO).read_bytes() == written


def test_a_marked_run_is_not_in_the_summary(out: Path) -> None:
    assert summarise(out)["name"] == [RUN]
    manifest.mark_damaged(out, RUN, ["b.txt"])
    with pytest.raises(InputError, match="none of a complete run"):
        summarise(out)


def test_a_damaged_manifest_is_named(out: Path) -> None:
    path = manifest.manifest_path(out, RUN)
    path.write_text(path.read_text()[:-20])
    assert lines(out, is_deep=True)[0] == f"{RUN}: manifests/{RUN}.json: no whole manifest"
    assert lines(out)[0] == f"{RUN}: manifests/{RUN}.json: no whole manifest"


def test_a_mark_that_cannot_be_written_is_told(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest, "put_text", refuse)
    (out / "b.txt").write_text("x" * len((out / "b.txt").read_text()))
    assert lines(out, is_deep=True)[1].startswith(
        f"{RUN}: manifests/{RUN}.json: cannot be marked (Permission denied); remove it"
    )


def test_entries_that_say_nothing(out: Path) -> None:
    path = manifest.manifest_path(out, RUN)
    values = json.loads(path.read_text())
    values["outputs"] = {"a.tsv": None, "b.txt": {"bytes": 16}}
    path.write_text(json.dumps(values))
    assert lines(out, is_deep=True)[:2] == [
        f"{RUN}: a.tsv: no size and sha256 in the manifest",
        f"{RUN}: b.txt: no size and sha256 in the manifest",
    ]


def test_what_a_scope_shares_is_looked_at_too(out: Path) -> None:
    """By its content; it is no run, and all that end in it are done again."""
    path = out / "shared.nii.gz"
    path.write_bytes(b"shared")
    outputs = manifest.describe_outputs(out, [path])
    entry = manifest.shared_entry("sub-01")
    described = manifest.Manifest(entry, "0" * 64, 1, {}, RealignSettings(), outputs, {})
    manifest.write_manifest(out, described)
    (all_well,) = lines(out, is_deep=True)
    assert all_well.startswith("4 outputs of 2 runs ")
    path.write_bytes(b"SHARED")
    damaged, last = lines(out, is_deep=True)
    assert damaged == "references/sub-01: shared.nii.gz: another content (sha256)"
    assert last.endswith("does what runs share, and them, again")
    assert manifest.read_manifest(out, entry) and not manifest.whole_manifest(out, entry)


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"keepstill: {tmp_path}: no manifest found; needs an output_dir of keepstill\n"
    )
