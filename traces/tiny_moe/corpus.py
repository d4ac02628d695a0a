"""Build the training text from Debian packages: four kinds of text, split by document into train and held-out.

    python -m moeflow.traces.tiny_moe.corpus WORK

Fetches the packages named in `SOURCES` with `apt-get download`, unpacks them below WORK without installing them, and
writes `WORK/train_KIND.jsonl` and `WORK/heldout_KIND.jsonl` (one document per line: source, name, text) and
`WORK/sources.json` (package, version, licence, documents and bytes). Needs a Debian system with `apt-get` and
`dpkg-deb`. The same package versions give the same bytes.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("prose", "dialogue", "docs", "code")
HELD_OUT = {"prose": 50, "dialogue": 20, "docs": 50, "code": 50}  # one document in so many is held out
LONGEST = 60_000  # characters kept of one document
SHORTEST = 400  # characters: shorter documents are dropped

Documents = Iterator[tuple[str, str]]  # (name, text)


class _Text(html.parser.HTMLParser):
    """Collects the readable text of an HTML page; `<pre>` keeps its line breaks."""

    SKIP = frozenset({"script", "style", "head", "nav", "footer", "title"})
    BLOCK = frozenset({"p", "div", "li", "tr", "dt", "dd", "br", "h1", "h2", "h3", "h4", "h5", "table", "pre", "ul"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self.SKIP
        self.pre += tag == "pre"
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in self.SKIP and self.skipping > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in self.BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace")


def plain(path: Path) -> Documents:
    """The file as it is."""
    yield path.name, _read(path)


def sections(path: Path) -> Documents:
    """One long text cut into documents of 10,000 characters or a little more, at blank lines."""
    part: list[str] = []
    for number, paragraph in enumerate([*_read(path).split("\n\n"), ""]):
        part.append(paragraph)
        if sum(map(len, part)) > 10_000 or not paragraph:
            yield f"{path.name} {number}", "\n\n".join(part)
            part = []


def page(path: Path) -> Documents:
    """An HTML page without its markup."""
    parser = _Text()
    parser.feed(_read(path))
    yield path.name, "".join(parser.parts)


def manual(path: Path) -> Documents:
    """A roff manual page reduced to its text and section titles."""
    lines = []
    for line in _read(path).splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".\\}", ".ie", ".el", ".if", ".nh", ".ad", ".hy")):
            continue
        if match := re.match(r"\.(SH|SS|Sh|Ss)\s*(.*)", line):
            line = "\n" + match[2].strip('"')
        elif match := re.match(r"\.(BR|IR|RB|RI|BI|IB)\s+(.*)", line):
            line = "".join(re.findall(r'"[^"]*"|\S+', match[2])).replace('"', "")
        elif match := re.match(r"\.(B|I|SM|TP|IP|Nm|Fl|Ar|Xr|It)\s+(.*)", line):
            line = match[2].replace('"', "")
        elif line.startswith(".") and len(line) > 1:
            line = ""
        line = re.sub(r"\\f\(?[A-Z]{1,2}|\\f\[[^]]*\]|\\s[+-]?\d|\\[&/,%|^]", "", line)
        line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\(bu", "*").replace("\\(em", "--")
        lines.append(re.sub(r"\\\((..)|\\\[[^]]*\]", "", line).replace("\\e", "\\").replace("\\ ", " "))
    yield path.name, "\n".join(lines)


def chapters(path: Path) -> Documents:
    """Novels stored as an R lazy-load database: length-prefixed zlib blocks of serialised character vectors."""
    data, at, novel = path.read_bytes(), 0, 0
    while at < len(data):
        # R stores a block as a 4-byte length of the unpacked data and one zlib stream.
        unpacker = zlib.decompressobj()
        block = unpacker.decompress(data[at + 4 :])
        at = len(data) - len(unpacker.unused_data)
        lines, cursor = [], 0
        mark = re.compile(rb"\x00[\x00\x04][\x00\x80]\x09(....)", re.DOTALL)  # a CHARSXP header, then its length
        while match := mark.search(block, cursor):
            size = int.from_bytes(match[1], "big")
            lines.append(block[match.end() : match.end() + size].decode("utf-8", "replace"))
            cursor = match.end() + size
        if len(lines) < 1000:
            continue
        novel += 1
        for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) [0-9IVXL]+)", "\n".join(lines))):
            yield f"novel {novel} chapter {number}", chapter


def scenario(path: Path) -> Documents:
    """A game scenario in WML: who says what, in order, with the story told between."""
    lines = []
    pattern = r"\[message\](.*?)\[/message\]|\bstory\s*=\s*_\s*\"((?:[^\"]|\"\")*)\""
    for match in re.finditer(pattern, _read(path), re.DOTALL):
        if match[1] is None:
            lines.append(match[2])
            continue
        said = re.search(r"\bmessage\s*=\s*_\s*\"((?:[^\"]|\"\")*)\"", match[1])
        speaker = re.search(r"\b(?:speaker|id|role|type)\s*=\s*(.+)", match[1])
        if said:
            who = speaker[1].strip() if speaker else "narrator"
            lines.append(said[1] if who == "narrator" else f"{who}: {said[1]}")
    yield path.name, "\n".join(line.replace('""', '"') for line in lines)


def missions(path: Path) -> Documents:
    """Space-game missions: the spoken lines in order; the player's possible answers begin with a dash."""
    lines: list[str] = []
    name, choice = "", -1
    for line in [*_read(path).splitlines(), 'mission "end"']:
        depth = len(line) - len(line.lstrip("\t"))
        if match := re.match(r'(?:mission|event|phrase) ["`](.*)["`]', line):
            if lines:
                yield f"{path.stem}: {name}", "\n".join(lines)
            name, lines, choice = match[1], [], -1
        if line.strip() == "choice":
            choice = depth
        elif line.strip() and depth <= choice:
            choice = -1
        if match := re.match(r"\t+(?:dialog |description |log .*)?[`\"](.{25,})[`\"]\s*$", line):
            lines.append(("- " if 0 <= choice < depth else "") + match[1].strip())


@dataclass(frozen=True)
class Source:
    """Files of one package that become documents of one kind, up to `cap` bytes of text."""

    package: str
    kind: str
    licence: str
    glob: str
    cap: int
    read: Callable[[Path], Documents] = plain
    skip: str = r"$^"  # paths that match are left out


_TESTS = r"/tests?/|_test\.|/testdata/|/locale/|unicode|encodings/|/vendor/"
_WESNOTH = ("httt", "utbs", "trow", "sof", "dw", "nr", "did", "sotbe", "thot", "l", "low", "ei", "dm", "tsg")
SOURCES = (
    Source("r-cran-janeaustenr", "prose", "public domain (the novels)", "**/data/Rdata.rdb", 5 << 20, chapters),
    Source("anarchism", "prose", "GPL-2", "**/*.md*", 4 << 20),
    Source("debian-history", "prose", "GPL-2+", "**/*.en.*html", 1 << 20, page),
    Source("jargon-text", "prose", "public domain", "**/jargon.txt.gz", 2 << 20, sections),
    *(Source(f"wesnoth-1.16-{name}", "dialogue", "GPL-2+", "**/*.cfg", 1 << 20, scenario) for name in _WESNOTH),
    Source(
        "endless-sky-data",
        "dialogue",
        "GPL-3+",
        "**/data/**/*.txt",
        4 << 20,
        missions,
        r"(ships|outfits|weapons|map|persons|fleets)\.txt",
    ),
    Source(
        "manpages",
        "docs",
        "GPL-2+, Linux-man-pages-copyleft, BSD and others (free)",
        "**/man/man?/*.gz",
        1 << 20,
        manual,
        "unicode|iso_8859|charsets",
    ),
    Source(
        "manpages-dev",
        "docs",
        "GPL-2+, Linux-man-pages-copyleft, BSD and others (free)",
        "**/man/man?/*.gz",
        2 << 20,
        manual,
    ),
    Source("debian-handbook", "docs", "GPL-2+ or CC-BY-SA-3.0+", "**/html/en-US/*.html", 2 << 20, page),
    Source("debian-policy", "docs", "GPL-2+", "**/*.html", 1 << 20, page),
    Source("developers-reference", "docs", "GPL-2+", "**/*.html", 1 << 20, page),
    Source("git-doc", "docs", "GPL-2", "**/*.txt*", 2 << 20, plain, "RelNotes"),
    Source("python3.11-doc", "docs", "PSF-2.0", "**/_sources/**/*.rst.txt", 3 << 20, plain, "changelog"),
    Source("postgresql-doc-15", "docs", "PostgreSQL", "**/html/*.html", 2 << 20, page, "release|bookindex|features"),
    Source("linux-doc-6.1", "docs", "GPL-2", "**/Documentation/**/*.rst*", 3 << 20, plain, "translations"),
    Source("libpython3.11-stdlib", "code", "PSF-2.0", "**/*.py", 4 << 20, plain, _TESTS),
    Source("python3-networkx", "code", "BSD-3-Clause", "**/*.py", 1 << 20, plain, _TESTS),
    Source("golang-1.19-src", "code", "BSD-3-Clause", "**/src/**/*.go", 2 << 20, plain, _TESTS + "|zerrors|tables"),
    Source("rust-src", "code", "MIT or Apache-2.0", "**/library/**/*.rs", 2 << 20, plain, _TESTS + "|stdarch"),
    Source("perl-modules-5.36", "code", "GPL-1+ or Artistic", "**/*.pm", 1 << 20, plain, _TESTS + "|Unicode|/unicore"),
    Source("libruby3.1", "code", "Ruby or BSD-2-Clause", "**/*.rb", 1 << 20, plain, _TESTS),
    Source("arduino-core-avr", "code", "LGPL-2.1+, GPL-2+, MIT", "**/*.[ch]*", 1 << 20),
    Source("libeigen3-dev", "code", "MPL-2.0, BSD-3-Clause", "**/*.h", 1 << 20),
    Source("emacs-el", "code", "GPL-3+", "**/*.el*", 2 << 20, plain, "/language/|/leim/|loaddefs|/international/"),
)


def unpack(package: str, work: Path) -> tuple[Path, str]:
    """Fetch and unpack one package below `work`; returns its root folder and its version."""
    debs, root = work / "packages", work / "unpacked" / package
    debs.mkdir(parents=True, exist_ok=True)
    found = sorted(debs.glob(f"{package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True, stdout=subprocess.DEVNULL)
        found = sorted(debs.glob(f"{package}_*.deb"))
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", found[-1], root], check=True)
    field = subprocess.run(["dpkg-deb", "-f", found[-1], "Version"], check=True, capture_output=True, text=True)
    return root, field.stdout.strip()


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, no runs of blank lines, at most `LONGEST` characters."""
    text = text.replace("\r\n", "\n").replace("\t", "    " if "\n\t" not in text else "\t").replace("\x0c", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()[:LONGEST]


def order(name: str) -> int:
    """A fixed pseudo-random number for a document's name: decides sampling order and the split."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def documents(source: Source, root: Path) -> list[tuple[str, str]]:
    """The source's documents in pseudo-random order, without duplicates, up to its cap."""
    paths = [p for p in root.glob(source.glob) if p.is_file() and not p.is_symlink()]
    paths = [p for p in paths if not re.search(source.skip, str(p.relative_to(root)))]
    paths.sort(key=lambda p: order(str(p.relative_to(root))))
    kept, seen, total = [], set(), 0
    for path in paths:
        for name, text in source.read(path):
            text = clean(text)
            digest = hashlib.sha256(text.encode()).digest()
            if len(text) < SHORTEST or digest in seen or text.count("\ufffd") > 5:
                continue
            seen.add(digest)
            kept.append((name, text))
            total += len(text.encode())
            if total > source.cap:
                return kept
    return kept


def main() -> None:
    """Write the corpus and its table of sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for packages and corpus (about 1.5 GB)")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    table = []
    files = {
        (split, kind): (work / f"{split}_{kind}.jsonl").open("w") for split in ("train", "heldout") for kind in KINDS
    }
    for source in SOURCES:
        root, version = unpack(source.package, work)
        kept = documents(source, root)
        size = {"train": 0, "heldout": 0}
        for name, text in kept:
            split = "heldout" if order(f"{source.package}/{name}") % HELD_OUT[source.kind] == 0 else "train"
            line = json.dumps({"source": source.package, "name": name, "text": text}, ensure_ascii=False)
            files[split, source.kind].write(line + "\n")
            size[split] += len(text.encode())
        table.append(
            {
                "package": source.package,
                "version": version,
                "kind": source.kind,
                "licence": source.licence,
                "documents": len(kept),
                "train_bytes": size["train"],
                "heldout_bytes": size["heldout"],
            }
        )
        print(f"{source.package:24} {source.kind:9} {len(kept):5} documents {sum(size.values()):9,} bytes", flush=True)
    for file in files.values():
        file.close()
    (work / "sources.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
