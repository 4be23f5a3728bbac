"""Packing: the same bytes whatever the workers, whole after any kill; splits; what is left out of damaged sets."""

import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_train.data_shards import tar
from dist_train.data_shards.decode import encode
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import check, index_shards, split_names
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.write import split_of, write_shards
from dist_train.errors import UserError


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


def rows(count: int = 60):
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (4, 4 + i % 3), dtype=np.uint8)
        yield split_of(str(i)), str(i), {"image.npy": image, "cls": i % 3, "txt": f"sample {i}"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.txt", 0),
        ("x" * 96 + ".txt", 8 << 29),
        ("b/c.npy", 123),
        ("\u00e9.txt", 5),
        ("y" * 99 + ".t", 7),
    ],
)
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert tar.header(name, size) == member.tobuf(tarfile.PAX_FORMAT)


def test_workers_change_nothing(tmp_path: Path) -> None:
    heard: list[int] = []
    for workers in (1, 4):
        write_shards(
            tmp_path / str(workers),
            "set",
            rows(),
            shard_size="8 KiB",
            workers=workers,
            progress=heard.append,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(Index.load(tmp_path / "1").split("train")) > 5 and sum(heard) == 120
    biggest = max(path.stat().st_size for path in (tmp_path / "1").glob("*.tar"))
    assert biggest <= 8 * 1024 + 2 * 512
    for size in ("8 XB", "0MiB", 0, True, "MiB"):
        with error("shard_size"):
            write_shards(tmp_path / "x", "set", rows(), shard_size=size)


def pack_and_die(at: int, out: Path, told: Path) -> None:
    """Pack, killed at the file operation number `at`, and tell how many there are."""
    count = 0

    def counted(call: Any) -> Any:
        def call_or_die(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return call_or_die

    for name in ("fsync", "open"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("replace", "rename", "open", "unlink", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    write_shards(out, "set", rows(), shard_size=7, workers=1)
    told.write_text(str(count))


def test_a_kill_at_any_file_operation_loses_nothing(tmp_path: Path, processes) -> None:
    """Killed at each of some file operations, then run again: the bytes are those of the unbroken pack."""
    write_shards(tmp_path / "whole", "set", rows(), shard_size=7)
    whole = contents(tmp_path / "whole")

    def run(at: int, out: Path) -> int | None:
        process = processes.Process(target=pack_and_die, args=(at, out, tmp_path / "told"))
        process.start()
        process.join(120)
        return process.exitcode

    assert run(0, tmp_path / "counted") == 0
    total = int((tmp_path / "told").read_text())
    assert total > 50 and contents(tmp_path / "counted") == whole
    for at in np.linspace(1, total, 12).astype(int).tolist():
        out = tmp_path / f"killed-{at}"
        assert run(at, out) == -signal.SIGKILL
        if not out.exists():
            write_shards(out, "set", rows(), shard_size=7)
        assert contents(out) == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_finished_shards_are_not_written_again(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def breaks(at: int, change: int = -1):
        for i, (_, key, fields) in enumerate(rows()):
            if i == at:
                raise Broken
            yield "train", key, {**fields, "cls": 2 if i == change else fields["cls"]}

    with pytest.raises(Broken):
        write_shards(tmp_path / "out", "set", breaks(59), shard_size=10, workers=1)
    kept = tmp_path / ".out.packing"
    times = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.tar")}
    assert len(times) >= 3
    first = kept / "set-train-000001.tar"
    first.write_bytes(first.read_bytes()[:-1])  # damaged meanwhile: written again
    (kept / "set-train-000099.tar").write_bytes(b"of other settings")
    write_shards(tmp_path / "out", "set", breaks(-1, change=25), shard_size=10)
    out = tmp_path / "out"
    again = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert again == {"set-train-000001.tar", "set-train-000002.tar"}
    assert Shards(out, "train").sample(25)["label"] == 2 and check(out) == []
    assert not kept.exists()


def pack(out: Path, told: Any) -> None:
    try:
        write_shards(out, "set", rows(), shard_size=7)
        told.put("")
    except UserError as error:
        told.put(str(error))


def test_one_process_at_a_time(tmp_path: Path, processes) -> None:
    """A second process waits for the first, and then finds the folder full."""
    told = processes.Queue()
    both = [processes.Process(target=pack, args=(tmp_path / "out", told)) for _ in range(2)]
    for process in both:
        process.start()
    said = sorted(told.get(timeout=240) for _ in both)
    for process in both:
        process.join(120)
    assert said[0] == "" and "exists already and is not an empty folder" in said[1]
    assert check(tmp_path / "out") == [] and len(list(tmp_path.iterdir())) == 1


# --- splits ----------------------------------------------------------------------------------------------------------


def test_splits_have_any_name_and_survive_an_index(tmp_path: Path) -> None:
    named = [(f"part_{i % 3}" if i % 4 else "train", str(i), {"cls": i % 2}) for i in range(40)]
    out = tmp_path / "set"
    write_shards(out, "set", named, classes=["no", "yes"], source="me", licence="MIT")
    before = Index.load(out)
    assert set(before.splits) == {"train", "part_0", "part_1", "part_2"}
    assert index_shards(out) == before
    (out / "index.json").unlink()
    after = index_shards(out)
    assert {split: after.samples(split) for split in after.splits} == {
        split: before.samples(split) for split in before.splits
    }
    assert split_names(["my-data-000000.tar", "a-train-000000.tar", "b-x-000000.tar"]) == {
        "my-data-000000.tar": "train",
        "a-train-000000.tar": "train",
        "b-x-000000.tar": "train",
    }


def test_splits_depend_on_nothing_but_keys(tmp_path: Path) -> None:
    """F9. Disjoint, and the same in another order, with other shard sizes, among other samples."""

    def keys(folder: Path) -> dict[str, set[str]]:
        splits = {split: Shards(folder, split) for split in Index.load(folder).splits}
        return {
            name: {shards.key(i) for i in range(len(shards))} for name, shards in splits.items()
        }

    forward = list(rows())
    write_shards(tmp_path / "a", "a", forward)
    write_shards(tmp_path / "b", "b", reversed(forward), shard_size=3)
    write_shards(tmp_path / "c", "c", forward[::2])
    found = keys(tmp_path / "a")
    assert keys(tmp_path / "b") == found
    assert all(part <= found[name] for name, part in keys(tmp_path / "c").items())
    assert sum(map(len, found.values())) == 60 == len(set().union(*found.values()))


# --- damage ----------------------------------------------------------------------------------------------------------


def test_300_of_300_bit_flips_are_found(tmp_path: Path) -> None:
    """Anywhere: tars, tables of offsets, index.json; each by name."""
    out = tmp_path / "set"
    write_shards(out, "set", rows(), shard_size=20)
    files = sorted(out.iterdir())
    sizes = np.array([path.stat().st_size for path in files])
    rng = np.random.default_rng(3)
    whole = contents(out)
    flips = [(files[k], int(rng.integers(8 * sizes[k]))) for k in rng.choice(len(files), 300)]
    assert {path.name for path, _ in flips} == set(whole)
    for path, bit in flips:
        damaged = bytearray(whole[path.name])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = check(out)
        except UserError as problem:
            found = [str(problem)]
        assert found and path.name in found[0], (path, bit, found)
        path.write_bytes(whole[path.name])
    assert check(out) == []


def test_an_index_changed_by_hand_is_taken_when_indexed_again(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_shards(out, "set", rows(), classes=["a", "b", "c"])
    values = json.loads((out / "index.json").read_text())
    values["classes"] = ["x", "y", "z"]
    (out / "index.json").write_text(json.dumps(values))
    with error("index.json: changed since"):
        Index.load(out)
    assert index_shards(out).classes == ["x", "y", "z"] == Index.load(out).classes


SAMPLES = [(f"{i}.{suffix}", b"%d" % (i % 3)) for i in range(8) for suffix in ("cls", "txt")]


def test_damage_is_left_out_and_counted(tmp_path: Path) -> None:
    """Cut at each 512 bytes: the samples before the cut are kept, exactly those, and the index counts the others."""
    path = tmp_path / "set" / "a-000000.tar"
    path.parent.mkdir()
    tar_of(path, SAMPLES)
    whole = path.read_bytes()
    fresh = index_shards(path.parent)
    for cut in range(0, 16 * 1024 + 1024, 512):
        (path.parent / "index.json").write_text(fresh.to_json())
        path.write_bytes(whole[:cut])
        kept = cut // 2048
        if kept == 0:
            with error("no sample is whole: .*a-000000.tar"):
                index_shards(path.parent, on_damage="skip")
            continue
        index = index_shards(path.parent, on_damage="skip")
        shards = Shards(path.parent, "train")
        assert [shards.key(i) for i in range(len(shards))] == [str(i) for i in range(min(kept, 8))]
        assert [lost.samples for lost in index.left_out] == [8 - min(kept, 8)]
        assert "truncated" in index.left_out[0].reason
        (path.parent / "index.json").unlink()
        assert index_shards(path.parent, on_damage="skip").left_out[0].samples is None


def test_samples_that_are_wrong_are_left_out(tmp_path: Path) -> None:
    cases = {
        "a.cls": [b"0", b"cat", b"7", b"-1", b"1"],  # not a number; out of range twice
    }
    folder = tmp_path / "set"
    folder.mkdir()
    files = [(f"{i}.cls", label) for i, label in enumerate(cases["a.cls"])]
    write = [*files[:3], ("x.txt", b"other fields"), *files[3:], ("0.cls", b"again")]
    tar_of(folder / "a.tar", write)
    from dist_train.data_shards.indexing import Facts

    facts = Facts("set", classes=["no", "yes"])
    with error("a.tar: sample '0' appears again at byte"):
        index_shards(folder, facts=facts)
    with error("on_damage 'skpi', did you mean 'skip'"):
        index_shards(folder, on_damage="skpi")
    index = index_shards(folder, facts=facts, on_damage="skip", decode_all=True)
    shards = Shards(folder, "train")
    assert [(shards.key(i), shards.sample(i)["label"]) for i in range(len(shards))] == [("4", 1)]
    assert [lost.samples for lost in index.left_out] == [2, 3]
    reasons = "; ".join(lost.reason for lost in index.left_out)
    for said in ("'0' appears again", "'x' at byte", "'1', field 'label'", "label 7", "label -1"):
        assert said in reasons
    assert check(folder) == []


def test_arrays_of_another_dtype_are_named(tmp_path: Path) -> None:
    arrays = [np.zeros(3, np.float32)] * 4 + [np.zeros(3)] + [np.zeros(3, np.float32)] * 2
    files = [(f"{i}.x.npy", encode("npy", array)) for i, array in enumerate(arrays)]
    tar_of(tmp_path / "0.tar", files)
    with error("0.tar: sample '4', field 'x': is float64, that of the first sample float32"):
        index_shards(tmp_path)
    with error("0.tar: sample '4', field 'x': is float64, that of others float32"):
        index_shards(tmp_path, decode_all=True)
    index = index_shards(tmp_path, decode_all=True, on_damage="skip")
    assert index.samples("train") == 6 and index.left_out[0].samples == 1


def test_a_million_claims_are_bounded(tmp_path: Path) -> None:
    """A member that claims more than there is, a header of names without end, a sparse file: all are refused."""
    import resource

    claims = []
    for kind in (
        tarfile.REGTYPE,
        tarfile.XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
    ):
        member = tarfile.TarInfo("a.txt")
        member.type, member.size = kind, 7 << 30
        claims.append(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    for claim in claims:
        (tmp_path / "0.tar").write_bytes(claim)
        with error("0.tar"):
            index_shards(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert time.monotonic() - start < 60


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.tar"
    tar_of(outside, SAMPLES)
    folder = tmp_path / "set"
    folder.mkdir()
    os.symlink(outside, folder / "0.tar")
    with error("0.tar: is a link"):
        index_shards(folder)
    (folder / "0.tar").unlink()
    tar_of(folder / "0.tar", SAMPLES)
    index_shards(folder)
    (folder / "0.tar").unlink()
    os.symlink(outside, folder / "0.tar")
    with error("0.tar: is a link"):
        Index.load(folder)


@pytest.mark.parametrize("path", ["pipe:touch {}", "|touch {}", "pipe:touch {} ; cat /etc/passwd"])
def test_no_path_is_a_command(tmp_path: Path, path: str, monkeypatch) -> None:
    """webdataset runs `pipe:` in a shell, and rewrites paths by GOPEN_REWRITE; here both are only names."""
    from dist_train.data_shards.sources import locate, pack

    canary = tmp_path / "canary"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOPEN_REWRITE", f"data=pipe:touch {canary}")
    for wanted in (path.format(canary), "data"):
        with error("no such path"):
            pack(wanted, tmp_path / "out")
        with error("nor the folder"):
            locate(wanted, tmp_path)
        with error("no such folder"):
            index_shards(wanted)
    assert not canary.exists() and not (tmp_path / "out").exists()
