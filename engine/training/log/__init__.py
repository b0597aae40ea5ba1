"""What a run tells while it trains: lines and symptoms at the terminal, metrics.jsonl, and the loggers of ``run.loggers``."""

from engine.training.log.records import Records
from engine.training.log.run_log import RunLog, Summary

__all__ = ["Records", "RunLog", "Summary"]
