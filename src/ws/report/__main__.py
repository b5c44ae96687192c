"""`python -m ws.report`."""

from ws import console
from ws.report import ReportOptions, main

console.run(main, ReportOptions, "python -m ws.report")
