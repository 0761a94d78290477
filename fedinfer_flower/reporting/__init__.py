"""What a run showed, for people: one HTML file, one terminal table."""

from fedinfer_flower.reporting.intervals import wilson_interval
from fedinfer_flower.reporting.report import write_report
from fedinfer_flower.reporting.table import summary_table

__all__ = ["summary_table", "wilson_interval", "write_report"]
