"""What an evaluation has found, as a page with pictures, as JSON and as a table at the terminal."""

from evaluation.report.encoding import read_findings
from evaluation.report.folder import write_report
from evaluation.report.tables import print_main_table

__all__ = ["print_main_table", "read_findings", "write_report"]
