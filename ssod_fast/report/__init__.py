"""Reports: reads finished, running or broken run folders and writes one self-contained HTML page."""

from ssod_fast.report.html import build_report

__all__ = ["build_report"]
