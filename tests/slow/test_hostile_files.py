"""Files that would run code if anything unpickled them, in every disguise: none does, each is refused in one line."""

import contextlib
import io
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toughen import data
from toughen.data.generated import read_extra
from toughen.data.settings import DataSettings
from toughen.engine import checkpoint
from toughen.errors import InputError
from toughen.models import create, read_weights
from toughen.models.weights import load_weights

MARK = "executed"
TOUCH = f"open({MARK!r}, 'w').close()"


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.plan = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.plan


class Named:
    """A global that pickles by a name of our choosing, whether it can be imported here or not."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


def by_hand(module: str, name: str, *arguments: bytes, protocol: int = 0) -> bytes:
    """The pickle that calls ``module.name(*arguments)``, written without importing it."""
    if protocol >= 4:
        words = [b"\x8c" + bytes([len(word)]) + word for word in (module.encode(), name.encode())]
        return b"\x80\x04" + b"".join(words) + b"\x93(" + b"".join(b"V" + a + b"\n" for a in arguments) + b"tR."
    head = b"" if protocol == 0 else b"\x80\x02"
    return head + f"c{module}\n{name}\n(".encode() + b"".join(b"V" + a + b"\n" for a in arguments) + b"tR."


def chained(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"0".join(steps) + b"."


def gadgets() -> dict[str, bytes]:
    """Pickles that leave a mark in the current folder when they are loaded."""
    shell, code = f"touch {MARK}".encode(), TOUCH.encode()
    found = {
        f"{module}.{name}, protocol {protocol}": by_hand(module, name, argument, protocol=protocol)
        for protocol in (0, 2, 4)
        for module, name, argument in [
            ("os", "system", shell),
            ("posix", "system", shell),
            ("os", "popen", shell),
            ("builtins", "eval", code),
            ("builtins", "exec", code),
            ("__builtin__", "eval", code),
            ("subprocess", "getoutput", shell),
            ("subprocess", "check_output", shell),
            ("timeit", "timeit", code),
            ("runpy", "run_path", b"payload.py"),
            ("pdb", "run", code),
            ("code", "interact", code),
            ("importlib", "import_module", b"payload"),
            ("torch.hub", "load", b"."),
            ("torch.utils.collect_env", "run", shell),
            ("torch.serialization", "load", b"inner.pt"),
            ("numpy.testing._private.utils", "runstring", code),
            ("pickle", "loads", code),
            ("_pickle", "loads", code),
            ("marshal", "loads", code),
            ("pathlib", "Path.touch", MARK.encode()),
            ("toughen.cli", "main", b"list"),
            ("toughen.models.weight_files", "read_weights", b"inner.pt"),
        ]
    }
    getattr_chain = (
        b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntRV__call__\ntR(V"
        + shell
        + b"\ntR"
    )
    found["getattr of getattr"] = chained(getattr_chain)
    found["getattr of an allowed class"] = chained(
        b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nV__init__\ntR", by_hand("os", "system", shell)[:-1]
    )
    found["INST"] = b"(V" + shell + b"\nios\nsystem\n."
    found["OBJ"] = b"(cos\nsystem\nV" + shell + b"\no."
    found["NEWOBJ"] = b"\x80\x02cos\nsystem\n(V" + shell + b"\nt\x81."
    found["EXT1"] = b"\x80\x02\x82\x01."
    found["BUILD"] = b"\x80\x02ccollections\nOrderedDict\n)R}(V__setstate__\ncos\nsystem\nubV" + shell + b"\nb."
    found["REDUCE of a persistent id"] = b"Vos.system\nQ(V" + shell + b"\ntR."
    found["a weight, then a call"] = pickle.dumps({"weight": 1.0, "more": Calls(eval, TOUCH)})
    found["a call that is a dictionary's key"] = pickle.dumps({Calls(eval, TOUCH): 1})
    found["the state of a parameter"] = pickle.dumps(
        Calls(torch._utils._rebuild_parameter_with_state, torch.zeros(1), True, {}, Calls(eval, TOUCH))
    )
    found["a type of a tensor"] = pickle.dumps(Calls(torch._tensor._rebuild_from_type_v2, exec, dict, (TOUCH,), {}))
    found["a constructor of modules"] = pickle.dumps(Calls(torch.nn.Module.__new__, Calls(eval, TOUCH)))
    found["a module"] = pickle.dumps(torch.nn.Linear(2, 2))
    found["numpy's reconstruct, with a call in its state"] = pickle.dumps(
        Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), Calls(eval, TOUCH), False, []))
    )
    found["numpy's scalar of objects"] = pickle.dumps(
        Calls(np._core.multiarray.scalar, np.dtype("O"), Calls(eval, TOUCH))
    )
    found["an array of objects"] = pickle.dumps(np.array([Calls(eval, TOUCH)], dtype=object))
    found["a pickle in a pickle"] = pickle.dumps(Calls(pickle.loads, pickle.dumps(Calls(eval, TOUCH))))
    found["argparse's settings with a call"] = pickle.dumps({"args": Calls(eval, TOUCH), "state_dict": {}})
    return found


def in_torch(content: bytes, *, name: str = "archive/data.pkl") -> bytes:
    """A torch archive whose pickle is this one."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def in_old_torch(content: bytes) -> bytes:
    """The file that torch wrote before it used archives: magic number, version, machine, then the pickle."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    facts = pickle.dumps({"little_endian": True, "protocol_version": 1001, "type_sizes": {}}, protocol=2)
    return magic + pickle.dumps(1001, protocol=2) + facts + content + pickle.dumps([], protocol=2)


def in_tar(content: bytes) -> bytes:
    """The oldest of torch's files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def in_npz(content: bytes, *, member: str = "image.npy") -> bytes:
    """An npz archive, one member of which claims to hold Python objects."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    other = io.BytesIO()
    np.save(other, np.zeros((1, 2, 2, 3), np.uint8) if member == "label.npy" else np.zeros(1, np.int64))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, header.getvalue() + content)
        archive.writestr("label.npy" if member == "image.npy" else "image.npy", other.getvalue())
    return out.getvalue()


def in_safetensors(content: bytes) -> bytes:
    """A pickle behind the length and the first letter of a safetensors header."""
    return len(content).to_bytes(8, "little") + b"{" + content


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "bare": bytes,
    "torch archive": in_torch,
    "old torch file": in_old_torch,
    "tar": in_tar,
    "npz": in_npz,
    "safetensors": in_safetensors,
}
SUFFIXES = (".pt", ".pth", ".pkl", ".safetensors", ".npz", ".bin", ".ckpt", ".png")


def opened(file: Path) -> Iterator[Callable[[], object]]:
    """Everything that reads such a file, by the name that it has."""
    model = create("small_cnn", seed=0, width=2)
    yield lambda: read_weights(file)
    yield lambda: load_weights(model, file)
    yield lambda: create("small_cnn", width=2, weights=file)
    yield lambda: read_extra(str(file), classes=("a", "b"), image_shape=(3, 2, 2))


def disguised(content: bytes, folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """The file among data, in the place of images and tables."""
    for kind, name in (("folder", "train/a/0.png"), ("folder", "train/b/0.jpg"), ("parquet", "train-0.parquet")):
        root = folder / kind / name.replace("/", "_")
        for each in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png"):
            (root / each).parent.mkdir(parents=True, exist_ok=True)
            (root / each).write_bytes(content)
        (root / name).write_bytes(content)
        (root / "test-0.parquet").write_bytes(content)
        settings = DataSettings(name=kind, path=str(root), validation=1)
        yield f"{kind}, {name}", lambda settings=settings: data.load(settings)
    for name in ("data_batch_1.bin", "train/data.bin", "data_batch_1"):
        root = folder / "cifar10" / name.replace("/", "_")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        settings = DataSettings(name="cifar10", path=str(root))
        yield f"cifar10, {name}", lambda settings=settings: data.load(settings)


def in_checkpoint(content: bytes, folder: Path) -> Callable[[], object]:
    """A checkpoint that somebody sent, its sums in order."""
    place = folder / "checkpoints" / "last"
    place.mkdir(parents=True, exist_ok=True)
    model = create("small_cnn", seed=0, width=2)
    (place / checkpoint.WEIGHTS).write_bytes(content)
    (place / checkpoint.STATE).write_bytes(content)
    (place / checkpoint.SUMS).write_text(checkpoint._sums(place))
    return lambda: checkpoint.load(place, model)


def refused(open_it: Callable[[], object], form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError) as caught:
            open_it()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, form
    assert message.isprintable(), form
    assert not Path(MARK).exists(), form


def try_all(folder: Path, *, every: int) -> Counter[str]:
    """Open each ``every``-th combination of gadget, wrapping and name."""
    (folder / "payload.py").write_text(TOUCH)
    (folder / "hubconf.py").write_text(TOUCH)
    counts: Counter[str] = Counter()
    chosen = list(gadgets().items())
    counts["gadgets"] = len(chosen)
    combinations = [(g, w, s) for g in chosen for w in WRAPPED.items() for s in SUFFIXES]
    for (gadget, content), (wrapping, wrap), suffix in combinations[::every]:
        file = folder / f"file{suffix}"
        file.write_bytes(wrap(content))
        for open_it in opened(file):
            refused(open_it, f"{gadget} in {wrapping} as {suffix}")
            counts["tried"] += 1
    for number, ((gadget, content), (wrapping, wrap)) in enumerate(
        [(g, w) for g in chosen for w in WRAPPED.items()][:: 4 * every]
    ):
        place = folder / str(number)
        for form, open_it in disguised(wrap(content), place):
            refused(open_it, f"{gadget} in {wrapping}: {form}")
            counts["tried"] += 1
        refused(in_checkpoint(wrap(content), place), f"{gadget} in {wrapping}: checkpoint")
        counts["tried"] += 1
    return counts


def test_the_gadgets_do_run_where_files_are_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    armed = [name for name, content in gadgets().items() if _leaves_a_mark(content, tmp_path / MARK)]

    assert len(armed) >= 20, armed  # the others are malformed, or need what is not installed


def _leaves_a_mark(content: bytes, mark: Path) -> bool:
    source = [str(arg) for _, arg, _ in pickletools.genops(content) if isinstance(arg, str)]
    if any(
        word in " ".join(source)
        for word in ("interact", "hub", "pdb", "toughen", "runpy", "collect_env", "popen", "timeit")
    ):
        return False  # these wait for a terminal, leave files open, or take long
    with contextlib.suppress(BaseException):
        pickle.loads(content)
    ran = mark.exists()
    mark.unlink(missing_ok=True)
    return ran


def test_a_few_hostile_files_are_refused_without_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert try_all(tmp_path, every=97)["tried"] > 100


@pytest.mark.slow
def test_hostile_files_of_every_form_are_refused_without_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = try_all(tmp_path, every=3)

    print(
        f"\nhostile files: {counts['gadgets']} gadgets, tried {counts['tried']}, refused in one line {counts['tried']},"
        " executed 0, lost 0, tracebacks 0"
    )
