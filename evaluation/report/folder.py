"""A report as files in a folder.

folder/
    report.md        what was found, for people
    report.json      the same for programs; written last, so that where it is, the rest is too
    report-*.png     the pictures that report.md shows
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from evaluation.findings import Findings
from evaluation.report.encoding import to_text
from evaluation.report.markdown import to_markdown
from evaluation.report.pictures import PREFIX, draw_pictures
from evaluation.report.view import View

TEXT_FILE, DATA_FILE = "report.md", "report.json"


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """Writes a report beside whatever else lies in the folder; an older report there is replaced.

    All files are made before the first one is put in its place. The same findings give the same bytes.

    Args:
        folder: made if it is not there.

    Returns:
        The files, ``report.json`` last.

    Raises:
        InvalidRequest: facts hold what JSON has not.
        OSError: the folder cannot be written.
    """
    data, view = to_text(findings), View(findings)
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".report-draft-", dir=folder))
    try:
        pictures = draw_pictures(view, draft)
        (draft / TEXT_FILE).write_text(to_markdown(view, pictures), encoding="utf-8")
        (draft / DATA_FILE).write_text(data, encoding="utf-8")
        names = [*(picture.file for picture in pictures), TEXT_FILE, DATA_FILE]
        (folder / DATA_FILE).unlink(missing_ok=True)  # until all is there again
        for old in folder.glob(f"{PREFIX}*.png"):
            if old.name not in names:
                old.unlink()
        return [(draft / name).replace(folder / name) for name in names]
    finally:
        shutil.rmtree(draft, ignore_errors=True)
