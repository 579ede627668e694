"""What travels to a machine without a network: trimmed wheels, and parts that are joined there."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

GPU = Path(__file__).parent
sys.path.insert(0, str(GPU))

import trim_wheel  # noqa: E402

MEMBERS = {
    "sgl_kernel/__init__.py": b"VALUE = 1\n",
    "sgl_kernel/flash_ops.abi3.so": b"f" * 1000,
    "sgl_kernel/infllm_ops.cpython-310-x86_64-linux-gnu.so": b"i" * 10,
    "sgl_kernel/flash_attn.py": b"from sgl_kernel import flash_ops\n",
    "sgl_kernel/sm90/common_ops.abi3.so": b"h" * 100,
    "sgl_kernel/sm100/common_ops.abi3.so": b"b" * 100,
    "sglang_kernel-0.4.5.dist-info/METADATA": b"Metadata-Version: 2.1\nName: sglang-kernel\n"
    b"Version: 0.4.5\n",
    "sglang_kernel-0.4.5.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
    b"Tag: py3-none-any\n",
}
RECORD = "sglang_kernel-0.4.5.dist-info/RECORD"
NAME = "sglang_kernel-0.4.5-py3-none-any.whl"


def make_wheel(folder: Path, **spoilt: bytes) -> Path:
    """A wheel by hand; `spoilt`: other content than RECORD says, by the file's stem."""
    path = folder / NAME
    lines = [f"{name},{trim_wheel.digest(data)},{len(data)}" for name, data in MEMBERS.items()]
    with zipfile.ZipFile(path, "w") as wheel:
        for name, data in MEMBERS.items():
            wheel.writestr(name, spoilt.get(Path(name).stem, data))
        wheel.writestr(RECORD, "\n".join([*lines, f"{RECORD},,"]) + "\n")
    return path


def test_a_digest_is_as_record_has_it() -> None:
    """By hand: SHA-256 of nothing is e3b0c442…, in URL-safe base 64 without padding."""
    assert trim_wheel.digest(b"") == "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"


class TestTrim:
    def test_what_hopper_needs_stays(self, tmp_path: Path) -> None:
        wheel, out = make_wheel(tmp_path), tmp_path / "small"
        assert trim_wheel.main([str(wheel), "--out", str(out)]) == 0
        with zipfile.ZipFile(out / NAME) as small:
            names = set(small.namelist())
            gone = set(MEMBERS) - names
            assert gone == {
                "sgl_kernel/flash_ops.abi3.so",
                "sgl_kernel/infllm_ops.cpython-310-x86_64-linux-gnu.so",
                "sgl_kernel/sm100/common_ops.abi3.so",
            }
            assert all(small.read(name) == MEMBERS[name] for name in names - {RECORD})
            rows = list(csv.reader(io.StringIO(small.read(RECORD).decode())))
        assert {row[0] for row in rows} == names
        assert {row[0]: row[1] for row in rows if row[1]} == {
            name: trim_wheel.digest(MEMBERS[name]) for name in names - {RECORD}
        }

    def test_it_can_be_installed(self, tmp_path: Path) -> None:
        out, target = tmp_path / "small", tmp_path / "site"
        trim_wheel.main([str(make_wheel(tmp_path)), "--out", str(out)])
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(target), str(out / NAME)], check=True)
        told = subprocess.run(
            [sys.executable, "-c", "import sgl_kernel; print(sgl_kernel.VALUE)"],
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout == "1\n"

    def test_a_damaged_member_is_refused(self, tmp_path: Path) -> None:
        wheel = make_wheel(tmp_path, __init__=b"VALUE = 2\n")
        with pytest.raises(trim_wheel.BadWheel, match=r"__init__\.py has sha256=.*RECORD says"):
            trim_wheel.trim(wheel, tmp_path / "out.whl", [])
        assert not (tmp_path / "out.whl").exists()

    def test_other_members_by_name(self, tmp_path: Path) -> None:
        gone = trim_wheel.trim(make_wheel(tmp_path), tmp_path / "out.whl", ["*.py"])
        assert gone == ["sgl_kernel/__init__.py", "sgl_kernel/flash_attn.py"]


class TestStore:
    """setup_offline.sh --only-store: bundles come in any order, one by one."""

    @pytest.fixture
    def whole(self) -> bytes:
        return bytes(range(256)) * 40

    @pytest.fixture
    def bundles(self, tmp_path: Path, whole: bytes) -> list[Path]:
        found = []
        for number in range(3):
            bundle = tmp_path / f"bundle{number}"
            bundle.mkdir()
            part = whole[number * 4000 : (number + 1) * 4000]
            (bundle / f"a-1-py3-none-any.whl.part{number:03}").write_bytes(part)
            found.append(bundle)
        total = hashlib.sha256(whole).hexdigest()
        (found[1] / "a-1-py3-none-any.whl.sha256").write_text(f"3 {total}\n")
        return found

    def take(self, store: Path, *bundles: Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(GPU / "setup_offline.sh"), "--only-store", "--store", str(store)]
        return subprocess.run([*command, *map(str, bundles)], capture_output=True, text=True)

    def test_parts_are_joined_when_all_are_there(
        self, tmp_path: Path, bundles: list[Path], whole: bytes
    ) -> None:
        store = tmp_path / "store"
        wheel = store / "a-1-py3-none-any.whl"
        assert self.take(store, bundles[2]).returncode == 0
        done = self.take(store, bundles[1])
        assert "parts are missing of: a-1-py3-none-any.whl" in done.stdout
        assert not wheel.exists()
        assert self.take(store, bundles[0]).returncode == 0
        assert wheel.read_bytes() == whole
        assert self.take(store, *bundles).returncode == 0, "again, nothing is to do"
        assert wheel.read_bytes() == whole
        left = {path.name for path in store.iterdir()}
        assert left == {"built", wheel.name, f"{wheel.name}.sha256"}

    def test_a_damaged_part_is_asked_for_again(
        self, tmp_path: Path, bundles: list[Path], whole: bytes
    ) -> None:
        store = tmp_path / "store"
        part = bundles[0] / "a-1-py3-none-any.whl.part000"
        good = part.read_bytes()
        part.write_bytes(b"x" + good[1:])
        done = self.take(store, *bundles)
        assert done.returncode == 1
        assert "bring them again" in done.stderr
        part.write_bytes(good)
        assert self.take(store, *bundles).returncode == 0
        assert (store / "a-1-py3-none-any.whl").read_bytes() == whole

    def test_a_bundle_that_is_none(self, tmp_path: Path) -> None:
        done = self.take(tmp_path / "store", tmp_path / "nowhere")
        assert done.returncode == 2
        assert "no bundle" in done.stderr


class TestInstall:
    """setup_offline.sh with a stand-in for torch, a wheel and a source package by hand."""

    @pytest.fixture
    def given(self, tmp_path: Path) -> dict[str, str]:
        """The environment, whose torch says that it is one."""
        for module in ("torch", "megatron/core"):
            folder = tmp_path / "stub" / module
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text('__version__ = "a stand-in"\n')
        return {**os.environ, "PYTHONPATH": str(tmp_path / "stub"), "PYTHON": sys.executable}

    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        folder = tmp_path / "store"
        folder.mkdir()
        about = "annotated_types-0.8.0.dist-info"
        with zipfile.ZipFile(folder / "annotated_types-0.8.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("annotated_types/__init__.py", "VALUE = 3\n")
            wheel.writestr(
                f"{about}/METADATA",
                "Metadata-Version: 2.1\nName: annotated-types\nVersion: 0.8.0\n",
            )
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "annotated_types/__init__.py,,\n")
        source = tmp_path / "antlr4-python3-runtime-4.9.3"
        source.mkdir()
        (source / "setup.py").write_text(
            "from setuptools import setup\n"
            "setup(name='antlr4-python3-runtime', version='4.9.3', py_modules=['antlr4'])\n"
        )
        (source / "antlr4.py").write_text("VALUE = 4\n")
        with tarfile.open(folder / f"{source.name}.tar.gz", "w:gz") as archive:
            archive.add(source, source.name)
        return folder

    def test_what_is_in_the_store_is_installed_once(
        self, tmp_path: Path, store: Path, given: dict[str, str]
    ) -> None:
        site = tmp_path / "site"
        command = [
            "bash",
            str(GPU / "setup_offline.sh"),
            "--store",
            str(store),
            "--site",
            str(site),
        ]
        first = subprocess.run(command, env=given, capture_output=True, text=True)
        assert first.returncode == 0, first.stderr
        assert (site / "train" / "annotated_types" / "__init__.py").exists()
        assert (site / "train" / "antlr4.py").exists()
        assert "torch: a stand-in" in first.stdout
        assert "sglang: not importable: ModuleNotFoundError" in first.stdout
        told = subprocess.run(
            ["bash", "-c", f". {site}/env; echo $PYTHONPATH $SGLANG_PYTHON"],
            env=given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.split()[0].startswith(f"{site}/train:")
        stamps = {path: path.stat().st_mtime_ns for path in site.glob("train/.installed-*")}
        assert len(stamps) == 2
        subprocess.run(command, env=given, capture_output=True, check=True)
        again = {path: path.stat().st_mtime_ns for path in site.glob("train/.installed-*")}
        assert again == stamps, "nothing was installed twice"
