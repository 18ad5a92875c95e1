"""Pages that show a study's motion: one page and picture a run, one page a study."""

from keepstill.report.run_page import write_run_page
from keepstill.report.study_page import write_study_page

__all__ = ["write_run_page", "write_study_page"]
