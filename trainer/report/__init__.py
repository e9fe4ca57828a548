"""The picture of a run: everything worth watching on one page, from the numbers that the run wrote down."""

from trainer.report.page import PICTURE_FILE, write_report

__all__ = ["PICTURE_FILE", "write_report"]
