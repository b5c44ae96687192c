"""`python -m ws.report`."""

from ws import console
from ws.options.use import ReportOptions
from ws.report import main

console.run(main, ReportOptions, "python -m ws.report")
