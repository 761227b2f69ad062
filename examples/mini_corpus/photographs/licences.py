"""Who made a photograph and under which licence, as the package that carries it states."""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Licence:
    """A licence in the words of the package; `note` is what else it says (origin, changes made)."""

    licence: str
    author: str | None = None
    note: str | None = None
    url: str | None = None


# The copyright file of krank is prose; its words on the pictures:
KRANK = Licence("Public Domain", "Slava Anishenko", "All images with unknown license were replaced.")


def debian_licence(copyright_text: str, path: str) -> Licence:
    """Licence of `path` by a machine-readable debian/copyright file (DEP-5).

    The last paragraph that matches counts, as the format says, with one exception: a paragraph whose pattern
    names an author (`*-harro*`) outranks those that do not. endless-sky needs it: its later pattern
    `mountain1*` is meant for mountain1 but also catches mountain17-harro.

    Raises:
        ValueError: no paragraph matches.
    """
    best = None
    for fields in _paragraphs(copyright_text):
        for pattern in fields.get("files", "").split():
            if fnmatchcase(path, pattern):
                names_author = re.search(r"\*-\w+\*$", pattern) is not None
                if best is None or names_author >= best[0]:
                    best = (names_author, fields)
    if best is None:
        raise ValueError(f"the package's copyright file has no paragraph for {path}")
    fields = best[1]
    name, _, text = fields["license"].partition("\n")
    note = " ".join(part for part in (text, fields.get("comment")) if part)
    author = "; ".join(line.strip() for line in fields["copyright"].splitlines() if line.strip())
    return Licence(name.strip(), author, " ".join(note.split()) or None)


def kde_licence(metadata: str) -> Licence:
    """Licence of a KDE wallpaper by its metadata.json."""
    plugin = json.loads(metadata)["KPlugin"]
    return Licence(plugin["License"], ", ".join(author["Name"] for author in plugin["Authors"]))


def readme_licence(readme: str, path: str) -> Licence:
    """Licence of `path` by the README lists of GCompris.

    Paragraphs hold Copyright, License, Source and Comment lines in any order, and paths relative to the
    list's folder, after `Files:`, on lines of their own, or both.

    Raises:
        ValueError: `path` is in no paragraph.
    """
    for paragraph in re.split(r"\n\s*\n", readme):
        lines = [line.strip() for line in paragraph.splitlines()]
        if path in lines or f"Files: {path}" in lines:
            fields = dict(line.split(": ", 1) for line in lines if ": " in line)
            note = fields.get("Comment") or fields.get("Comments")
            return Licence(fields["License"], fields.get("Copyright"), note, fields.get("Source"))
    raise ValueError(f"the list of licences has no paragraph for {path}")


def _paragraphs(text: str) -> list[dict[str, str]]:
    """Paragraphs of a Debian control file as {field in lower case: value with its continuation lines}."""
    paragraphs = []
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        field = None
        for line in block.splitlines():
            if line[:1] in " \t" and field:
                fields[field] += "\n" + line.strip()
            elif ":" in line:
                field, _, value = line.partition(":")
                field = field.lower()
                fields[field] = value.strip()
        paragraphs.append(fields)
    return paragraphs
